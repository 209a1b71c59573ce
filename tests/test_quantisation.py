"""Integer factors: known answers, scales as they are stored, and no step that makes them worse."""

import pytest
import torch

from twin_merging_hf import quantisation
from twin_merging_hf.compression import compress
from twin_merging_hf.quantisation import quantise


def delta_like(m: int, n: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=rng)).Q
    return 0.05 * (u * torch.arange(1, k + 1).float().pow(-0.7)) @ v.T


def quantised(matrix: torch.Tensor, rank: int, bits: int, dtype: torch.dtype = torch.float32):
    factors = compress(matrix, rank, "x")
    return quantise(matrix, factors.up, factors.down, bits, dtype)


def by_hand(found) -> torch.Tensor:
    """The matrix by the definition: (up * scale) @ down, both fractions of a power of two."""
    unit = 2 ** (found.bits - 1)
    return (found.up.double() / unit * found.scale.double()) @ (found.down.double() / unit)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_integers_on_the_grid_come_back_exactly(bits, levels):
    """Known answer: an outer product of integers that reach the largest level is its own quantisation."""
    rng = torch.Generator().manual_seed(1)
    up = torch.randint(-levels, levels + 1, (9, 1), generator=rng).float()
    down = torch.randint(-levels, levels + 1, (1, 6), generator=rng).float()
    up[3], down[0, 2] = levels, -levels
    matrix = 0.125 * up @ down
    found = quantise(matrix, 0.25 * up, 0.5 * down, bits, torch.float32)
    assert torch.equal(found.up.float(), up) and torch.equal(found.down.float(), down)
    assert found.up.dtype == found.down.dtype == torch.int8
    assert float(found.scale) == 0.125 * 4 ** (bits - 1)
    assert torch.equal(by_hand(found).float(), matrix) and torch.equal(found.product(), matrix)


@pytest.mark.parametrize(("bits", "levels", "most"), [(8, 127, 0.01), (4, 7, 0.16)])
@pytest.mark.parametrize("shape", [(40, 60), (61, 33)])
def test_a_round_trip_stays_within_levels_and_near_the_factors(bits, levels, most, shape):
    matrix, rank = delta_like(*shape), 6
    found = quantised(matrix, rank, bits)
    assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, shape[1]) and found.scale.shape == (rank,)
    assert int(found.up.abs().max()) <= levels and int(found.down.abs().max()) <= levels
    factors = compress(matrix, rank, "x")
    truncated = factors.up @ factors.down
    assert 1e-4 < float((by_hand(found) - truncated).norm() / truncated.norm()) < most
    torch.testing.assert_close(found.product().double(), by_hand(found), rtol=0, atol=1e-8)


@pytest.mark.parametrize("bits", [8, 4])
def test_clips_and_refits_lower_the_error(monkeypatch, bits):
    matrix = delta_like(96, 200)
    errors = {}
    for name, clips, refits in (
        ("absmax", {8: (1.0,), 4: (1.0,)}, 0),
        ("clip", quantisation._CLIPS, 0),
        ("all", None, 3),
    ):
        monkeypatch.setattr(quantisation, "_CLIPS", clips or quantisation._CLIPS)
        monkeypatch.setattr(quantisation, "_REFITS", refits)
        errors[name] = float((matrix - by_hand(quantised(matrix, 12, bits))).pow(2).sum())
    factors = compress(matrix, 12, "x")
    least = float((matrix - factors.up @ factors.down).pow(2).sum())
    assert least < errors["all"] < errors["clip"] <= errors["absmax"]
    if bits == 4:
        assert errors["all"] - least < 0.75 * (errors["absmax"] - least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_a_scale_costs_next_to_nothing(bits, dtype):
    matrix = delta_like(40, 60)
    wide, narrow = quantised(matrix, 6, bits), quantised(matrix, 6, bits, dtype)
    assert narrow.scale.dtype == dtype
    error, other = ((matrix - by_hand(found)).norm() for found in (wide, narrow))
    assert float(other) == pytest.approx(float(error), rel=2e-3)


def test_rounding_a_scale_afterwards_would_cost_more():
    matrix = delta_like(40, 60)
    least = float((matrix - by_hand(quantised(matrix, 40, 8))).norm())
    before = float((matrix - by_hand(quantised(matrix, 40, 8, torch.bfloat16))).norm())
    found = quantised(matrix, 40, 8)
    after = by_hand(type(found)(found.up, found.down, found.scale.bfloat16(), 8))
    assert float((matrix - after).norm()) - least > 1.3 * max(before - least, 0.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_directions_of_zeros_stay_zero(bits):
    matrix = torch.zeros(12, 9)
    matrix[:, :2] = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = quantised(matrix, 5, bits)
    assert torch.isfinite(found.scale).all() and torch.isfinite(by_hand(found)).all()
    assert float((matrix - by_hand(found)).norm() / matrix.norm()) < (0.02 if bits == 8 else 0.3)
    nothing = quantised(torch.zeros(12, 9), 3, bits)
    assert not by_hand(nothing).any() and not quantised(torch.zeros(12, 9), 0, bits).up.numel()


def test_values_too_small_for_the_scale_s_type_become_zero_and_not_nan():
    found = quantised(1e-12 * delta_like(12, 9), 3, 8, torch.float16)
    assert not found.scale.any() and not found.product().any()
