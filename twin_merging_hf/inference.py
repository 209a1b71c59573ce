"""Running models over rows of data, in batches, the same way everywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .processing import Processing


BATCH = 32


def batches(rows: list[dict], processing: Processing, size: int = BATCH) -> Iterator[tuple[list[int], dict]]:
    """Yield (positions of the rows, model inputs), rows of similar length together, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].get("text", "")) + len(rows[i].get("text_pair", "")))
    for start in range(0, len(rows), size):
        chunk = order[start : start + size]
        yield chunk, processing.inputs([rows[i] for i in chunk])


@torch.no_grad()
def run_over(
    model: nn.Module,
    rows: list[dict],
    processing: Processing,
    step: Callable[[dict], torch.Tensor],
    tick: Callable[[int], Any] = lambda count: None,
) -> torch.Tensor:
    """
    Apply `step` to each batch's model inputs and return the results of all rows, [row, ...], in order, on the CPU.

    `step` gets inputs on the model's device.
    """
    was_training = model.training
    model.eval()
    try:
        results: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        device = next(model.parameters()).device
        for chunk, inputs in batches(rows, processing):
            outputs = step({name: value.to(device) for name, value in inputs.items()}).float().cpu()
            for position, output in zip(chunk, outputs, strict=True):
                results[position] = output
            tick(len(chunk))
        return torch.stack(results)
    finally:
        model.train(was_training)
