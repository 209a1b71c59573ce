"""
Resident memory of one plan while it decodes, in a process of its own: `python benchmarks/inference_memory.py PLAN GROUPS`.

Prints one line of JSON, in bytes.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from inference_goals import Outcome
from inference_work import GenerateWork
from inference_world import SMOL, Shape, World, few_rows


_PAGES = Path("/proc/self/statm")
_SLACK = 40e6  # allocator, caches of keys and values, activations
PLANS = (
    ("factored", 2, None),
    ("materialised", 1, None),
    ("materialised", 2, None),
    ("auto", 1, None),
    ("auto", 1, 100_000_000),
)
"""Plan, different rows of weights, and memory budget in bytes (None: no limit)."""


@dataclass(frozen=True)
class Footprint:
    """
    Bytes. shared, factors: of the tensors; matrices: of one more copy of what has deltas. loaded: resident memory that the
    model took; decoding: what its last decoding step had beyond that; peak: the most at any time.
    """

    plan: str
    groups: int
    budget: int | None
    shared: int
    factors: int
    matrices: int
    loaded: int
    decoding: int
    peak: int

    @property
    def allowed(self) -> int:
        """What decoding may hold: one copy for each group (`materialised`, `auto`), within the budget."""
        copies = 0 if self.plan == "factored" else self.groups * self.matrices
        return copies if self.budget is None else min(copies, self.budget)

    def outcomes(self) -> list[Outcome]:
        budget = "" if self.budget is None else f", memory_budget {self.budget / 1e6:.0f} MB"
        where = f"memory, {self.plan}, {self.groups} rows of weights{budget}"
        return [
            _outcome(f"{where}: loaded", self.shared + self.factors, self.loaded),
            _outcome(f"{where}: decoding", self.allowed, self.decoding),
        ]


def _outcome(what: str, allowed: int, found: int) -> Outcome:
    return Outcome("A8", what, f"{allowed / 1e6:.0f} MB", f"{found / 1e6:.0f} MB", found <= allowed + _SLACK)


def footprint(plan: str, groups: int, budget: int | None = None) -> Footprint:
    """Measure in a child process, whose memory nothing else has touched."""
    command = [sys.executable, __file__, plan, str(groups), *([] if budget is None else [str(budget)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def resident() -> int:
    """Resident bytes of this process, after the allocator has given back what it can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(_PAGES.read_text().split()[1]) * resource.getpagesize()


class ReadsMemory(transformers.LogitsProcessor):
    """Keeps the resident memory of the latest decoding step."""

    latest = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.latest = resident()
        return scores


def observe(shape: Shape, plan: str, groups: int, budget: int | None, new: int = 4) -> Footprint:
    """Build a model, generate a few tokens by `plan`, and read memory on the way."""
    before = resident()
    world = World(shape, [16] * 8)
    model: Any = world.wrapper()
    loaded = resident()
    work = GenerateWork(world, 2 * groups, 16, new)
    reader, weights = ReadsMemory(), few_rows(2 * groups, world.count, groups)
    model.set_plan(plan, memory_budget=budget)
    with torch.no_grad():
        model.generate(**work.inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, expert_weights=weights,
                       logits_processor=[reader])  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = dict(world.stock.named_parameters())
    return Footprint(
        plan, groups, budget,
        shared=sum(p.nbytes for p in start.values()),
        factors=sum(f.up.nbytes + f.down.nbytes for f in world.factors.values()),
        matrices=sum(start[name].nbytes for name in world.factors),
        loaded=loaded - before, decoding=reader.latest - loaded, peak=peak - before,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    plan, groups, *rest = sys.argv[1:]
    print(json.dumps(observe(SMOL, plan, int(groups), int(rest[0]) if rest else None).__dict__))
