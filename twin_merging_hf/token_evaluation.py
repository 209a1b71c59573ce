"""Tags that experts and artifacts give to rows of tokens, and how right they are."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import require_extra
from .evaluation import artifact_outputs, model_outputs
from .inference import batches
from .processing import Processing


@dataclass(frozen=True)
class RowTags:
    """Tags by name of the tokens of each row, as predicted and as the data has them; equally long row by row."""

    predicted: list[list[str]]
    true: list[list[str]]

    def flat(self) -> tuple[list[str], list[str]]:
        """Those of all tokens, row after row: predicted and true."""
        return [tag for row in self.predicted for tag in row], [tag for row in self.true for tag in row]


def expert_tags(model: nn.Module, labels: list[str], rows: list[dict], processing: Processing) -> RowTags:
    """
    Tags that a stock token classifier gives to rows of its own task.

    Args:
        labels: names of its tags, in id order.
    """
    outputs = model_outputs(model, rows, processing)
    return _by_row([labels[i] for i in outputs.argmax(dim=1).tolist()], labels, rows, processing)


def artifact_tags(
    model: Any,
    expert: int,
    rows: list[dict],
    processing: Processing,
    experts: str | None = None,
    tick: Callable = lambda n: None,
) -> RowTags:
    """
    Tags that an artifact gives to rows of one expert's task, in that expert's names.

    A tag of another expert's keeps its name in the union of tags, which no true tag has: it counts as wrong.

    Args:
        expert: index of the expert whose task the rows are of.
        experts: as in the model's call; None: routed.
    """
    labels = list(model.config.experts[expert]["labels"])
    names = list(model.label_space.labels)
    for own, column in enumerate(model.label_space.columns(expert)):
        names[column] = labels[own]
    outputs = artifact_outputs(model, rows, processing, experts, tick).logits
    return _by_row([names[i] for i in outputs.argmax(dim=1).tolist()], labels, rows, processing)


def _by_row(flat: list[str], labels: list[str], rows: list[dict], processing: Processing) -> RowTags:
    """Cut predictions of all tagged tokens into rows, beside the rows' true tags (those within the length limit)."""
    true: list[list[str]] = [[]] * len(rows)
    for chunk, inputs in batches(rows, processing):
        for position, own in zip(chunk, inputs["labels"], strict=True):
            true[position] = [labels[i] for i in own[own != -100].tolist()]
    remaining = iter(flat)
    return RowTags([[next(remaining) for _ in own] for own in true], true)


def tag_accuracy(tags: RowTags) -> float:
    """Share of tokens whose tag is right."""
    pairs = list(zip(*tags.flat(), strict=True))
    return sum(predicted == true for predicted, true in pairs) / len(pairs)


def tag_scores(tags: RowTags) -> dict[str, float]:
    """
    Token `accuracy`, and entity-level `f1` (micro, as CoNLL counts) where seqeval is installed and the task's tags are
    chunks (`B-`, `I-`), else `macro_f1` over the task's tags.

    Raises:
        TwinMergingError: neither seqeval nor scikit-learn is installed.
    """
    predicted, true = tags.flat()
    scores = {"accuracy": tag_accuracy(tags)}
    chunked = any(tag.startswith(("B-", "I-")) for tag in true)
    if chunked and importlib.util.find_spec("seqeval") is not None:
        metrics = require_extra("seqeval.metrics", "tags")
        chunks = [[_as_chunk(tag) for tag in row] for row in tags.predicted]
        return scores | {"f1": float(metrics.f1_score(tags.true, chunks, zero_division=0))}
    metrics = require_extra("sklearn.metrics", "tags")
    options = {"labels": sorted(set(true)), "average": "macro", "zero_division": 0}
    return scores | {"macro_f1": float(metrics.f1_score(true, predicted, **options))}


def _as_chunk(tag: str) -> str:
    """Another expert's tag may be of no chunk scheme: as an entity of its own it counts as found where nothing is."""
    return tag if tag == "O" or tag[1:2] == "-" else f"B-{tag}"
