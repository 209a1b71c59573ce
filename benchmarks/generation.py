"""
The benchmark of generation: SmolLM2-135M-Instruct, four LoRA experts of PEFT, every way to have them in one model.

    python benchmarks/generation.py                       # trains what the cache lacks, then the table
    python benchmarks/generation.py --rows 100 --only base,experts,routed

Answers are written greedily and compared with the completion by exact match. See benchmarks/README.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import command
import numpy as np
import peft
import torch
from generation_tasks import LONG, LONGEST, TASKS, UNSEEN, load_tasks, write_rows
from generation_training import RANK, train_expert, write_base
from table import new_figure, save
from table import write_rows as write_csv
from text_tasks import Task
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from twin_merging_hf.builder import build_artifact
from twin_merging_hf.evaluation import static_merge
from twin_merging_hf.metrics import bootstrap_difference, exact_match
from twin_merging_hf.preflight import preflight
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import parse_recipe


BATCH = 32
TUNING_ROWS = 40  # of each task's validation rows, for the coefficients of static merges
GRIDS: dict[str, list[dict[str, float]]] = {
    "linear": [{}],
    "task_arithmetic": [{"lambda": x} for x in (0.3, 0.5, 0.8)],
    "ties": [{"density": 0.2, "lambda": x} for x in (0.5, 1.0)],
    "dare_linear": [{"density": 0.5, "lambda": x} for x in (0.3, 0.5, 0.8)],
}
PEFT_MERGES = {
    "peft_linear": {"combination_type": "linear", "weights": [0.5] * len(TASKS)},
    "peft_ties": {"combination_type": "ties", "density": 0.2, "weights": [1.0] * len(TASKS)},
}
NAMES = {
    "base": "the base model",
    "experts": "each task's own expert, by PEFT (knows the task)",
    "linear": "mean of the adapters' products",
    "task_arithmetic": "task arithmetic*",
    "ties": "TIES*",
    "dare_linear": "DARE*",
    "peft_linear": "PEFT add_weighted_adapter, linear, weights 0.5",
    "peft_ties": "PEFT add_weighted_adapter, TIES, density 0.2",
    "given": "ours, task given",
    "routed": "ours, routed by itself, tasks mixed in every batch",
    "top_1": "the same, the likeliest expert only",
    "routed_none": "the same with the none route",
}
ROUTERS: dict[str, Any] = {"routed": "auto", "none": {"type": "auto", "none": True}}
Answers = dict[str, list[str]]


class World:
    """Tasks, base, experts and what has been written so far."""

    def __init__(self, args: argparse.Namespace):
        self.cache, self.rows = args.cache / "generation", args.rows
        self.cache.mkdir(parents=True, exist_ok=True)
        loaded = load_tasks(args.cache, args.downloads, 0)
        write_rows(loaded, self.cache / "data")
        self.tasks: dict[str, Task] = {task.name: task for task in loaded}
        self.base = self.cache / "base"
        write_base(self.base, self.cache, args.downloads)
        self.experts = {name: train_expert(self.tasks[name], self.base, self.cache / "experts") for name in TASKS}
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")

    def test(self, names: tuple[str, ...]) -> list[tuple[str, dict]]:
        """Test rows of these tasks, task by task, each with its task's name."""
        return [(name, row) for name in names for row in self.tasks[name].rows["test"][: self.rows]]

    def validation(self) -> list[tuple[str, dict]]:
        return [(name, row) for name in TASKS for row in self.tasks[name].rows["validation"][:TUNING_ROWS]]

    def stock(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base).eval()

    def recipe(self, **parts: Any) -> Any:
        experts = [
            {"name": name, "model": str(self.experts[name]),
             "data": {split: str(self.cache / "data" / f"{name}.{split}.jsonl") for split in ("train", "validation")}}
            for name in TASKS
        ]  # fmt: skip
        return {"base_model": str(self.base), "experts": experts, **parts}

    def artifact(self, name: str) -> Path:
        """An artifact of the four experts on their base, with one of `ROUTERS`."""
        out = self.cache / "artifacts" / name
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            recipe = self.recipe(shared_model="base", exclusive={"rank": RANK, "dtype": "bf16"}, router=ROUTERS[name])
            (self.cache / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
            build_artifact(self.cache / f"{name}.yaml", out, Progress(quiet=True))
        return out

    @cached_property
    def inputs(self) -> Any:
        return preflight(parse_recipe(self.recipe()))

    def merged(self, method: str, parameters: dict) -> Any:
        """The adapters merged by the package, without a router."""
        recipe = parse_recipe(self.recipe(merge_method=method, parameters=parameters))
        return static_merge(self.inputs, 0, method, recipe)


@torch.no_grad()
def write(
    world: World, model: Any, rows: list[tuple[str, dict]], title: str, mix: bool = False, **call: Any
) -> list[str]:
    """
    What a model writes after each prompt, greedily, up to a line's end.

    Args:
        mix: all tasks in every batch, and as many tokens for all as the longest task needs.
        call: per-row arguments of `generate`, as functions of the rows' tasks.
    """
    order = list(range(len(rows)))
    if mix:
        np.random.default_rng(0).shuffle(order)
    else:
        order.sort(key=lambda i: LONGEST[rows[i][0]])
    found = [""] * len(rows)
    settings = {"do_sample": False, "pad_token_id": world.tokenizer.eos_token_id}
    for start in tqdm(range(0, len(order), BATCH), desc=title, mininterval=10):
        chosen = order[start : start + BATCH]
        names = [rows[i][0] for i in chosen]
        inputs = world.tokenizer([rows[i][1]["prompt"] for i in chosen], return_tensors="pt", padding=True)
        longest = LONG if mix else max(LONGEST[name] for name in names)
        own = {key: of(names) for key, of in call.items()}
        written = model.generate(**inputs, max_new_tokens=longest, **settings, **own)[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, world.tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            found[i] = text.strip().split("\n")[0].strip()
    return found


def tuned(world: World, method: str) -> Any:
    """A static merge with the coefficients that are best on validation rows; prints them."""
    rows, best = world.validation(), (-1.0, {}, None)
    if len(GRIDS[method]) == 1:
        return world.merged(method, {})
    for parameters in GRIDS[method]:
        model = world.merged(method, parameters)
        answers = write(world, model, rows, f"{method} {parameters}")
        score = float(
            np.mean([text == row["completion"].strip() for text, (_, row) in zip(answers, rows, strict=True)])
        )
        if score > best[0]:
            best = score, parameters, model
    print(f"{method}: {best[1]}, {best[0]:.1%} of {len(rows)} validation rows", flush=True)
    return best[2]


def answers_of(world: World, key: str) -> Answers:
    """What a method writes for the test rows of every task it is asked for; kept in the cache."""
    file = world.cache / "answers" / f"{key}-{world.rows or 'all'}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    started = time.process_time()
    rows = world.test(TASKS) if key in ("experts", "given") else world.test((*TASKS, UNSEEN))
    found = _METHODS.get(key, _static)(world, key, rows)
    answers: Answers = {}
    for (name, _), text in zip(rows, found, strict=True):
        answers.setdefault(name, []).append(text)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(answers), encoding="utf-8")
    print(f"{key}: {time.process_time() - started:.0f} s", flush=True)
    return answers


def _base(world: World, key: str, rows: list) -> list[str]:
    return write(world, world.stock(), rows, key)


def _experts(world: World, key: str, rows: list) -> list[str]:
    found: list[str] = []
    for name in TASKS:
        model = peft.PeftModel.from_pretrained(world.stock(), world.experts[name]).merge_and_unload().eval()
        found += write(world, model, [row for row in rows if row[0] == name], f"expert {name}")
    return found


def _static(world: World, key: str, rows: list) -> list[str]:
    return write(world, tuned(world, key), rows, key)


def _peft(world: World, key: str, rows: list) -> list[str]:
    first, *others = TASKS
    model = peft.PeftModel.from_pretrained(world.stock(), world.experts[first], adapter_name=first)
    for name in others:
        model.load_adapter(world.experts[name], adapter_name=name)
    model.add_weighted_adapter(list(TASKS), adapter_name="merged", **PEFT_MERGES[key])
    model.set_adapter("merged")
    return write(world, model.eval(), rows, key)


def _ours(world: World, key: str, rows: list) -> list[str]:
    if key == "routed_none":
        model = AutoModelForCausalLM.from_pretrained(world.artifact("none"))
    else:
        model = AutoModelForCausalLM.from_pretrained(world.artifact("routed"))
    model.eval()
    if key == "top_1":
        model.config.router_top_k = 1
    call: dict[str, Callable] = {"experts": lambda names: names} if key == "given" else {}
    return write(world, model, rows, key, mix=True, **call)


_METHODS: dict[str, Callable] = {
    "base": _base, "experts": _experts, **dict.fromkeys(PEFT_MERGES, _peft),
    **dict.fromkeys(("given", "routed", "top_1", "routed_none"), _ours),
}  # fmt: skip


def score(world: World, answers: Answers) -> dict[str, float]:
    """Exact match by task, in percent."""
    return {name: 100 * exact_match(texts, gold(world, name)) for name, texts in answers.items()}


def gold(world: World, name: str) -> list[str]:
    return [row["completion"].strip() for _, row in world.test((name,))]


def table(world: World, keys: list[str]) -> list[list]:
    """One row a method: scores by task, the mean relative to the experts, the unseen task, storage."""
    experts = score(world, answers_of(world, "experts"))
    rows = []
    for key in keys:
        found = score(world, answers_of(world, key))
        relative = float(np.mean([found[name] / experts[name] for name in TASKS])) * 100
        scores = [round(found[name], 1) for name in TASKS]
        unseen = round(found[UNSEEN], 1) if UNSEEN in found else ""
        rows.append([key, NAMES[key], *scores, round(relative, 1), unseen, round(storage(world, key), 3)])
    return rows


def storage(world: World, key: str) -> float:
    """Bytes on disk, relative to the base model's fp32 weights."""

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    base = size(world.base)
    if key == "experts":
        return (base + sum(size(folder) for folder in world.experts.values())) / base
    if key in ("given", "routed", "top_1", "routed_none"):
        return size(world.artifact("none" if key == "routed_none" else "routed")) / base
    return 1.0


def compare(world: World, keys: list[str]) -> list[list]:
    """Ours routed against each expert and against the best static merge, task by task, with paired intervals."""
    ours, experts = answers_of(world, "routed"), answers_of(world, "experts")
    statics = [key for key in keys if key in (*GRIDS, *PEFT_MERGES)]
    rows = []
    for name in TASKS:
        truth = gold(world, name)
        rivals = [("its expert", experts[name])]
        if statics:
            best = max(statics, key=lambda key: exact_match(answers_of(world, key)[name], truth))
            rivals.append((f"best static merge ({best})", answers_of(world, best)[name]))
        for what, texts in rivals:
            found = bootstrap_difference(ours[name], texts, truth, exact_match, seed=0)
            rows.append([name, what, *(round(100 * x, 1) for x in (found.difference, found.low, found.high))])
    return rows


@torch.no_grad()
def speed(world: World, rounds: int = 5) -> str:
    """Seconds of processor time to write 32 tokens after 16 mixed prompts, base and ours in turn."""
    rows = [world.tasks[name].rows["test"][i] for i in range(4) for name in TASKS]
    inputs = world.tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": LONG, "min_new_tokens": LONG, "do_sample": False, "pad_token_id": 0}
    models = {"base": world.stock(), "ours": AutoModelForCausalLM.from_pretrained(world.artifact("routed")).eval()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            started = time.process_time()
            model.generate(**inputs, **settings)
            times[name].append(time.process_time() - started)
    ratios = np.array(times["ours"][1:]) / np.array(times["base"][1:])
    tokens = {name: len(rows) * LONG / np.median(spent[1:]) for name, spent in times.items()}
    return (
        f"tokens/s, threads {torch.get_num_threads()}, {len(rows)} mixed prompts, {LONG} new tokens: base {tokens['base']:.1f}, "
        f"ours {tokens['ours']:.1f}; time ratio {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}], {rounds} rounds"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    options.add_argument("--cache", type=Path, default=Path("~/.cache/twin-merging-benchmarks"), metavar="DIR",
                         help="models and answers; a second run continues there (%(default)s)")  # fmt: skip
    options.add_argument("--downloads", type=Path, metavar="DIR", help="folder that has the packages already")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR",
                         help="CSV files and a picture (%(default)s)")  # fmt: skip
    options.add_argument("--rows", type=int, metavar="N", help="at most N test rows of each task (300)")
    options.add_argument("--only", metavar="A,B", help=f"only these methods: {', '.join(NAMES)}")
    options.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    args = options.parse_args()
    command.prepare(args)
    keys = list(NAMES) if args.only is None else args.only.split(",")
    for key in keys:
        if key not in NAMES:
            raise SystemExit(f"--only: no method {key!r}; there are {', '.join(NAMES)}")
    world = World(args)
    head = ["key", "method", *TASKS, "of the experts", f"unseen: {UNSEEN}", "bytes"]
    rows = table(world, keys)
    write_csv(args.out / "generation.csv", head, rows)
    print("\n| " + " | ".join(head[1:]) + " |\n" + "|---" * (len(head) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row[1:])) + " |")
    for name, folder in world.experts.items():
        print(f"training {name}: {(folder / 'training.json').read_text(encoding='utf-8').strip()}")
    if {"routed", "experts"} <= set(keys):
        differences = compare(world, keys)
        write_csv(
            args.out / "generation_differences.csv", ["task", "against", "difference", "low", "high"], differences
        )
        for name, what, difference, low, high in differences:
            print(f"ours routed - {what}, {name}: {difference:+.1f} [{low:+.1f}, {high:+.1f}]")
        report = json.loads((world.artifact("routed") / "report.json").read_text(encoding="utf-8"))
        print(f"router on held-out rows: {report['router'].get('type')}, accuracy {report['router'].get('accuracy')}")
        print(speed(world))
    _draw(args.out / "generation.png", rows)


def _draw(path: Path, rows: list[list]) -> None:
    figure, axes = new_figure(7, 0.4 * len(rows) + 1)
    axes.barh([row[0] for row in rows], [row[-3] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("exact match, % of the experts' own, mean over tasks")
    save(figure, path)


if __name__ == "__main__":
    main()
