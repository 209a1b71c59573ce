"""The merge of a recipe's experts, tensor by tensor: what the pure methods of `merging` need, taken from checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from .checkpoints import Checkpoint
from .errors import TwinMergingError
from .fitted_merge import LEAST_SQUARES, fitted_tensor
from .merging import DEFAULTS, MERGE_METHODS, MergeSettings, settings_for, trim_thresholds
from .preflight import Inputs
from .recipe import Recipe


def merge_settings(recipe: Recipe, method: str | None = None) -> MergeSettings:
    """Settings of the recipe's merge method, or of another one: what `parameters` gives, else the method's defaults."""
    defaults = DEFAULTS[method or recipe.merge_method]
    weights = tuple(expert.weight for expert in recipe.experts)
    settings = settings_for(defaults, weights, recipe.scaling, recipe.density, recipe.normalize)
    return replace(settings, names=tuple(recipe.names), seed=recipe.seed)


def merge_tensor(
    inputs: Inputs,
    name: str,
    method: str | None = None,
    recipe: Recipe | None = None,
    experts: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    The merge of one floating-point backbone tensor, in the type in which the recipe computes.

    Args:
        method, recipe: instead of those of the inputs.
        experts: the experts' tensors, if they have been read already.

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
    experts = experts or [checkpoint.tensor(name) for checkpoint in inputs.experts]
    compute: torch.dtype = getattr(torch, recipe.dtype)
    experts = [expert.to(compute) for expert in experts]
    if method == "linear" and settings.normalize and all(torch.equal(e, experts[0]) for e in experts[1:]):
        return experts[0]  # a mean would round, and leave deltas of nothing but rounding
    base = _base_of(inputs, method, name).tensor(name).to(compute) if DEFAULTS[method].needs_base else None
    if method == "ties":
        settings = replace(settings, thresholds=_thresholds(inputs, settings.density, compute))
    return MERGE_METHODS[method](torch.stack(experts), base, replace(settings, tensor=name))


def _base_of(inputs: Inputs, method: str, name: str) -> Checkpoint:
    if inputs.base is None:
        raise TwinMergingError(f"the merge method {method!r} needs `base_model`, which the recipe does not give")
    if name not in inputs.base.places:
        raise TwinMergingError(f"the merge method {method!r} needs tensor {name!r} of the base model, which lacks it")
    return inputs.base


def _thresholds(inputs: Inputs, density: float, compute: torch.dtype) -> tuple[float, ...]:
    """What TIES keeps of each expert's whole task vector, counted once for all tensors."""
    key = (density, compute)
    if key not in inputs.thresholds:
        names = [name for name in inputs.experts[0].backbone if inputs.experts[0].tensor(name).is_floating_point()]
        size = sum(inputs.experts[0].backbone[name].numel() for name in names)
        vectors: list[Callable] = [partial(_task_vector, inputs, e, names, compute) for e in inputs.experts]
        inputs.thresholds[key] = trim_thresholds(vectors, density, size)
    return inputs.thresholds[key]


def _task_vector(inputs: Inputs, expert: Checkpoint, names: list[str], compute: torch.dtype) -> Iterator[torch.Tensor]:
    for name in names:
        yield expert.tensor(name).to(compute) - _base_of(inputs, "ties", name).tensor(name).to(compute)
