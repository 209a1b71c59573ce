"""
Merge methods, one parameter at a time.

Each takes the experts' tensors stacked as [expert, *shape], the base's tensor (or None) and `MergeSettings`, and
returns the shared tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MergeSettings:
    """Coefficients of a merge: one weight for each expert, `lambda`, and whether weights are normalised."""

    weights: tuple[float, ...]
    scaling: float = 0.3
    normalize: bool = True


def linear(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """Weighted mean sum_t a_t theta_t; with `normalize`, the weights are divided by their sum (Wortsman et al. 2022)."""
    weights = torch.tensor(settings.weights, dtype=experts.dtype)
    if settings.normalize:
        weights = weights / weights.sum()
    return torch.tensordot(weights, experts, dims=1)


def task_arithmetic(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """theta_0 + lambda sum_t a_t (theta_t - theta_0) (Ilharco et al. 2023; Twin-Merging's shared expert)."""
    if base is None:
        raise ValueError("task arithmetic needs the base model's tensor")
    weights = torch.tensor(settings.weights, dtype=experts.dtype)
    return base + settings.scaling * torch.tensordot(weights, experts - base, dims=1)


MERGE_METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor | None, MergeSettings], torch.Tensor]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
}
