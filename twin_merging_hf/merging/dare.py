"""DARE (Yu et al. 2024, arXiv 2311.03099, section 3): drop entries of task vectors at random and rescale the rest."""

import hashlib

import torch

from .settings import MergeSettings, task_vectors
from .sums import weighted_sum
from .ties import elect_and_merge


def dare_linear(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """
    theta_0 + lambda sum_t a_t dare(theta_t - theta_0): task arithmetic of thinned task vectors.

    With `normalize`, the weights are divided by their sum. Raises ValueError without a base.
    """
    vectors = thinned(task_vectors(experts, base), settings)
    assert base is not None
    return base + settings.scaling * weighted_sum(vectors, settings)


def dare_ties(experts: torch.Tensor, base: torch.Tensor | None, settings: MergeSettings) -> torch.Tensor:
    """TIES with DARE's random choice of entries in place of the largest ones. Raises ValueError without a base."""
    vectors = thinned(task_vectors(experts, base), settings)
    assert base is not None
    return base + settings.scaling * elect_and_merge(vectors, settings)


def thinned(vectors: torch.Tensor, settings: MergeSettings) -> torch.Tensor:
    """
    Each entry becomes 0 with probability 1 - density, else it is divided by the density, so that its mean stays.

    The draws depend on seed, expert and tensor by name, so neither the order of work nor other experts change them.

    Args:
        vectors: [expert, *shape].
    """
    if settings.density >= 1:
        return vectors
    return torch.stack(
        [
            torch.where(_kept(name, vector.shape, settings), vector / settings.density, 0)
            for name, vector in zip(settings.names, vectors, strict=True)
        ]
    )


def _kept(expert: str, shape: torch.Size, settings: MergeSettings) -> torch.Tensor:
    digest = hashlib.sha256(f"{settings.seed}:{expert}:{settings.tensor}:dare".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator) < settings.density
