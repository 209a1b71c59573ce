"""Merges that add: the weighted mean and task arithmetic."""

import torch

from .settings import MergeSettings, task_vectors


def linear(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """Weighted mean sum_t a_t theta_t; with `normalize`, the weights are divided by their sum (Wortsman et al. 2022)."""
    return weighted_sum(experts, settings)


def task_arithmetic(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """
    theta_0 + lambda sum_t a_t (theta_t - theta_0) (Ilharco et al. 2023; Twin-Merging's shared expert).

    With `normalize`, the weights are divided by their sum.
    """
    vectors = task_vectors(experts, base)
    assert base is not None
    return base + settings.scaling * weighted_sum(vectors, settings)


def weighted_sum(tensors: torch.Tensor, settings: MergeSettings) -> torch.Tensor:
    """sum_t a_t tensors[t]; with `normalize`, over sum_t a_t."""
    weights = torch.tensor(settings.weights, dtype=tensors.dtype)
    if settings.normalize:
        weights = weights / weights.sum()
    return torch.tensordot(weights, tensors, dims=1)
