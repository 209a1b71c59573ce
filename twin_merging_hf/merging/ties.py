"""TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, section 4): trim, elect a sign, disjoint mean."""

import torch

from .selection import magnitudes
from .settings import MergeSettings, task_vectors


def ties(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """
    theta_0 + lambda * disjoint mean of the trimmed task vectors.

    Trimming keeps the entries whose magnitude reaches the expert's threshold in `settings.thresholds`. That is one number
    for the whole task vector, over all tensors that are merged, and not one for each tensor (`trim_thresholds`).

    Raises:
        ValueError: no base, or no thresholds.
    """
    vectors = task_vectors(experts, base)
    assert base is not None
    if settings.thresholds is None:
        raise ValueError("TIES needs the thresholds of the whole task vectors")
    for vector, threshold in zip(vectors, settings.thresholds, strict=True):
        vector[magnitudes(vector) < threshold] = 0
    return base + settings.scaling * elect_and_merge(vectors, settings)


def elect_and_merge(vectors: torch.Tensor, settings: MergeSettings) -> torch.Tensor:
    """
    For each entry, elect the sign of sum_t a_t v_t and merge the entries a_t v_t that have it.

    Where that sum is 0, no sign is elected and the result is 0, as in the paper (the authors' code takes the sign that most
    entries of the whole model have). Entries of 0 belong to no side. With `normalize`, the sum of what agrees is divided
    by the sum of its |a_t|: with equal weights the paper's mean over the experts that agree; without, it stays a sum.

    Args:
        vectors: [expert, *shape].
    """
    weights = settings.weights_like(vectors)
    weighted = weights * vectors
    elected = weighted.sum(dim=0).sign()
    agrees = (weighted.sign() == elected) & (elected != 0)
    merged = torch.where(agrees, weighted, 0).sum(dim=0)
    if settings.normalize:
        share = (agrees * weights.abs()).sum(dim=0)
        merged = merged / torch.where(share > 0, share, 1)
    return merged
