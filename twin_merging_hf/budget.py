"""One budget of bytes for all matrices and experts: the directions that keep the most energy for a byte are stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidate:
    """
    One expert's delta of one matrix.

    squares: squared singular values, largest first (those that may be stored). cost: bytes of one rank direction.
    """

    squares: torch.Tensor
    cost: int


def allocate(candidates: Sequence[Candidate], limit: int) -> list[int]:
    """
    Choose ranks that keep the most energy within `limit` bytes: directions by sigma^2 per byte, largest first.

    Singular values fall, so the best directions of a matrix are always its leading ones, and the greedy choice is the
    best one up to the last direction that does not fit; smaller ones behind it are still tried.

    Returns:
        The rank of each candidate; the bytes of all together never exceed `limit`.
    """
    gains = torch.cat([c.squares / c.cost for c in candidates]) if candidates else torch.zeros(0)
    owners = torch.cat([torch.full((len(c.squares),), i) for i, c in enumerate(candidates)]) if candidates else gains
    order = torch.argsort(gains, descending=True, stable=True)
    order = order[gains[order] > 0]
    ranks, left = [0] * len(candidates), limit
    closed: set[int] = set()
    cheapest = min((c.cost for c in candidates), default=0)
    for owner in owners[order].tolist():
        if left < cheapest:
            break
        if owner in closed:
            continue
        if candidates[owner].cost > left:
            closed.add(owner)  # a later direction of this matrix without this one would be worth less
            continue
        ranks[owner] += 1
        left -= candidates[owner].cost
    return ranks
