"""Factors as small integers: symmetric, one scale for each rank direction, no data (levels 127 and 7)."""

from dataclasses import dataclass

import torch

from .low_rank import Delta, LowRank, left_times, times_right


LEVELS = {8: 127, 4: 7}
# Clipping the few largest entries makes the steps of all others finer, which pays where there are few levels.
_CLIPS = {8: (1.0,), 4: tuple(1 - 0.05 * i for i in range(13))}
_REFITS = 3


@dataclass(frozen=True)
class QuantisedFactors:
    """
    Factors of one matrix [m, n] as int8 values: matrix ~ (up * scale) @ down / 4**(bits - 1).

    up: [m, rank]; down: [rank, n]; both within the levels. scale: [rank], in the type in which it is stored; values are
    fractions of 2**(bits - 1), so that a scale is about as large as the largest entry of its direction.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: torch.Tensor
    bits: int

    def product(self) -> torch.Tensor:
        """The matrix [m, n] that is stored, float32."""
        up, down = self.floats()
        return up @ down

    def floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors [m, rank] and [rank, n] of what is stored, float32."""
        return self.up.float() * self.scale.float() * 4.0 ** (1 - self.bits), self.down.float()


def quantise(
    matrix: Delta, up: torch.Tensor, down: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> QuantisedFactors:
    """
    Quantise factors of a matrix [m, n] to `bits` (8 or 4).

    Each direction's clip is the one of least squared error. Then each factor in turn is refitted by least squares to the
    matrix with the other one as it is quantised, and quantised again; the best of all rounds is returned. Scales are
    rounded to `scale_dtype` before the integers are chosen, so their rounding costs nothing.

    Args:
        up, down: float factors [m, rank] and [rank, n], such as those of `compress`.
    """
    matrix = matrix if isinstance(matrix, LowRank) else matrix.float()
    up, down = up.float(), down.float()
    found: list[tuple[float, QuantisedFactors]] = []
    for refit in range(_REFITS + 1):
        if refit:
            up = _solve(down @ down.T, times_right(matrix, down.T).T).T
        up_q, up_scale = _quantise_rows(up.T, bits, None, torch.float32)
        up = (up_q * up_scale[:, None]).T
        gram, target = up.T @ up, left_times(up.T, matrix)
        if refit:
            down = _solve(gram, target)
        down_q, down_scale = _quantise_rows(down, bits, up_scale, scale_dtype)
        down = down_q * down_scale[:, None]
        # The squared error, but for the matrix's own norm.
        error = float(((gram @ down - 2 * target).double() * down.double()).sum())
        scale = (up_scale * down_scale * 4.0 ** (bits - 1)).to(scale_dtype)
        found.append((error, QuantisedFactors(up_q.T.contiguous(), down_q, scale, bits)))
    return min(found, key=lambda pair: pair[0])[1]


def _quantise_rows(
    values: torch.Tensor, bits: int, partner: torch.Tensor | None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Integers (int8) and scale of each row [rank, k], by the clip of least squared error.

    partner: scales of the other factor's directions; the product of both is what gets stored in `scale_dtype`.
    """
    levels, unit = LEVELS[bits], 4.0 ** (bits - 1)
    partner = torch.full((len(values),), 1 / unit) if partner is None else partner
    largest = values.abs().amax(dim=1) if values.shape[1] else torch.zeros(len(values))
    chosen, scales = torch.zeros_like(values, dtype=torch.int8), torch.zeros(len(values))
    least = torch.full((len(values),), float("inf"))
    for clip in _CLIPS[bits]:
        scale = (largest * (clip / levels) * partner * unit).to(scale_dtype).float() / (partner * unit)
        alive = scale > 0  # zero or NaN: a direction of zeros, or one too small for the type of its scale
        scale = torch.where(alive, scale, 0.0)
        integers = (values / torch.where(alive, scale, 1.0)[:, None]).round().clamp(-levels, levels) * alive[:, None]
        error = (integers * scale[:, None] - values).pow(2).sum(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, scale, scales)
        chosen = torch.where(better[:, None], integers.to(torch.int8), chosen)
    return chosen, scales


def _solve(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squares by the normal equations; directions that vanished get nothing."""
    return (torch.linalg.pinv(gram.double(), rtol=1e-10, hermitian=True) @ target.double()).float()
