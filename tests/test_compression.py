"""Low-rank factors: the error is exactly the dropped singular values, and everything is reproducible."""

import pytest
import torch

from twin_merging_hf import compression
from twin_merging_hf.compression import compress, exact_svd, randomised_svd, truncated_svd


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


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(200, 260), (400, 150)])
def test_the_randomised_path_is_as_good_as_the_exact_one(shape, decay):
    matrix, rank = random_matrix(*shape, decay), 8
    assert min(shape) > compression._EXACT_BELOW and 4 * (rank + compression._OVERSAMPLING) <= min(shape)
    factors = compress(matrix, rank, "x")
    values = torch.linalg.svdvals(matrix.double())
    optimum = float(values[rank:].pow(2).sum().sqrt())
    error = float((matrix - factors.up @ factors.down).double().norm())
    assert optimum * (1 - 1e-4) <= error <= optimum * (1 + 1e-3)
    assert factors.energy == pytest.approx(1 - error**2 / float(matrix.double().pow(2).sum()), abs=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (200, 150)])
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


@pytest.mark.parametrize("shape", [(20, 30), (200, 150)])
@pytest.mark.parametrize("rank", [0, 3])
def test_zero_has_factors_too(shape, rank):
    factors = compress(torch.zeros(*shape), rank, "x")
    assert factors.energy == 1.0 and factors.up.shape == (shape[0], rank)
    assert not (factors.up @ factors.down).any()


def test_results_depend_on_the_seed_text_alone():
    matrix = random_matrix(200, 150)
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


@pytest.mark.parametrize("shape", [(20, 30), (200, 150)])
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
