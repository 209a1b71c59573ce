"""Exclusive deltas as low-rank factors: delta ~ up @ down, by truncated SVD (Twin-Merging, section 4.2)."""

import hashlib
from dataclasses import dataclass

import torch


# Randomised SVD pays where the rank is small beside the matrix; below this size the exact one costs nothing.
_EXACT_BELOW = 128
_OVERSAMPLING = 16
_POWER_STEPS = 4
_MAX_POWER_STEPS = 12
_GAIN = 1e-5


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


def compress(matrix: torch.Tensor, rank: int, seed_text: str) -> Factors:
    """
    Truncate the SVD of a matrix [m, n] to `rank`.

    Args:
        seed_text: names the matrix; the randomised path draws its sketch from it, so that results do not depend on
            the order of work.
    """
    matrix = matrix.float()
    total = float(matrix.double().pow(2).sum())
    u, s, vh = truncated_svd(matrix, rank, seed_text)
    root = s.clamp(min=0).sqrt()
    return Factors((u * root).contiguous(), (root[:, None] * vh).contiguous(), float(s.double().pow(2).sum()), total)


def truncated_svd(matrix: torch.Tensor, rank: int, seed_text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets: u [m, rank], s [rank], vh [rank, n]; exact where that is cheap, else randomised."""
    smallest = min(matrix.shape)
    rank = min(rank, smallest)
    if smallest <= _EXACT_BELOW or 4 * (rank + _OVERSAMPLING) > smallest:
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


def randomised_svd(matrix: torch.Tensor, rank: int, seed_text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Randomised range finder with QR power steps (Halko, Martinsson, Tropp 2011).

    Steps go on until another one no longer adds to the captured energy, which bounds the error above the optimum.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:7], "big"))
    sketch = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=generator)
    basis = torch.linalg.qr(matrix @ sketch).Q
    captured = 0.0
    for step in range(_MAX_POWER_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        if step + 1 >= _POWER_STEPS:
            energy = float((basis.T @ matrix).double().pow(2).sum())
            if energy - captured <= _GAIN * energy:
                break
            captured = energy
    u, s, vh = exact_svd(basis.T @ matrix)
    return basis @ u[:, :rank], s[:rank], vh[:rank]
