"""Task Singular Vectors merging, TSV-M (Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1)."""

import torch

from .settings import MergeSettings, task_vectors


def tsv_m(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """
    theta_0 + lambda * merge of the task vectors: matrices by their singular vectors, all other shapes by their mean.

    Of each expert's a_t (theta_t - theta_0) [m, n] the leading min(m, n) / T singular triplets are kept (at least one);
    the experts' left and right vectors, side by side, are replaced by the nearest orthonormal ones, so that tasks no
    longer overlap, and multiplied again with all singular values. Raises ValueError without a base.
    """
    vectors = settings.weights_like(experts) * task_vectors(experts, base)
    assert base is not None
    merged = _merge_matrices(vectors) if base.dim() == 2 else vectors.mean(dim=0)
    return base + settings.scaling * merged


def _merge_matrices(vectors: torch.Tensor) -> torch.Tensor:
    """Merge [expert, m, n] to [m, n]."""
    count = max(1, min(vectors.shape[1:]) // len(vectors))
    pieces = [torch.linalg.svd(matrix, full_matrices=False) for matrix in vectors]
    left = _nearest_orthonormal(torch.cat([u[:, :count] for u, _, _ in pieces], dim=1))
    values = torch.cat([s[:count] for _, s, _ in pieces])
    right = _nearest_orthonormal(torch.cat([vh[:count] for _, _, vh in pieces], dim=0))
    return (left * values) @ right


def _nearest_orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of the polar decomposition (Procrustes)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
