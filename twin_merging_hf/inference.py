"""Running models over rows of data, in batches, the same way everywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .processing import Processing


BATCH = 32


def batches(rows: list[dict], processing: Processing, size: int = BATCH) -> Iterator[tuple[list[dict], dict]]:
    """Yield (rows, model inputs) in order."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield chunk, processing.inputs(chunk)


@torch.no_grad()
def run_over(
    model: nn.Module,
    rows: list[dict],
    processing: Processing,
    step: Callable[[dict], torch.Tensor],
    tick: Callable[[int], Any] = lambda count: None,
) -> torch.Tensor:
    """
    Apply `step` to each batch's model inputs and return the results of all rows, [row, ...], on the CPU.

    `step` gets inputs on the model's device.
    """
    was_training = model.training
    model.eval()
    try:
        results = []
        device = next(model.parameters()).device
        for chunk, inputs in batches(rows, processing):
            results.append(step({name: value.to(device) for name, value in inputs.items()}).float().cpu())
            tick(len(chunk))
        return torch.cat(results)
    finally:
        model.train(was_training)
