"""Merge methods: what they are, said once more in plain arithmetic."""

import pytest
import torch

from twin_merging_hf.merging import MERGE_METHODS, linear, task_arithmetic
from twin_merging_hf.merging.methods import MergeSettings
from twin_merging_hf.recipe import MERGE_METHODS as NAMES


@pytest.fixture
def experts() -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def base() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_recipe_names_every_method():
    assert set(NAMES) == set(MERGE_METHODS)


def test_linear_is_the_weighted_mean(experts):
    a, b, c = experts
    torch.testing.assert_close(linear(experts, None, MergeSettings((1, 1, 1))), (a + b + c) / 3)
    torch.testing.assert_close(linear(experts, None, MergeSettings((1, 2, 5))), (a + 2 * b + 5 * c) / 8)
    plain = linear(experts, None, MergeSettings((1, 2, -5), normalize=False))
    torch.testing.assert_close(plain, a + 2 * b - 5 * c)


def test_normalised_weights_have_no_scale(experts):
    one, two = (linear(experts, None, MergeSettings(weights)) for weights in ((1, 2, 5), (10, 20, 50)))
    torch.testing.assert_close(one, two)


def test_linear_ignores_the_base(experts, base):
    settings = MergeSettings((1, 2, 3))
    assert torch.equal(linear(experts, base, settings), linear(experts, None, settings))


def test_task_arithmetic_moves_from_the_base(experts, base):
    a, b, c = experts
    merged = task_arithmetic(experts, base, MergeSettings((1, 2, -1), scaling=0.3))
    torch.testing.assert_close(merged, base + 0.3 * ((a - base) + 2 * (b - base) - (c - base)))
    assert torch.equal(task_arithmetic(experts, base, MergeSettings((1, 1, 1), scaling=0.0)), base)


def test_task_arithmetic_with_shares_that_sum_to_one_is_the_mean(experts, base):
    merged = task_arithmetic(experts, base, MergeSettings((1, 1, 1), scaling=1 / 3))
    torch.testing.assert_close(merged, experts.mean(dim=0))


def test_task_arithmetic_needs_a_base(experts):
    with pytest.raises(ValueError, match="base"):
        task_arithmetic(experts, None, MergeSettings((1, 1, 1)))


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_equal_experts_merge_to_themselves(name, base):
    experts = torch.stack([base, base])
    torch.testing.assert_close(MERGE_METHODS[name](experts, base, MergeSettings((1, 3))), base)
