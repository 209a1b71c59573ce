"""The router of an edited artifact: cut down exactly, grown without data, or trained again."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from twin_merging_hf.modeling.routing_twin_merging import ProjectionRouter

from .build_router import readers_of_layer
from .checkpoints import Checkpoint
from .errors import TwinMergingError
from .inference import run_over
from .preflight import Inputs
from .router_training import RouterData, RouterReport, router_report, subspace
from .separation import Separation, delta_from_base


@torch.no_grad()
def drop_expert(old: nn.Module, new: nn.Module, position: int) -> None:
    """
    Fill a router over the remaining experts with the tensors of the old one, without the expert at `position`.

    A tensor that has one entry for each expert (found by the two routers' shapes) loses that entry; all else is copied,
    so that logits of the remaining experts stay as they were.

    Raises:
        TwinMergingError: some tensor depends on the experts in another way.
    """
    before, state = old.state_dict(), new.state_dict()
    for key, value in before.items():
        axes = [axis for axis in range(value.dim()) if value.shape[axis] != state[key].shape[axis]]
        if len(axes) > 1 or (axes and value.shape[axes[0]] != state[key].shape[axes[0]] + 1):
            raise TwinMergingError(f"the router's {key!r} cannot be cut by expert; build the artifact again")
        if axes:
            kept = [index for index in range(value.shape[axes[0]]) if index != position]
            value = value.index_select(axes[0], torch.tensor(kept))
        state[key] = value.clone()
    new.load_state_dict(state)


@torch.no_grad()
def put_subspace(old: nn.Module, new: nn.Module, basis: torch.Tensor, position: int, replaces: bool) -> None:
    """Fill a `projection` router with the old bases [expert, rank, hidden] and a new one at `position`."""
    assert isinstance(old, ProjectionRouter) and isinstance(new, ProjectionRouter)
    before, after = old.basis[:position], old.basis[position + int(replaces) :]
    new.load_state_dict({"basis": torch.cat([before, basis[None].to(old.basis), after])})


def new_subspace(config: Any, newcomer: Checkpoint, base: Checkpoint | None, separation: Separation, seed: int):
    """An expert's subspace [rank, hidden] for `projection`, exactly as a build computes it."""
    name = newcomer.role.removeprefix("expert ").strip("'")
    matrices = []
    for reader in readers_of_layer(newcomer, f"{config.layers_path}.{config.router_layer}"):
        delta = delta_from_base(newcomer, base, separation.state, f"{reader}.weight")
        matrices.append(delta.T if type(newcomer.skeleton.get_submodule(reader)) is Conv1D else delta)
    return subspace(matrices, config.router_rank, f"{seed}:{name}:projection")


def measure(model: Any, inputs: Inputs, temperature: float | None, tick) -> RouterReport:
    """
    A finished router on held-out rows.

    Args:
        temperature: None to fit it there, as a build does.
    """
    assert inputs.rows is not None and inputs.processing is not None
    features, experts = [], []
    for index, rows in enumerate(inputs.rows):
        step = lambda batch: model.routing_features(**batch)  # noqa: E731
        features.append(run_over(model, rows.held_out, inputs.processing, step, tick))
        experts += [index] * len(rows.held_out)
    held_out, owners = torch.cat(features), torch.tensor(experts)
    data = RouterData(held_out[:0], owners[:0], held_out, owners)
    report = router_report(model.router.eval(), data, model.config.router_type, temperature)
    model.config.router_temperature = report.temperature
    return report
