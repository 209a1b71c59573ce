"""Sparse deltas: exactly the largest entries, or random ones whose mean is the delta."""

import pytest
import torch

from twin_merging_hf.compression import named_generator
from twin_merging_hf.sparsification import largest_entries, random_entries


def spread(found, size: int) -> torch.Tensor:
    flat = torch.zeros(size)
    flat[found.indices.long()] = found.values
    return flat


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 1.0])
def test_magnitude_keeps_exactly_the_largest_entries(ratio):
    delta = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    found = largest_entries(delta, ratio)
    by_size = sorted(range(91), key=lambda i: -abs(float(delta.flatten()[i])))
    assert found.indices.tolist() == sorted(by_size[: round(ratio * 91)])
    assert torch.equal(found.values, delta.flatten()[found.indices.long()]) and found.indices.dtype == torch.int32


def test_among_equal_magnitudes_the_first_are_kept():
    delta = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.5, -1.0]])
    assert largest_entries(delta, 2 / 6).indices.tolist() == [1, 2]
    assert largest_entries(delta, 3 / 6).indices.tolist() == [1, 2, 3]
    assert largest_entries(delta, 4 / 6).indices.tolist() == [0, 1, 2, 3]


def test_zeros_are_not_stored_and_a_small_share_is_one_entry():
    delta = torch.tensor([0.0, 3.0, 0.0, -1.0])
    assert largest_entries(delta, 1.0).indices.tolist() == [1, 3]
    assert largest_entries(delta, 0.01).indices.tolist() == [1]
    assert largest_entries(torch.zeros(4), 0.5).indices.tolist() == []
    assert random_entries(delta, 1.0, named_generator("x")).indices.tolist() == [1, 3]


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_bernoulli_is_unbiased_over_seeds(ratio):
    delta = torch.randn(20, 15, generator=torch.Generator().manual_seed(1))
    seeds = 1500
    draws = torch.stack([spread(random_entries(delta, ratio, named_generator(f"{s}")), 300) for s in range(seeds)])
    # Each entry's mean has the standard error |d| sqrt((1 - p) / (p n)); 300 entries stay within five of them.
    tolerance = 5 * delta.flatten().abs() * ((1 - ratio) / (ratio * seeds)) ** 0.5
    assert ((draws.mean(dim=0) - delta.flatten()).abs() <= tolerance).all()
    assert float((draws != 0).float().mean()) == pytest.approx(ratio, rel=0.02)
    # Without the rescaling it would be far off.
    assert ((ratio * draws.mean(dim=0) - delta.flatten()).abs() > tolerance).float().mean() > 0.9


def test_bernoulli_scales_what_it_keeps():
    delta = torch.randn(40, generator=torch.Generator().manual_seed(2))
    found = random_entries(delta, 0.25, named_generator("x"))
    assert 0 < len(found.indices) < 40
    torch.testing.assert_close(found.values, 4 * delta[found.indices.long()])
    again = random_entries(delta, 0.25, named_generator("x"))
    assert torch.equal(found.indices, again.indices)
    assert not torch.equal(found.indices, random_entries(delta, 0.25, named_generator("y")).indices)
