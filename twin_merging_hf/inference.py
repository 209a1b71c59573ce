"""Running models over rows of data, in batches, the same way everywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import distributed
from .processing import Processing
from .prompt_rows import prompt_key


BATCH = 32


def batches(
    rows: list[dict], processing: Processing, size: int = BATCH, first: int = 0, every: int = 1
) -> Iterator[tuple[list[int], dict]]:
    """
    Yield (positions of the rows, model inputs), rows of similar length together, so that little is padded.

    Rows of tokens have their tags among the inputs, as `labels` [batch, token] (-100: none).

    Args:
        first, every: only the batches first, first + every, ...
    """
    order = sorted(range(len(rows)), key=lambda i: _length(rows[i]))
    for start in range(first * size, len(rows), every * size):
        chunk = order[start : start + size]
        if processing.kind == "tokens":
            inputs, tags = processing.inputs_and_tags([rows[i] for i in chunk])
            yield chunk, {**inputs, "labels": tags}
        else:
            yield chunk, processing.inputs([rows[i] for i in chunk])


def _length(row: dict) -> int:
    if "prompt" in row:
        return sum(map(len, prompt_key(row)))
    return len(row.get("text", "")) + len(row.get("text_pair", "")) + sum(map(len, row.get("tokens", [])))


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

    `step` gets inputs on the model's device, without labels. Of rows of tokens, results [batch, token, ...] are returned
    for the tokens that have a tag, one row's after the other's: [tagged token, ...]. Several processes share the batches,
    which are those of one process, so that results are too.
    """
    was_training = model.training
    model.eval()
    try:
        results: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        device = next(model.parameters()).device
        per_token, mine = False, []
        for chunk, inputs in batches(rows, processing, first=distributed.rank(), every=distributed.world()):
            tags = inputs.pop("labels", None)
            outputs = step({name: value.to(device) for name, value in inputs.items()}).float().cpu()
            per_token = tags is not None and outputs.dim() == 3
            for index, position in enumerate(chunk):
                mine.append((position, outputs[index][tags[index] != -100] if per_token else outputs[index], per_token))
            tick(len(chunk))
        for position, result, per_token in distributed.gathered(mine):  # noqa: B007
            results[position] = result
        return torch.cat(results) if per_token else torch.stack(results)
    finally:
        model.train(was_training)


def token_ids(rows: list[dict], processing: Processing) -> list[torch.Tensor]:
    """Token ids of each row of text [token], without padding, as the model gets them."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for chunk, inputs in batches(rows, processing):
        for position, ids, mask in zip(chunk, inputs["input_ids"], inputs["attention_mask"], strict=True):
            found[position] = ids[mask > 0]
    return found
