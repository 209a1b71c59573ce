"""The router of a build: where it reads, what it is trained on, and how it does on held-out rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from twin_merging_hf.modeling.routing_twin_merging import ProjectionRouter

from .checkpoints import Checkpoint
from .errors import TwinMergingError
from .inference import run_over
from .preflight import Inputs
from .probe import random_inputs
from .progress import Progress
from .router_training import RouterData, RouterReport, router_report, subspace, train_router
from .separation import Separation, delta_from_base


def router_type(inputs: Inputs) -> str:
    wanted = inputs.recipe.router.type
    if wanted != "auto":
        return wanted
    return "linear" if inputs.rows is not None else "projection"


def routing_fields(first: Checkpoint, inputs: Inputs) -> dict[str, Any]:
    """Config fields that say where the routing state is read."""
    settings, kind = inputs.recipe.router, router_type(inputs)
    layer = None
    if settings.router_pass == "prefix":
        layer = settings.layer if settings.layer is not None else first.layer_count // 2
    fields: dict[str, Any] = {"router_layer": layer}
    fields |= {"router_type": kind, "router_pass": settings.router_pass, "router_input_size": first.config.hidden_size}
    fields["router_top_k"] = settings.top_k
    if kind == "projection":
        readers = readers_of_layer(first, f"{first.layers_path}.{layer}")
        width = min(settings.rank, first.config.hidden_size)
        # Shares of energy are no probabilities: unless told otherwise, the largest takes the row.
        top_k = settings.top_k if settings.top_k is not None else 1
        fields |= {"router_site": readers[0], "router_rank": width, "router_top_k": top_k}
    return fields


@torch.no_grad()
def readers_of_layer(first: Checkpoint, layer: str) -> list[str]:
    """
    Names of the linear modules of a layer that read one and the same first state (query, key, value), found by a run.
    """
    model = first.task_class(first.config).eval()
    calls: list[tuple[str, torch.Tensor]] = []
    for name, module in model.get_submodule(layer).named_modules():
        if type(module) in (nn.Linear, Conv1D):
            path = f"{layer}.{name}"
            module.register_forward_pre_hook(lambda m, args, path=path: calls.append((path, args[0])))
    model(**random_inputs(model, 2, 0))
    if not calls:
        raise TwinMergingError(
            f"{layer} has no linear module, so `projection` cannot route there; use another layer or router"
        )
    return [path for path, state in calls if state is calls[0][1]]


def make_router(model: Any, separation: Separation, inputs: Inputs, progress: Progress) -> RouterReport | None:
    """Train or build the router in place; return its figures on held-out rows, if there are any."""
    config, settings = model.config, inputs.recipe.router
    if isinstance(model.router, ProjectionRouter):
        _fit_projection(model, separation, inputs)
        config.router_temperature = settings.temperature or 1.0
    if inputs.rows is None:
        return None
    data = _router_data(model, inputs, progress)
    if not isinstance(model.router, ProjectionRouter):
        train_router(model.router, data, settings.epochs, settings.lr, inputs.recipe.seed, progress.say)
    temperature = config.router_temperature if config.router_type == "projection" else settings.temperature
    report = router_report(model.router.eval(), data, config.router_type, temperature)
    config.router_temperature = report.temperature
    return report


def _fit_projection(model: Any, separation: Separation, inputs: Inputs) -> None:
    config, recipe = model.config, inputs.recipe
    readers = readers_of_layer(inputs.experts[0], f"{config.layers_path}.{config.router_layer}")
    bases = []
    for name, expert in zip(recipe.names, inputs.experts, strict=True):
        matrices = [_reader_delta(expert, reader, inputs, separation) for reader in readers]
        bases.append(subspace(matrices, config.router_rank, f"{recipe.seed}:{name}:projection"))
    with torch.no_grad():
        model.router.basis.copy_(torch.stack(bases))


def _reader_delta(expert: Checkpoint, reader: str, inputs: Inputs, separation: Separation) -> torch.Tensor:
    """What an expert changed in a module that reads the routing state: [out, in]."""
    delta = delta_from_base(expert, inputs.base, separation.state, f"{reader}.weight")
    return delta.T if type(expert.skeleton.get_submodule(reader)) is Conv1D else delta


def _router_data(model: Any, inputs: Inputs, progress: Progress) -> RouterData:
    assert inputs.rows is not None and inputs.processing is not None
    parts: dict[str, list[torch.Tensor]] = {"train": [], "held_out": []}
    experts: dict[str, list[int]] = {"train": [], "held_out": []}
    step: Callable[[dict], torch.Tensor] = lambda batch: model.routing_features(**batch)  # noqa: E731
    bar = progress.counter("router features", sum(len(r.train) + len(r.held_out) for r in inputs.rows))
    for index, rows in enumerate(inputs.rows):
        for part in parts:
            chosen = getattr(rows, part)
            parts[part].append(run_over(model, chosen, inputs.processing, step, bar.update))
            experts[part] += [index] * len(chosen)
    bar.close()
    return RouterData(
        torch.cat(parts["train"]),
        torch.tensor(experts["train"]),
        torch.cat(parts["held_out"]),
        torch.tensor(experts["held_out"]),
    )
