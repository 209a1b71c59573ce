"""Mean hidden states of a stock model, layer by layer: what routers read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench import Bench
from running import run, with_all_heads


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Features:
    """
    masked: for each split [row, layer, hidden], embeddings first, means over the valid tokens.
    unmasked: for each split [row, hidden], the last layer's mean over a fixed number of tokens, padding included.
    task: for each split [row].
    """

    masked: dict[str, np.ndarray]
    unmasked: dict[str, np.ndarray]
    task: dict[str, np.ndarray]

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def state(self, split: str, masked: bool, middle: bool) -> np.ndarray:
        """Features [row, hidden] of the last or the middle layer (whose input, as in a prefix pass, is read)."""
        if not masked:
            return self.unmasked[split]
        layers = self.masked[split].shape[1]
        return self.masked[split][:, (layers - 1) // 2 if middle else -1]


def features(
    bench: Bench, name: str, state: Callable[[], dict[str, torch.Tensor]], rows: int, unmasked: bool = False
) -> Features:
    """
    Run a stock model with backbone tensors `state()` over all splits.

    Args:
        rows: at most so many train rows of each task.
        unmasked: pad every text to one length, so that `Features.unmasked` does not depend on batch mates.
    """
    parts = {split: bench.part(split, rows if split == "train" else None) for split in SPLITS}
    model: Any = None
    masked, plain = {}, {}
    for split, part in parts.items():

        def compute(part=part, split=split) -> dict[str, np.ndarray]:
            nonlocal model
            model = model or with_all_heads(bench, state())
            body, width = model.base_model, longest(bench) if unmasked else None
            step = lambda inputs: _means(body, _padded(bench, inputs, width))  # noqa: E731
            found = run(bench, part.rows, model, step, f"{name}: states of {split} rows")
            return {"masked": found[:, :-1], "unmasked": found[:, -1]}

        arrays = bench.cached(f"features-{name}", [part.digest, unmasked], compute)
        masked[split] = arrays["masked"]
        plain[split] = arrays["unmasked"]
    return Features(masked, plain, {split: part.gold.task for split, part in parts.items()})


def _means(body: Any, inputs: dict) -> torch.Tensor:
    """Masked means of all layers, and the last layer's mean over all positions: [row, layer + 1, hidden]."""
    states = body(**inputs, output_hidden_states=True).hidden_states
    plain = states[-1].mean(1)
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.stack([*(state.mean(1) for state in states), plain], 1)
    share = mask / mask.sum(1, keepdim=True)
    return torch.stack([*(torch.einsum("bs,bsd->bd", share, state) for state in states), plain], 1)


def longest(bench: Bench) -> int | None:
    """The fixed number of tokens that texts are padded to: the longest row's; None for images."""
    if bench.kind != "text":
        return None
    rows = [row for split in SPLITS for row in bench.part(split).rows]
    return max(bench.processing.inputs(rows[i : i + 64])["input_ids"].shape[1] for i in range(0, len(rows), 64))


def _padded(bench: Bench, inputs: dict, width: int | None) -> dict:
    if width is None:
        return inputs
    missing, pad = width - inputs["input_ids"].shape[1], bench.processing.processor.pad_token_id
    fill = {"input_ids": pad}
    return {n: torch.nn.functional.pad(v, (0, max(0, missing)), value=fill.get(n, 0)) for n, v in inputs.items()}
