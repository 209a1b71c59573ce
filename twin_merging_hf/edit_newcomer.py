"""An expert that joins a finished artifact: its settings, its labels, and its delta from the stored shared model."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from twin_merging_hf.modeling.heads_twin_merging import LabelSpace

from .adapted import AdaptedCheckpoint
from .checkpoints import Checkpoint
from .edit_source import Source
from .errors import TwinMergingError
from .preflight import Inputs
from .recipe import Recipe
from .separation import Separation, separate
from .shapes import matrix_shape


# Of the `none` route where a recipe does not say which share of rows may be taken for strange.
_NONE_SHARE = 0.05


def as_built(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with what the artifact is, where a recipe leaves it open or would choose: types, layers, sizes."""
    config = source.config
    none = None
    if config.router_none_distance is not None:
        none = recipe.router.none if recipe.router.none is not None else _NONE_SHARE
    router = replace(
        recipe.router,
        type=config.router_type,
        layers=tuple(config.state_layers) or None,
        router_pass=config.router_pass,
        top_k=config.router_top_k,
        rank=config.router_rank or recipe.router.rank,
        exemplars=config.router_exemplars or recipe.router.exemplars,
        neighbours=config.router_neighbours or recipe.router.neighbours,
        none=none,
    )
    exclusive = replace(recipe.exclusive, dtype=config.factor_dtype)
    return replace(recipe, out_dtype=str(source.dtype).removeprefix("torch."), router=router, exclusive=exclusive)


def check_labels(source: Source, entry: dict, position: int, replaces: bool) -> list[str]:
    """
    Refuse to change what old label ids mean by a change of the kind of label space; notes on a change that does not.

    Raises:
        TwinMergingError: labels of an expert that stays would get other ids, or two labels one name.
    """
    old, name = source.stack.entries, entry["name"]
    entries = list(old)
    entries[position : position + int(replaces)] = [entry]
    before = LabelSpace.of(old)
    try:
        after = LabelSpace.of(entries)
    except ValueError as error:
        raise TwinMergingError(str(error)) from error
    if before.kind == after.kind:
        return []
    kept = [i for i in range(len(old)) if not (replaces and i == position)]
    moved = [i for i in kept if before.columns(i) != after.columns(i + int(not replaces and i >= position))]
    if moved:
        raise TwinMergingError(
            f"expert {name!r} has labels {', '.join(entry['labels'])}, so the label space would change from "
            f"`{before.kind}` ({', '.join(before.labels[:6])}) to `{after.kind}`, and labels of "
            f"{source.stack.names[moved[0]]!r} would get other ids; if its labels mean the same, give them the same names "
            "by --labels, else build a new artifact"
        )
    return [
        f"the label space changed from `{before.kind}` to `{after.kind}`: old ids stay, names are now "
        f"{', '.join(after.labels[:4])}, ..."
    ]


def check_adapter_base(source: Source, newcomer: Checkpoint) -> None:
    """Refuse a LoRA adapter whose base has other weight files than the base that the artifact was built on."""
    recorded = source.config.provenance.get("sources", {}).get("base", {}).get("sha256")
    if not isinstance(newcomer, AdaptedCheckpoint) or recorded in (None, newcomer.base.fingerprint()):
        return
    raise TwinMergingError(
        f"{newcomer.role}: the adapter's base {newcomer.adapter_of} is not the base that the artifact was built on (its weight "
        "files have another fingerprint); all experts must come from one base"
    )


def separate_newcomer(source: Source, alone: Inputs, others: Sequence[int]) -> Separation:
    """
    The new expert's delta from the stored shared model, compressed as the others' were.

    Args:
        others: positions of the experts that stay: under a `budget` the newcomer gets their mean rank of each tensor.
    """
    expert = alone.experts[0]
    for name in source.built.backbone:
        mine = expert.tensor(name)
        if not mine.is_floating_point() and not torch.equal(mine, source.built.tensor(name)):
            raise TwinMergingError(
                f"{expert.role}: tensor {name!r} holds integers that differ from the artifact's; that cannot be merged"
            )
    if isinstance(expert, AdaptedCheckpoint) and _is_shared(expert.base, source.built):
        alone = replace(alone, base=source.built)  # then its delta is the LoRA itself, as in a build
    if alone.recipe.exclusive.budget is None:
        return separate(alone)
    ranks = {name: [round(_mean([all_ranks[i] for i in others]))] for name, all_ranks in source.stack.ranks.items()}
    usual = max(1, round(_mean([rank for (rank,) in ranks.values()])))
    dropped = {key for key, entry in source.stack.coverage.items() if entry["treatment"] == "dropped"}
    for name, shape in source.built.backbone.items():
        if len(shape) > 1:
            ranks.setdefault(name, [0 if name in dropped else min(usual, *matrix_shape(shape))])
    return separate(alone, ranks=ranks)


def _is_shared(base: Checkpoint, built: Checkpoint) -> bool:
    """Whether a base, in the artifact's type, is the stored shared model."""
    return all(
        name in base.places and torch.equal(base.tensor(name).to(built.dtype(name)), built.tensor(name))
        for name in built.backbone
    )


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
