"""The merge of a recipe's experts, tensor by tensor: what the pure methods of `merging` need, taken from checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from .checkpoints import Checkpoint
from .errors import TwinMergingError
from .fitted_merge import LEAST_SQUARES, fitted_tensor
from .merging import DEFAULTS, MERGE_METHODS, PIECE, WHOLE_MATRICES, MergeSettings, settings_for, trim_thresholds
from .preflight import Inputs
from .recipe import Recipe


def merge_settings(recipe: Recipe, method: str | None = None) -> MergeSettings:
    """Settings of the recipe's merge method, or of another one: what `parameters` gives, else the method's defaults."""
    defaults = DEFAULTS[method or recipe.merge_method]
    weights = tuple(expert.weight for expert in recipe.experts)
    settings = settings_for(defaults, weights, recipe.scaling, recipe.density, recipe.normalize)
    return replace(settings, names=tuple(recipe.names), seed=recipe.seed)


def prepare_merge(inputs: Inputs) -> None:
    """
    Find what the merge of every tensor needs to know of all: TIES' thresholds, the fit of least squares.

    `merge_tensor` finds it too; found beforehand, it is found once where several workers merge at the same time. Raises as
    `merge_tensor`.
    """
    if inputs.shared is not None:
        return
    if inputs.recipe.merge_method == "ties":
        trimming(inputs, inputs.recipe)
    elif inputs.recipe.merge_method == LEAST_SQUARES:
        names = inputs.experts[0].backbone
        merge_tensor(inputs, next(name for name in names if inputs.experts[0].dtype(name).is_floating_point))


def merge_tensor(
    inputs: Inputs,
    name: str,
    method: str | None = None,
    recipe: Recipe | None = None,
) -> torch.Tensor:
    """
    The merge of one floating-point backbone tensor, in the type in which the recipe computes.

    Args:
        method, recipe: instead of those of the inputs.

    Raises:
        TwinMergingError: the method needs a base model and there is none, or it lacks this tensor.
    """
    recipe = recipe or inputs.recipe
    method = method or recipe.merge_method
    settings = merge_settings(recipe, method)
    if method == LEAST_SQUARES:
        means = replace(recipe, normalize=True)
        fitted = fitted_tensor(inputs, name, settings.weights, lambda n: merge_tensor(inputs, n, "linear", means))
        return fitted.to(getattr(torch, recipe.dtype))
    experts = [checkpoint.tensor(name) for checkpoint in inputs.experts]
    compute: torch.dtype = getattr(torch, recipe.dtype)
    if method == "linear" and settings.normalize and _all_equal(experts, compute):
        return experts[0].to(compute)  # a mean would round, and leave deltas of nothing but rounding
    base = _base_of(inputs, method, name).tensor(name) if DEFAULTS[method].needs_base else None
    if method == "ties":
        settings = replace(settings, thresholds=trimming(inputs, recipe))
    return _merge(method, experts, base, replace(settings, tensor=name), compute)


def _merge(
    method: str,
    experts: list[torch.Tensor],
    base: torch.Tensor | None,
    settings: MergeSettings,
    compute: torch.dtype,
) -> torch.Tensor:
    """Merge tensors, in pieces where the method allows it: memory is then one result, whatever the number of experts."""
    merge, shape = MERGE_METHODS[method], experts[0].shape
    if method in WHOLE_MATRICES:
        whole = torch.stack([expert.to(compute) for expert in experts])
        return merge(whole, None if base is None else base.to(compute), settings)
    merged = torch.empty(shape.numel(), dtype=compute)
    flat, flat_base = [expert.reshape(-1) for expert in experts], None if base is None else base.reshape(-1)
    for start in range(0, len(merged), PIECE):
        piece = slice(start, start + PIECE)
        stacked = torch.stack([expert[piece].to(compute) for expert in flat])
        origin = None if flat_base is None else flat_base[piece].to(compute)
        merged[piece] = merge(stacked, origin, replace(settings, start=start))
    return merged.reshape(shape)


def _all_equal(experts: list[torch.Tensor], compute: torch.dtype) -> bool:
    first, *others = (expert.reshape(-1).split(PIECE) for expert in experts)
    return all(
        torch.equal(piece.to(compute), mine.to(compute))
        for other in others
        for piece, mine in zip(other, first, strict=True)
    )


def _base_of(inputs: Inputs, method: str, name: str) -> Checkpoint:
    if inputs.base is None:
        raise TwinMergingError(f"the merge method {method!r} needs `base_model`, which the recipe does not give")
    if name not in inputs.base.places:
        raise TwinMergingError(f"the merge method {method!r} needs tensor {name!r} of the base model, which lacks it")
    return inputs.base


def trimming(inputs: Inputs, recipe: Recipe) -> tuple[float, ...]:
    """The magnitudes from which on TIES keeps entries of each expert's task vector, counted once for all tensors."""
    density, compute = merge_settings(recipe, "ties").density, getattr(torch, recipe.dtype)
    key = (density, compute)
    if key not in inputs.thresholds:
        names = [name for name in inputs.experts[0].backbone if inputs.experts[0].dtype(name).is_floating_point]
        size = sum(inputs.experts[0].backbone[name].numel() for name in names)
        vectors: list[Callable] = [partial(_task_vector, inputs, e, names, compute) for e in inputs.experts]
        inputs.thresholds[key] = trim_thresholds(vectors, density, size)
    return inputs.thresholds[key]


def _task_vector(inputs: Inputs, expert: Checkpoint, names: list[str], compute: torch.dtype) -> Iterator[torch.Tensor]:
    for name in names:
        theirs, base = expert.tensor(name).reshape(-1), _base_of(inputs, "ties", name).tensor(name).reshape(-1)
        for piece, origin in zip(theirs.split(PIECE), base.split(PIECE), strict=True):
            yield piece.to(compute) - origin.to(compute)
