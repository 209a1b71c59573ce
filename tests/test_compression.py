"""Low-rank factors: the error is exactly the dropped singular values, and everything is reproducible."""

import pytest
import torch

from twin_merging_hf import compression
from twin_merging_hf.compression import (
    compress,
    exact_svd,
    randomised_svd,
    rank_for_energy,
    spectrum,
    truncated_svd,
)


def random_matrix(m: int, n: int, decay: float = 0.0, seed: int = 0) -> torch.Tensor:
    """[m, n] with singular values falling as (i + 1) ** -decay."""
    rng = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=rng)).Q
    return (u * torch.arange(1, k + 1).float().pow(-decay)) @ v.T


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 7), (1, 9)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_is_the_dropped_singular_values(shape, rank):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    factors = compress(matrix, rank, "x")
    values = torch.linalg.svdvals(matrix.double())
    kept = min(rank, *shape)
    assert factors.up.shape == (shape[0], kept) and factors.down.shape == (kept, shape[1])
    error = (matrix - factors.up @ factors.down).double().pow(2).sum()
    assert float(error) == pytest.approx(float(values[rank:].pow(2).sum()), rel=1e-4, abs=1e-8)
    assert factors.energy == pytest.approx(float(values[:rank].pow(2).sum() / values.pow(2).sum()), rel=1e-5)


def is_randomised(shape: tuple, rank: int) -> bool:
    enough = 2 * compression._LEAST_BLOCKS * (rank + compression._OVERSAMPLING) <= min(shape)
    return enough and min(shape) > compression._EXACT_BELOW


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(300, 360), (500, 250)])
def test_the_randomised_path_is_as_good_as_the_exact_one(shape, decay):
    matrix, rank = random_matrix(*shape, decay), 8
    assert is_randomised(shape, rank)
    factors = compress(matrix, rank, "x")
    values = torch.linalg.svdvals(matrix.double())
    optimum = float(values[rank:].pow(2).sum().sqrt())
    error = float((matrix - factors.up @ factors.down).double().norm())
    assert optimum * (1 - 1e-4) <= error <= optimum * (1 + 1e-3)
    assert factors.energy == pytest.approx(1 - error**2 / float(matrix.double().pow(2).sum()), abs=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (200, 110)])
def test_full_rank_gives_the_matrix_back(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    factors = compress(matrix, 1000, "x")
    assert factors.up.shape[1] == min(shape)
    torch.testing.assert_close(factors.up @ factors.down, matrix, rtol=0, atol=2e-5)
    assert factors.energy == pytest.approx(1, abs=1e-5)


def test_a_matrix_of_low_rank_loses_nothing():
    matrix = torch.randn(300, 4) @ torch.randn(4, 200)
    factors = compress(matrix, 4, "x")
    torch.testing.assert_close(factors.up @ factors.down, matrix, rtol=0, atol=1e-4)


def test_both_factors_carry_half_of_the_scale():
    factors = compress(1e-4 * random_matrix(20, 30), 5, "x")
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))


@pytest.mark.parametrize("shape", [(20, 30), (200, 110)])
@pytest.mark.parametrize("rank", [0, 3])
def test_zero_has_factors_too(shape, rank):
    factors = compress(torch.zeros(*shape), rank, "x")
    assert factors.energy == 1.0 and factors.up.shape == (shape[0], rank)
    assert not (factors.up @ factors.down).any()


def test_results_depend_on_the_seed_text_alone():
    matrix = random_matrix(300, 250)
    torch.manual_seed(1)
    first = compress(matrix, 4, "0:a:x")
    torch.manual_seed(2)
    again = compress(matrix, 4, "0:a:x")
    assert torch.equal(first.up, again.up) and torch.equal(first.down, again.down)
    other = compress(matrix, 4, "0:b:x")
    assert not torch.equal(first.up, other.up)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compress(random_matrix(200, 150), 4, "x")
    assert torch.equal(torch.rand(3), expected)


def test_small_or_nearly_full_ones_are_done_exactly(monkeypatch):
    monkeypatch.setattr(compression, "randomised_svd", lambda *args: pytest.fail("randomised"))
    truncated_svd(random_matrix(128, 500), 4, "x")
    truncated_svd(random_matrix(200, 200), 100, "x")


def test_narrow_matrices_are_compressed_in_float32():
    assert compress(random_matrix(9, 9).bfloat16(), 2, "x").up.dtype == torch.float32


@pytest.mark.parametrize("shape", [(20, 30), (200, 110)])
def test_where_lapack_fails_in_single_precision_double_helps(monkeypatch, shape):
    matrix, real, failed = random_matrix(*shape, decay=1.0), torch.linalg.svd, []
    expected = compress(matrix, 3, "x")

    def fails_in_single(a, full_matrices=True):
        if a.dtype == torch.float32:
            failed.append(a.shape)
            raise torch.linalg.LinAlgError("did not converge")
        return real(a, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_single)
    factors = compress(matrix, 3, "x")
    assert failed and factors.up.dtype == torch.float32
    torch.testing.assert_close(factors.up @ factors.down, expected.up @ expected.down, rtol=0, atol=1e-4)


def test_leading_triplets_are_ordered_and_orthonormal():
    for u, s, vh in (
        randomised_svd(random_matrix(200, 150, 0.5), 6, "x"),
        truncated_svd(random_matrix(20, 30, 0.5), 6, "x"),
        exact_svd(random_matrix(20, 30, 0.5)),
    ):
        assert torch.equal(s, s.sort(descending=True).values)
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]), rtol=0, atol=1e-4)
        torch.testing.assert_close(vh @ vh.T, torch.eye(vh.shape[0]), rtol=0, atol=1e-4)


# ---- how near the randomised path comes to the optimum ---------------------------------------------------------------


def spectrum_of(kind: str, k: int) -> torch.Tensor:
    """Singular values of one kind, largest first."""
    i = torch.arange(k).double()
    return {
        "flat": torch.ones(k).double(),
        "decaying": (i + 1) ** -0.7,
        "steep": 0.8**i,
        "rank 5": (i < 5).double(),
        "rank 5 above noise": torch.where(i < 5, 1.0, 1e-3),
        "clusters": torch.where(i < 4, 3.0, torch.where(i < 14, 1.0, 0.97 - i / 1000)),
    }[kind].double()


SPECTRA = ["flat", "decaying", "steep", "rank 5", "rank 5 above noise", "clusters"]


def matrix_of(values: torch.Tensor, m: int, n: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, generator=rng, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=rng, dtype=torch.float64)).Q
    return ((u * values) @ v.T).float()


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("rank", [3, 8, 16])
@pytest.mark.parametrize("shape", [(340, 400), (600, 330)])
def test_the_randomised_error_is_within_a_thousandth_of_the_dropped_values(kind, rank, shape):
    values = spectrum_of(kind, min(shape))
    matrix = matrix_of(values, *shape)
    assert is_randomised(shape, rank)
    u, s, vh = randomised_svd(matrix, rank, "x")
    error = float((matrix.double() - (u * s).double() @ vh.double()).norm())
    optimum = float(values[rank:].pow(2).sum().sqrt())
    rounding = 3e-6 * float(values.norm())
    assert optimum * (1 - 1e-3) - rounding <= error <= optimum * (1 + 1e-3) + rounding


def test_gaussian_noise_which_has_no_leading_directions_is_done_well_too():
    matrix = torch.randn(500, 400, generator=torch.Generator().manual_seed(4))
    u, s, vh = randomised_svd(matrix, 8, "x")
    optimum = float(torch.linalg.svdvals(matrix.double())[8:].pow(2).sum().sqrt())
    assert float((matrix - (u * s) @ vh).double().norm()) <= optimum * (1 + 1e-3)


def test_too_few_steps_would_not_be_enough(monkeypatch):
    """What the test above would catch: a sketch that stops at once."""
    monkeypatch.setattr(compression, "_settled", lambda *args: True)
    monkeypatch.setattr(compression, "_LEAST_BLOCKS", 2)
    matrix = torch.randn(500, 400, generator=torch.Generator().manual_seed(4))
    u, s, vh = randomised_svd(matrix, 8, "x")
    optimum = float(torch.linalg.svdvals(matrix.double())[8:].pow(2).sum().sqrt())
    assert float((matrix - (u * s) @ vh).double().norm()) > optimum * (1 + 1e-3)


# ---- spectra and energy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (300, 40), (7, 5000)])
def test_a_spectrum_is_that_of_lapack(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    found = spectrum(matrix, "x")
    torch.testing.assert_close(found.squares, torch.linalg.svdvals(matrix.double()).pow(2), rtol=1e-9, atol=1e-9)
    assert found.complete and found.total == pytest.approx(float(matrix.double().pow(2).sum()), rel=1e-12)


def test_large_matrices_give_their_leading_values_only(monkeypatch):
    monkeypatch.setattr(compression, "_GRAM_BELOW", 50)
    matrix = random_matrix(200, 300, 0.5)
    found = spectrum(matrix, "x", cap=6)
    expected = torch.linalg.svdvals(matrix.double()).pow(2)
    assert not found.complete and len(found.squares) == 6
    torch.testing.assert_close(found.squares, expected[:6], rtol=1e-3, atol=0)
    assert found.total == pytest.approx(float(expected.sum()), rel=1e-5)
    assert spectrum(matrix, "x", cap=500).complete


@pytest.mark.parametrize("gram", [1024, 10])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_energy_is_met_by_the_smallest_rank(monkeypatch, share, decay, gram):
    monkeypatch.setattr(compression, "_GRAM_BELOW", gram)
    monkeypatch.setattr(compression, "FIRST_CAP", 4)
    matrix = random_matrix(40, 60, decay)
    squares = torch.linalg.svdvals(matrix.double()).pow(2)
    rank = rank_for_energy(matrix, share, "x")
    kept = squares.cumsum(0) / squares.sum()
    assert kept[rank - 1] >= share - 1e-6
    assert rank == 1 or kept[rank - 2] < share + 1e-6
    assert compress(matrix, rank, "x").energy >= share - 1e-5


def test_all_energy_is_the_true_rank_and_none_is_zero():
    matrix = torch.randn(60, 4, dtype=torch.float64) @ torch.randn(4, 50, dtype=torch.float64)
    assert rank_for_energy(matrix.float(), 1.0, "x") == 4
    assert rank_for_energy(torch.randn(9, 7), 1.0, "x") == 7
    assert rank_for_energy(torch.zeros(9, 7), 0.5, "x") == 0
    assert rank_for_energy(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 4 / 6, "x") == 1
    assert rank_for_energy(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 4.01 / 6, "x") == 2
