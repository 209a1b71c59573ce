"""
The k-th largest magnitude of a task vector that is never in memory as a whole.

The bits of non-negative float32 numbers, read as integers, have the order of the numbers. So two passes with a histogram
of 2**16 bins find the exact value: the first by the upper half of the bits, the second by the lower half.
"""

from collections.abc import Callable, Iterable

import torch


_HALF = 16
_BINS = 1 << _HALF


def magnitudes(values: torch.Tensor) -> torch.Tensor:
    """|values| as float32, the type in which magnitudes are compared everywhere."""
    return values.to(torch.float32).abs()


def kth_largest_magnitude(tensors: Callable[[], Iterable[torch.Tensor]], k: int) -> float:
    """
    The k-th largest of |v| over all entries of some tensors, exactly, in float32.

    Args:
        tensors: gives the tensors; called twice, so that one at a time is in memory.
        k: 1 is the largest.

    Raises:
        ValueError: there are fewer than k entries, or k is below 1.
    """
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for tensor in tensors():
        upper += torch.bincount(_bits(tensor) >> _HALF, minlength=_BINS)
    if not 1 <= k <= int(upper.sum()):
        raise ValueError(f"there is no {k}-th largest of {int(upper.sum())} values")
    top, k = _bin_from_above(upper, k)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for tensor in tensors():
        bits = _bits(tensor)
        lower += torch.bincount(bits[bits >> _HALF == top] & (_BINS - 1), minlength=_BINS)
    rest, _ = _bin_from_above(lower, k)
    return float(torch.tensor(top << _HALF | rest, dtype=torch.int32).view(torch.float32))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return magnitudes(tensor).contiguous().view(torch.int32).flatten()


def _bin_from_above(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th entry counted from the highest bin, and which of that bin's entries it is (from 1)."""
    counted = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(counted, k))
    before = int(counted[position - 1]) if position else 0
    return len(histogram) - 1 - position, k - before


def trim_thresholds(
    vectors: list[Callable[[], Iterable[torch.Tensor]]], density: float, size: int
) -> tuple[float, ...]:
    """
    For each expert, the smallest magnitude that is among the top `density` share of its whole task vector.

    That is the k-th largest with k = floor(density * size), at least 1. Entries that equal it are all kept, so more than
    k stay where there are ties.

    Args:
        vectors: for each expert, what gives the tensors of its task vector.
        size: entries of a task vector.
    """
    # The product of a decimal such as 0.29 with 100 may lie a hair below the integer that is meant.
    k = max(1, min(size, int(density * size + 1e-6)))
    return tuple(kth_largest_magnitude(vector, k) for vector in vectors)
