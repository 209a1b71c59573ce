"""DARE (Yu et al. 2024, arXiv 2311.03099, section 3): drop entries of task vectors at random and rescale the rest."""

import hashlib

import torch

from .settings import PIECE, MergeSettings, task_vectors
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

    The draws depend on seed, expert and tensor by name, so neither the order of work nor other experts change them; each
    `PIECE` entries have draws of their own, so that a tensor that is merged in pieces gets those of the whole.

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
    count, first = shape.numel(), settings.start // PIECE
    draws = [
        torch.rand(min(PIECE, count - done), generator=_generator(expert, first + number, settings))
        for number, done in enumerate(range(0, count, PIECE))
    ]
    return (torch.cat(draws) if draws else torch.empty(0)).reshape(shape) < settings.density


def _generator(expert: str, piece: int, settings: MergeSettings) -> torch.Generator:
    digest = hashlib.sha256(f"{settings.seed}:{expert}:{settings.tensor}:{piece}:dare".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
