"""The router of an edited artifact: cut down without data, grown without data (`projection`), or trained again."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from twin_merging_hf.modeling.routing_twin_merging import CentroidRouter, ProjectionRouter

from .build_router import (
    expert_subspace,
    fit_router,
    projected_layer,
    readers_of_layer,
    router_data,
    row_centres,
    settle_router,
)
from .checkpoints import Checkpoint, open_checkpoint
from .edit_source import Source
from .errors import TwinMergingError
from .preflight import Inputs
from .progress import Progress
from .router_training import RouterReport
from .separation import Separation


@dataclass
class EditedRouter:
    """What became of the router: `how`, its figures if there are rows, and what was to be said."""

    how: str
    report: RouterReport | None = None
    notes: list[str] = field(default_factory=list)


def needs_rows(config: Any) -> bool:
    """Whether a router cannot take in a new expert without rows of all experts: it is trained, or has a `none` route."""
    return config.router_type != "projection" or config.router_none_distance is not None


def shrink_router(source: Source, model: Any, inputs: Inputs | None, position: int, progress: Progress) -> EditedRouter:
    """
    Fill the router of a model without the expert at `position`; with rows, the temperature is fitted and `none` learned
    again.

    Raises:
        TwinMergingError: a `none` route over `projection`, which without rows cannot lose a column of what it measures.
    """
    how = "the expert's part was dropped, the rest is as before"
    notes: list[str] = []
    has_rows = inputs is not None and inputs.rows is not None
    if source.config.router_none_distance is not None and not has_rows:
        if source.config.router_type == "projection":
            raise TwinMergingError(
                "the `none` route over `projection` is measured on all experts' shares, so it must be learned again; give "
                "--recipe FILE, a recipe whose remaining experts have `data`"
            )
        notes.append(
            "the `none` route keeps its distance and lost the expert's centre: rows of that expert now count as strange. "
            "Give --recipe with `data` to learn it again"
        )
    drop_expert(source.model.router, model.router, position, novelty=not has_rows)
    return EditedRouter(how, _settled(model, inputs, progress) if has_rows else None, notes)


def grow_router(
    source: Source, model: Any, inputs: Inputs, alone: Inputs, separation: Separation, position: int, progress: Progress
) -> EditedRouter:
    """Fill the router of a model with a new expert at `position`: by its subspace, or by training on rows of all."""
    if source.config.router_type != "projection":
        progress.say("training the router again")
        report = fit_router(model, router_data(model, inputs, progress), inputs, progress)
        return EditedRouter("trained again on rows of all experts", report)
    recipe = alone.recipe
    base = None
    if recipe.base_model is not None:
        base = open_checkpoint(recipe.base_model, recipe.folder, "base model", alone.experts[0])
    basis = new_subspace(source.config, alone.experts[0], base, separation, recipe.seed)
    replaces = len(model.expert_names) == len(source.stack.entries)
    put_subspace(source.model.router, model.router, basis, position, replaces)
    has_rows = inputs.rows is not None
    return EditedRouter("the new expert's subspace was added", _settled(model, inputs, progress) if has_rows else None)


def _settled(model: Any, inputs: Inputs | None, progress: Progress) -> RouterReport:
    """Figures on held-out rows; temperature and `none` are fitted as a build does it."""
    assert inputs is not None
    parts = ("held_out",) if inputs.recipe.router.none is None else ("train", "held_out")
    return settle_router(model, router_data(model, inputs, progress, parts), inputs.recipe)


@torch.no_grad()
def drop_expert(old: nn.Module, new: nn.Module, position: int, novelty: bool = True) -> None:
    """
    Fill a router over the remaining experts with the tensors of the old one, without the expert at `position`.

    A tensor that has one entry for each expert (found by the two routers' shapes) loses that entry; all else is copied,
    so that logits of the remaining experts stay as they were (`knn`: its exemplars go, the others vote among themselves).

    Args:
        novelty: whether the `none` route's tensors are cut too; else they are left to be learned.

    Raises:
        TwinMergingError: some tensor depends on the experts in another way.
    """
    before, state = old.state_dict(), new.state_dict()
    centres = old.centres if isinstance(old, CentroidRouter) else ()
    for key, value in before.items():
        if key.startswith("novelty.") and not novelty:
            continue
        if centres and key.startswith("classifier."):
            blocks = value.split(centres)
            state[key] = torch.cat([*blocks[:position], *blocks[position + 1 :]]).clone()
            continue
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
    new.basis.copy_(torch.cat([before, basis[None].to(old.basis), after]))


def new_subspace(config: Any, newcomer: Checkpoint, base: Checkpoint | None, separation: Separation, seed: int):
    """An expert's subspace [rank, hidden] for `projection`, exactly as a build computes it."""
    name = newcomer.role.removeprefix("expert ").strip("'")
    layer = projected_layer(config.router_layer, config.router_pass)
    readers = readers_of_layer(newcomer, f"{config.layers_path}.{layer}")
    return expert_subspace(newcomer, readers, base, separation, config.router_rank, f"{seed}:{name}:projection")


def edited_fields(
    source: Source, entries: list[dict], position: int, inputs: Inputs | None
) -> tuple[dict[str, Any], list[str]]:
    """Config fields of routing that an edit of the expert at `position` changes, and notes."""
    has_rows = inputs is not None and inputs.rows is not None  # then `none` is learned again
    config, count = source.config, len(entries)
    fields: dict[str, Any] = {}
    notes = []
    if config.router_centres and count < len(config.experts):
        fields["router_centres"] = [n for i, n in enumerate(config.router_centres) if i != position]
    elif config.router_centres and inputs is not None and has_rows:
        fields["router_centres"] = list(row_centres(inputs)[1])
    top_k = config.router_top_k
    if top_k is not None and top_k > count:
        fields["router_top_k"] = count
        notes.append(f"`router.top_k` was {top_k} and is now {count}, the number of experts")
    if config.router_none_distance is not None:
        size = config.router_none_dimension or max(1, len(config.experts) - 1)
        fields["router_none_dimension"] = None if has_rows or size == max(1, count - 1) else size
    return fields, notes
