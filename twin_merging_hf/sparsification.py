"""Sparse exclusive deltas, for ablations: the largest entries, or random ones scaled up (Twin-Merging, section 4.2)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseEntries:
    """Entries of a flattened delta: indices int32 [count], ascending; values float32 [count]."""

    indices: torch.Tensor
    values: torch.Tensor


def largest_entries(delta: torch.Tensor, ratio: float) -> SparseEntries:
    """Keep the share `ratio` of entries (rounded, at least one) of largest magnitude; among equals the first; no zeros."""
    flat = delta.flatten().float()
    sizes = flat.abs()
    count = min(max(1, round(ratio * flat.numel())), int((sizes > 0).sum()))
    if count == 0:
        return _entries(flat, torch.zeros(0, dtype=torch.long))
    # The count-th largest; entries above it are in, and as many equal ones as there is room for.
    threshold = sizes.kthvalue(flat.numel() - count + 1).values
    above = sizes > threshold
    equal = (sizes == threshold).nonzero().flatten()[: count - int(above.sum())]
    above[equal] = True
    return _entries(flat, above.nonzero().flatten())


def random_entries(delta: torch.Tensor, ratio: float, generator: torch.Generator) -> SparseEntries:
    """Keep each entry with probability `ratio`, divided by `ratio`, so that the expected delta is the delta; no zeros."""
    flat = delta.flatten().float()
    kept = (torch.rand(flat.numel(), generator=generator) < ratio) & (flat != 0)
    entries = _entries(flat, kept.nonzero().flatten())
    return SparseEntries(entries.indices, entries.values / ratio)


def _entries(flat: torch.Tensor, indices: torch.Tensor) -> SparseEntries:
    return SparseEntries(indices.to(torch.int32), flat[indices])
