"""Exclusive deltas as low-rank factors: delta ~ up @ down, by truncated SVD (Twin-Merging, section 4.2)."""

import hashlib
from dataclasses import dataclass

import torch

from .low_rank import Delta, LowRank, energy_of


# Randomised SVD pays where the rank is small beside the matrix; below this size the exact one costs nothing.
_EXACT_BELOW = 128
_OVERSAMPLING = 16
# Blocks of the Krylov space: at least, so that gains can be compared, and at most before the SVD is done exactly.
_LEAST_BLOCKS = 3
_MOST_BLOCKS = 24
# What further blocks may still add to the captured energy, as a share of what is left; half of it is the error's excess.
_UNSETTLED = 5e-4
_ROUNDING = 1e-7
# All singular values come from the Gram matrix up to this size of its side; the leading ones of larger matrices are sketched.
_GRAM_BELOW = 1024
_GRAM_ROWS = 4096
FIRST_CAP = 64


@dataclass(frozen=True)
class Factors:
    """
    Low-rank factors of one matrix [m, n].

    up: [m, rank]; down: [rank, n]; singular values are split evenly over both, so both survive narrow types.
    kept, total: squared Frobenius norms of the product and of the matrix.
    """

    up: torch.Tensor
    down: torch.Tensor
    kept: float
    total: float

    @property
    def energy(self) -> float:
        """Share of the matrix's squared Frobenius norm that the factors keep."""
        return self.kept / self.total if self.total > 0 else 1.0


def compress(matrix: Delta, rank: int, seed_text: str) -> Factors:
    """
    Truncate the SVD of a matrix [m, n] to `rank`; a product has no more directions than its factors give it.

    Args:
        seed_text: names the matrix; the randomised path draws its sketch from it, so that results do not depend on
            the order of work.
    """
    total = energy_of(matrix)
    if isinstance(matrix, LowRank):
        u, s, vh = (part.float() for part in matrix.svd())
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, vh = truncated_svd(matrix.float(), rank, seed_text)
    root = s.clamp(min=0).sqrt()
    return Factors((u * root).contiguous(), (root[:, None] * vh).contiguous(), float(s.double().pow(2).sum()), total)


def truncated_svd(matrix: torch.Tensor, rank: int, seed_text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets: u [m, rank], s [rank], vh [rank, n]; exact where that is cheap, else randomised."""
    smallest = min(matrix.shape)
    rank = min(rank, smallest)
    if smallest <= _EXACT_BELOW or 2 * _LEAST_BLOCKS * (rank + _OVERSAMPLING) > smallest:
        u, s, vh = exact_svd(matrix)
        return u[:, :rank], s[:rank], vh[:rank]
    return randomised_svd(matrix, rank, seed_text)


def exact_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD; where LAPACK fails to converge in single precision, in double."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u.float(), s.float(), vh.float()


def named_generator(seed_text: str) -> torch.Generator:
    """Random numbers that depend on a name alone, not on the order of work."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:7], "big"))


def randomised_svd(matrix: torch.Tensor, rank: int, seed_text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Randomised block Krylov iteration (Musco and Musco 2015): power steps whose blocks are all kept.

    Blocks are added until further ones can add next to nothing to the captured energy, measured by what is left; where
    they do not get there (spectra of many nearly equal values), the SVD is done exactly.
    """
    total = energy_of(matrix)
    sketch = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=named_generator(seed_text))
    basis = torch.linalg.qr(matrix @ sketch).Q
    rows = basis.T @ matrix
    captured: list[float] = []
    while True:
        values, vectors = _squared_values(rows)
        captured.append(float(values[:rank].sum()))
        if len(captured) >= _LEAST_BLOCKS and _settled(captured, total):
            s = values[:rank].sqrt()
            s = torch.where(s > _ROUNDING * s[0], s, 0)  # smaller ones are rounding, and have no direction
            kept = (vectors[:, :rank].T @ rows.double()) / torch.where(s > 0, s, torch.inf)[:, None]
            return basis @ vectors[:, :rank].float(), s.float(), kept.float()
        if len(captured) == _MOST_BLOCKS or basis.shape[1] + sketch.shape[1] > min(matrix.shape) // 2:
            break
        block = matrix @ torch.linalg.qr(rows[-sketch.shape[1] :].T).Q
        for _ in range(2):  # twice is enough, also for what has converged, of which the first time leaves only rounding
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, rows = torch.cat([basis, block], dim=1), torch.cat([rows, block.T @ matrix])
    u, s, vh = exact_svd(matrix)
    return u[:, :rank], s[:rank], vh[:rank]


def _squared_values(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values of a few rows [k, n], largest first, and left singular vectors [k, k], float64."""
    wide = rows.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _settled(captured: list[float], total: float) -> bool:
    """Whether gains that shrink geometrically, as those of Krylov blocks do, have next to nothing to come."""
    before, gain = captured[-2] - captured[-3], captured[-1] - captured[-2]
    if gain <= _ROUNDING * total:
        return True
    shrink = min(gain / before, 0.99) if before > 0 else 0.99
    return gain * shrink / (1 - shrink) <= _UNSETTLED * (total - captured[-1])


@dataclass(frozen=True)
class Spectrum:
    """
    Squared singular values of one matrix [m, n], float64, largest first.

    complete: false where only the leading ones are known.
    """

    squares: torch.Tensor
    total: float
    complete: bool


def spectrum(matrix: Delta, seed_text: str, cap: int = FIRST_CAP) -> Spectrum:
    """Squared singular values: all of them where the smaller side is moderate, else at least the `cap` leading ones."""
    if isinstance(matrix, LowRank):
        return Spectrum(matrix.svd()[1].pow(2), matrix.energy(), True)
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    smallest = matrix.shape[1]
    if smallest <= _GRAM_BELOW:
        gram = torch.zeros(smallest, smallest, dtype=torch.float64)
        for rows in matrix.split(_GRAM_ROWS):
            gram += rows.double().T @ rows.double()
        return Spectrum(torch.linalg.eigvalsh(gram).flip(0).clamp(min=0), float(gram.trace()), True)
    total = energy_of(matrix)
    values = truncated_svd(matrix.float(), cap, seed_text)[1]
    return Spectrum(values.double().pow(2), total, len(values) == smallest)


def rank_for_energy(matrix: Delta, share: float, seed_text: str) -> int:
    """Smallest rank whose truncation keeps `share` of the squared Frobenius norm; 0 for a matrix of zeros."""
    cap = FIRST_CAP
    while True:
        found = spectrum(matrix, seed_text, cap)
        if found.total == 0:
            return 0
        # Singular values of rounding size are no directions of their own, also where all energy is asked for.
        kept = torch.cumsum(found.squares, 0) >= share * found.total * (1 - 1e-9)
        if bool(kept.any()):
            return int(kept.int().argmax()) + 1
        if found.complete:
            return len(found.squares)
        cap *= 4
