"""Predictions and scores of experts, static merges and artifacts on labelled rows, all counted the same way."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoints import Checkpoint
from .deferred import deferred, empty_model, put
from .inference import run_over
from .preflight import Inputs
from .processing import Processing
from .recipe import Recipe
from .shared_merge import merge_tensor


def checkpoint_model(checkpoint: Checkpoint, low_memory: bool = False) -> PreTrainedModel:
    """The expert itself, as its own stock class, float32; with `low_memory`, its matrices only while they are read."""
    if not low_memory:
        return checkpoint.load_model()
    model: Any = empty_model(lambda: checkpoint.task_class(copy.deepcopy(checkpoint.config)))
    missing = put(model, {name: _read_later(checkpoint, name) for name in checkpoint.places})
    if missing:
        raise RuntimeError(f"{checkpoint.role}: {missing[:3]} left empty")
    return model


def _read_later(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if not checkpoint.dtype(name).is_floating_point:
        return checkpoint.tensor(name)
    return deferred(checkpoint.shape(name), lambda: checkpoint.tensor(name).float())


def static_merge(inputs: Inputs, expert: int, method: str, recipe: Recipe | None = None) -> PreTrainedModel:
    """
    A stock model of a statically merged backbone with one expert's own head, float32.

    Several experts under one merge cost less by `merged_backbone` and `with_backbone`.

    Args:
        method: a merge method, or `base` for the base model's backbone.
        recipe: whose weights, lambda, density and seed count, instead of the inputs' own.

    Raises:
        TwinMergingError: the method needs a base model, and there is none or it lacks a tensor.
    """
    return with_backbone(inputs, expert, merged_backbone(inputs, method, recipe))


def merged_backbone(inputs: Inputs, method: str, recipe: Recipe | None = None) -> dict[str, torch.Tensor]:
    """Floating-point backbone tensors, float32, of a static merge; arguments and errors as of `static_merge`."""
    merged = {}
    for name in inputs.experts[0].backbone:
        if not inputs.experts[0].tensor(name).is_floating_point():
            continue
        if method == "base":
            assert inputs.base is not None
            merged[name] = inputs.base.tensor(name).float()
        else:
            merged[name] = merge_tensor(inputs, name, method, recipe).float()
    return merged


def with_backbone(inputs: Inputs, expert: int, backbone: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A stock model of one expert, head included, float32, whose backbone tensors are the given ones."""
    model = checkpoint_model(inputs.experts[expert])
    state = model.state_dict()
    for name, value in backbone.items():
        state[name].copy_(value)
    return model


def model_outputs(
    model: nn.Module, rows: list[dict], processing: Processing, tick: Callable = lambda n: None
) -> torch.Tensor:
    """Raw outputs [row, label] of a stock task model; [tagged token, label] of a token classifier."""
    return run_over(model, rows, processing, lambda inputs: model(**inputs).logits, tick)


@dataclass(frozen=True)
class ArtifactOutputs:
    """
    An artifact's answers to rows: `logits`, `expert_logits` [row, label] and `expert_weights` [row, expert].

    Of a token classifier all three have the tagged tokens of all rows in the place of rows.
    """

    logits: torch.Tensor
    expert_logits: torch.Tensor
    expert_weights: torch.Tensor


def artifact_outputs(
    model: Any, rows: list[dict], processing: Processing, experts: str | None = None, tick: Callable = lambda n: None
) -> ArtifactOutputs:
    """Run an artifact over rows, routed by itself (`experts=None`) or by one expert, or `"__shared__"`."""
    width, count = len(model.label_space.labels), len(model.expert_names)

    def step(inputs: dict) -> torch.Tensor:
        output = model(**inputs, experts=experts)
        weights = output.expert_weights
        if output.logits.dim() == 3:  # a row's weights act on all of its tokens
            weights = weights[:, None].expand(-1, output.logits.shape[1], -1)
        return torch.cat([output.logits, output.expert_logits, weights.to(output.logits.device)], dim=-1)

    joined = run_over(model, rows, processing, step, tick)
    return ArtifactOutputs(*joined.split([width, width, count], dim=1))


def agreement(model: Any, expert: int, outputs: ArtifactOutputs, reference: torch.Tensor, train_mean: float) -> float:
    """
    How far an artifact's answers are those of an expert on the expert's own rows.

    Classes: share of rows (of tokens, where those are tagged) with the same label; a label of another expert's counts as
    wrong. Regression: Pearson
    correlation; a row answered by another expert counts as the train mean.

    Args:
        reference: the expert's own raw outputs [row, its labels].
    """
    space = model.label_space
    columns = torch.tensor(space.columns(expert))
    if space.regression[expert]:
        return pearson(regression_values(model, expert, outputs, train_mean), reference[:, 0])
    return float((outputs.logits.argmax(dim=1) == columns[reference.argmax(dim=1)]).float().mean())


def regression_values(model: Any, expert: int, outputs: ArtifactOutputs, train_mean: float) -> torch.Tensor:
    """A regression expert's values [row] from an artifact's answers; rows that others answer get the train mean."""
    space = model.label_space
    column = space.columns(expert)[0]
    if space.kind == "value":
        return outputs.logits[:, 0]
    answered = outputs.logits.argmax(dim=1) == column
    return torch.where(answered, outputs.expert_logits[:, column], torch.tensor(train_mean))


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson correlation; 0 where one side is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def accuracy(outputs: torch.Tensor, rows: list[dict], columns: list[int] | None = None) -> float:
    """
    Share of rows whose largest output is the label.

    Args:
        outputs: [row, label]; over the union label space if `columns` is given.
        columns: for each label id of the task, its column. A prediction outside the task counts as wrong.
    """
    labels = [row["label"] if columns is None else columns[row["label"]] for row in rows]
    return float((outputs.argmax(dim=1) == torch.tensor(labels)).float().mean())
