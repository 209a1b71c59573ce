"""Products that are never multiplied out: every answer equals that of the dense matrix."""

import pytest
import torch

from twin_merging_hf.compression import compress, rank_for_energy, spectrum
from twin_merging_hf.exclusive import store_factors
from twin_merging_hf.low_rank import LowRank, combine, energy_of, squared_distance


def product(m=20, n=12, k=5, seed=0) -> LowRank:
    noise = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, k, generator=noise), torch.randn(k, n, generator=noise))


@pytest.mark.parametrize("k", [0, 1, 5, 30])
def test_svd_energy_and_spectrum_are_those_of_the_dense_matrix(k):
    matrix = product(k=k)
    dense = matrix.dense(torch.float64)
    u, s, vh = matrix.svd()
    torch.testing.assert_close((u * s) @ vh, dense, rtol=0, atol=1e-9)
    torch.testing.assert_close(s, torch.linalg.svdvals(dense)[: len(s)], rtol=0, atol=1e-9)
    assert len(s) == min(k, 12)
    assert energy_of(matrix) == pytest.approx(energy_of(dense), rel=1e-9, abs=1e-9)
    found = spectrum(matrix, "x")
    assert found.complete and found.total == pytest.approx(float(found.squares.sum()), rel=1e-9, abs=1e-9)


def test_the_same_matrix_in_another_basis_of_its_factors_has_the_same_truncation():
    matrix, change = product(), torch.randn(5, 5, dtype=torch.float64)
    other = LowRank((matrix.left.double() @ change).float(), (torch.linalg.inv(change) @ matrix.right.double()).float())
    one, two = compress(matrix, 3, "x"), compress(other, 3, "x")
    torch.testing.assert_close(one.up @ one.down, two.up @ two.down, rtol=1e-4, atol=1e-4)
    assert one.kept == pytest.approx(two.kept, rel=1e-5)


def test_a_sum_takes_the_factors_side_by_side_and_leaves_out_what_counts_nothing():
    one, two = product(seed=1), product(seed=2, k=3)
    total = combine([(0.5, one), (-2.0, two), (0.0, one)], one.shape)
    torch.testing.assert_close(total.dense(), 0.5 * one.dense() - 2 * two.dense(), rtol=0, atol=1e-5)
    assert total.rank == 8
    assert energy_of(combine([], one.shape)) == 0 and combine([], one.shape).dense().shape == one.shape


def test_directions_of_rounding_are_no_directions():
    matrix = product()
    twice = combine([(1.0, matrix), (1.0, matrix)], matrix.shape)
    assert twice.rank == 10 and len(twice.svd()[1]) == 5 and rank_for_energy(twice, 1.0, "x") == 5


@pytest.mark.parametrize("rank", [2, 5, 9])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_what_is_stored_of_a_product_is_what_is_stored_of_the_matrix(rank, storage):
    matrix = product()
    dense = matrix.dense()
    one = store_factors("w", [matrix], [rank], ["x"], storage, torch.float32)
    two = store_factors("w", [dense], [min(rank, 5)], ["x"], storage, torch.float32)
    assert one.sizes == two.sizes == [min(rank, 5)]
    assert one.energies == pytest.approx(two.energies, rel=1e-5) and one.kept == pytest.approx(two.kept, rel=1e-5)
    assert one.lost == pytest.approx(two.lost, rel=2e-2, abs=1e-4 * one.energies[0])


def test_distance_from_what_is_stored():
    matrix, up, down = product(), torch.randn(20, 2), torch.randn(2, 12)
    expected = float((matrix.dense().double() - up.double() @ down.double()).pow(2).sum())
    assert squared_distance(matrix, up, down) == pytest.approx(expected, rel=1e-5)
    assert squared_distance(matrix.dense(), up, down) == pytest.approx(expected, rel=1e-4)
