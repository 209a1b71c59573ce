"""Other ways to store experts, for the sweep over bytes: EMR-Merging and BitDelta, task known, dense."""

from collections.abc import Callable

import numpy as np
import torch
from bench import Bench
from running import backbone, load, outputs


def elect_unified(vectors: torch.Tensor) -> torch.Tensor:
    """EMR's one vector for all tasks [expert, ...] -> [...]: the elected sign, the largest magnitude that agrees with it."""
    sign = vectors.sum(0).sign()
    agreeing = torch.where(vectors.sign() == sign, vectors.abs(), torch.zeros_like(vectors))
    return sign * agreeing.amax(0)


def emr_states(bench: Bench) -> list[dict[str, torch.Tensor]]:
    """EMR-Merging (arXiv 2405.17461): base + scale_t * (mask_t * unified), one scale for a whole task."""
    base, experts = backbone(bench, bench.base), [backbone(bench, path) for path in bench.experts]
    unified = {name: elect_unified(torch.stack([e[name] - start for e in experts])) for name, start in base.items()}
    states = []
    for expert in experts:
        vector = {name: expert[name] - start for name, start in base.items()}
        masked = {name: unified[name] * (vector[name] * unified[name] > 0) for name in base}
        size = sum(float(value.abs().sum()) for value in masked.values())
        scale = sum(float(value.abs().sum()) for value in vector.values()) / max(size, 1e-12)
        states.append({name: start + scale * masked[name] for name, start in base.items()})
    return states


def bitdelta_states(bench: Bench) -> list[dict[str, torch.Tensor]]:
    """BitDelta (arXiv 2402.10193) without its distillation: of each matrix the signs and one scale; vectors exact."""
    base = backbone(bench, bench.base)
    states = []
    for path in bench.experts:
        state = {}
        for name, value in backbone(bench, path).items():
            delta = value - base[name]
            state[name] = value if delta.squeeze().dim() < 2 else base[name] + delta.abs().mean() * delta.sign()
        states.append(state)
    return states


def task_known(bench: Bench, name: str, states: Callable[[Bench], list[dict[str, torch.Tensor]]]) -> np.ndarray:
    """Raw outputs [row, width] of test rows, each by its own task's model."""
    part = bench.part("test")

    def compute() -> dict[str, np.ndarray]:
        raw = np.full((len(part.rows), bench.width), -np.inf, np.float32)
        for task, state in enumerate(states(bench)):
            model = load(bench.experts[task], bench.kind)
            own = model.state_dict()
            for tensor, value in state.items():
                own[tensor].copy_(value)
            rows = np.flatnonzero(part.gold.task == task)
            chosen = [part.rows[i] for i in rows]
            raw[rows, bench.spans[task]] = outputs(bench, model, chosen, f"{name}, {bench.names[task]}")
        return {"raw": raw}

    return bench.cached(name, part.digest, compute)["raw"]


def storage_ratios(bench: Bench) -> dict[str, float]:
    """
    All bytes a user must have / the base's, float32, heads included.

    EMR needs the base and the unified vector (its authors do not count the base), and one bit a weight for each task.
    BitDelta needs the base, one bit a matrix weight, and vectors whole.
    """
    base = backbone(bench, bench.base)
    total = sum(value.nbytes for value in base.values())
    vectors = sum(value.nbytes for value in base.values() if value.squeeze().dim() < 2)
    heads = head_bytes(bench)
    count = len(bench.experts)
    return {
        "EMR-Merging": (2 * total + count * total / 32 + heads) / total,
        "BitDelta": (total + count * ((total - vectors) / 32 + vectors) + heads) / total,
    }


def head_bytes(bench: Bench) -> int:
    """Bytes of all experts' heads."""
    return sum(p.nbytes for path in bench.experts for p in load(path, bench.kind).classifier.state_dict().values())
