"""The modes that alignment.py compares: how two experts become one backbone, and what that backbone knows."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from alignment_data import Task

from twin_merging_hf.alignment import align, has_batch_norm, merge_models, reestimate_batch_norm
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.least_squares import fit_layers


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weight shares of aligned modes: 0 is activations alone, 1 weights alone, between is dual."""
DUAL = 0.5
_CALIBRATION, _BATCH = 512, 128


@dataclass(frozen=True)
class Merge:
    """One backbone of two experts, in two models that differ in their heads; `heads_averaged` where both have one task."""

    models: list[Any]
    heads_averaged: bool


def calibration(tasks: list[Task]) -> list[dict[str, torch.Tensor]]:
    """Train inputs of both tasks in turn, without labels: what both experts are shown, in batches."""
    count = _CALIBRATION // 2
    rows = [{key: value[:count] for key, value in _shuffled(task).items()} for task in tasks]
    mixed = {key: torch.stack([part[key] for part in rows], dim=1).flatten(0, 1) for key in rows[0]}
    return _batches(mixed, 0, 2 * count)


def own_rows(tasks: list[Task], start: int, stop: int) -> list[list[dict[str, torch.Tensor]]]:
    """Train inputs of each task by itself, in batches."""
    return [_batches(_shuffled(task), start, stop) for task in tasks]


def _shuffled(task: Task) -> dict[str, torch.Tensor]:
    """Train inputs in an order that says nothing about their labels, by which sources are sorted."""
    order = torch.randperm(len(task.train_labels), generator=torch.Generator().manual_seed(0))
    return {key: value[order] for key, value in task.train.items()}


def _batches(inputs: dict[str, torch.Tensor], start: int, stop: int) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value[at : min(at + _BATCH, stop)] for key, value in inputs.items()} for at in range(start, stop, _BATCH)
    ]


def aligned(experts: list[Any], batches: list[dict], weight_share: float, seed: int) -> list[Any]:
    """The first expert, and the second with its units in the first one's order."""
    found = align(experts[0], experts[1], batches, weight_share=weight_share, seed=seed)
    moved = copy.deepcopy(experts[1])
    found.apply(moved)
    return [experts[0], moved]


@torch.no_grad()
def average(experts: list[Any], batches: list[dict], same_task: bool, share: float = 0.5) -> Merge:
    """The mean of two experts' backbones (`share` of the second), BatchNorm statistics estimated again."""
    second = experts[1].state_dict()
    merged = copy.deepcopy(experts[0])
    prefix = f"{merged.base_model_prefix}."
    for name, value in merged.state_dict().items():
        if value.is_floating_point() and (same_task or name.startswith(prefix)):
            value.lerp_(second[name], share)
    if has_batch_norm(merged):
        reestimate_batch_norm(merged, batches)
    return _with_heads(merged, experts, same_task)


@torch.no_grad()
def zipped(experts: list[Any], batches: list[dict], weight_share: float, seed: int, same_task: bool) -> Merge | None:
    """Units of both experts merged, within one and across, where that is exact; None for a family without such units."""
    models = [copy.deepcopy(expert) for expert in experts]
    for model in models:
        if has_batch_norm(model):
            reestimate_batch_norm(model, batches)
    heads = "average" if same_task else "keep"
    try:
        merge = merge_models(models, batches, mode="zip", weight_share=weight_share, heads=heads, seed=seed)
    except TwinMergingError as error:
        print(f"  no zip: {error}", flush=True)
        return None
    merged = models[0]
    merge.apply(merged, batches)
    found = _with_heads(merged, experts, same_task)
    for model, head in zip(found.models, merge.heads, strict=True):
        model.load_state_dict(head, strict=False)
    return found


@torch.no_grad()
def fitted(merge: Merge, experts: list[Any], tasks: list[Task]) -> tuple[Merge, Any]:
    """The least-squares fit that starts from an average of experts, and its report."""
    merged = copy.deepcopy(merge.models[0])
    report = fit_layers(merged, experts, own_rows(tasks, 0, 256), own_rows(tasks, 256, 384))
    return _with_heads(merged, experts, merge.heads_averaged), report


def _with_heads(merged: Any, experts: list[Any], same_task: bool) -> Merge:
    if same_task:
        return Merge([merged, merged], True)
    prefix, backbone, models = f"{merged.base_model_prefix}.", merged.state_dict(), []
    for expert in experts:
        model = copy.deepcopy(expert)
        model.load_state_dict({k: backbone[k] if k.startswith(prefix) else v for k, v in model.state_dict().items()})
        models.append(model.eval())
    return Merge(models, False)


@torch.no_grad()
def scores(models: list[Any], tasks: list[Task]) -> dict[str, float]:
    """
    Accuracy on each task's test rows by its own head, their mean, and jointly: the largest logit of both heads, where the
    tasks have labels of their own (nobody says which task a row belongs to).
    """
    logits = [[model(**task.test).logits for model in models] for task in tasks]
    own = [float((logits[t][t].argmax(dim=1) == task.test_labels).float().mean()) for t, task in enumerate(tasks)]
    found = {"first": own[0], "second": own[1], "mean": sum(own) / 2}
    if tasks[0].name == tasks[1].name:
        return {**found, "joint": own[0]}
    if not set(tasks[0].names) & set(tasks[1].names):
        width = len(tasks[0].names)
        right = [
            (torch.cat(logits[t], dim=1).argmax(dim=1) == task.test_labels + t * width).float()
            for t, task in enumerate(tasks)
        ]
        found["joint"] = float(torch.cat(right).mean())
    return found
