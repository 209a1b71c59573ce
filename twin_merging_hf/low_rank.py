"""
Deltas that are not in memory as a whole: products that are never multiplied out, dense ones made anew at each look.

Sums, norms and SVDs of LoRA deltas are taken in the space of their factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


# Below this share of the largest singular value a direction is rounding of float32 factors, and no direction of its own.
_ROUNDING = 1e-7
# Sums in double precision go through a dense matrix in pieces of so many entries, so that no second one comes into being.
_PIECE = 1 << 18


@dataclass(frozen=True)
class LowRank:
    """
    The matrix left @ right [m, n], float32.

    left: [m, k]; right: [k, n]. The factors are defined only up to (left G, G^-1 right), so nothing here looks at one of
    them alone.
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def rank(self) -> int:
        """The most that the rank can be: k."""
        return self.left.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix itself, multiplied in `dtype`."""
        return self.left.to(dtype) @ self.right.to(dtype)

    def energy(self) -> float:
        """Squared Frobenius norm, from the Gram matrices [k, k]."""
        left, right = self.left.double(), self.right.double()
        return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        All singular triplets u [m, r], s [r], vh [r, n], float64: QR of both factors, SVD of the small core [k, k].

        r is at most min(m, n, k); directions of rounding size are left out.
        """
        q_left, core_left = torch.linalg.qr(self.left.double())
        q_right, core_right = torch.linalg.qr(self.right.double().T)
        u, s, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        alive = int((s > _ROUNDING * s[0]).sum()) if len(s) else 0
        return q_left @ u[:, :alive], s[:alive], vh[:alive] @ q_right.T


Delta = torch.Tensor | LowRank


class Remade(Sequence[Delta]):
    """
    Deltas of several experts, each made when it is asked for: however many experts, one dense delta is in memory.

    Args:
        count: of experts. make: gives the delta of an expert, by index.
    """

    def __init__(self, count: int, make: Callable[[int], Delta]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


def combine(terms: Sequence[tuple[float, LowRank]], shape: torch.Size) -> LowRank:
    """
    sum_i c_i M_i as one product: the factors side by side, the coefficients in the left ones.

    Args:
        terms: (c_i, M_i); those with a coefficient of 0 take no room.
        shape: [m, n], for the sum of nothing.
    """
    alive = [(c, matrix) for c, matrix in terms if c != 0 and matrix.rank]
    lefts = [torch.zeros(shape[0], 0), *(c * matrix.left for c, matrix in alive)]
    rights = [torch.zeros(0, shape[1]), *(matrix.right for _, matrix in alive)]
    return LowRank(torch.cat(lefts, dim=1), torch.cat(rights, dim=0))


def energy_of(delta: Delta) -> float:
    """Squared Frobenius norm of a delta in either form."""
    if isinstance(delta, LowRank):
        return delta.energy()
    return sum(float(piece.double().pow(2).sum()) for piece in delta.flatten().split(_PIECE))


def left_times(rows: torch.Tensor, matrix: Delta) -> torch.Tensor:
    """rows [r, m] @ matrix [m, n]."""
    return (rows @ matrix.left) @ matrix.right if isinstance(matrix, LowRank) else rows @ matrix


def times_right(matrix: Delta, columns: torch.Tensor) -> torch.Tensor:
    """matrix [m, n] @ columns [n, r]."""
    return matrix.left @ (matrix.right @ columns) if isinstance(matrix, LowRank) else matrix @ columns


def squared_distance(matrix: Delta, up: torch.Tensor, down: torch.Tensor) -> float:
    """Squared Frobenius norm of matrix - up @ down."""
    if isinstance(matrix, LowRank):
        return combine([(1.0, matrix), (-1.0, LowRank(up, down))], matrix.shape).energy()
    rows = max(1, _PIECE // max(1, matrix.shape[1]))
    pairs = zip(matrix.split(rows), up.split(rows), strict=True)
    return sum(float((piece - left @ down).double().pow(2).sum()) for piece, left in pairs)
