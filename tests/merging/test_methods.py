"""Merge methods: what they are, said once more in plain arithmetic, one number at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twin_merging_hf.merging import (
    DEFAULTS,
    MERGE_METHODS,
    MergeSettings,
    dare_linear,
    dare_ties,
    linear,
    settings_for,
    task_arithmetic,
    ties,
    tsv_m,
)
from twin_merging_hf.recipe import MERGE_METHODS as NAMES


SUM = MergeSettings((1, 1, 1), normalize=False)
KEEP_ALL = (0.0, 0.0, 0.0)


@pytest.fixture
def experts() -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def base() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def given(method: str, weights: tuple[float, ...] = (1, 1, 1), **coefficients) -> MergeSettings:
    """A method's settings for experts a, b, c, with what the methods need besides."""
    settings = settings_for(DEFAULTS[method], weights, **coefficients)
    return replace(settings, names=("a", "b", "c")[: len(weights)], tensor="w", thresholds=(0.0,) * len(weights))


def test_the_recipe_names_every_method():
    assert set(NAMES) == {*MERGE_METHODS, "least_squares"} == set(DEFAULTS)


def test_defaults():
    found = {name: (d.scaling, d.density, d.normalize) for name, d in DEFAULTS.items()}
    assert found == {
        "linear": (None, None, True),
        "task_arithmetic": (0.3, None, False),
        "ties": (1.0, 0.2, True),
        "dare_linear": (0.3, 0.9, False),
        "dare_ties": (1.0, 0.9, True),
        "tsv_m": (1.0, None, None),
        "least_squares": (None, None, None),
    }


# ---- sums -------------------------------------------------------------------------------------------------------


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
    merged = task_arithmetic(experts, base, given("task_arithmetic", (1, 2, -1)))
    torch.testing.assert_close(merged, base + 0.3 * ((a - base) + 2 * (b - base) - (c - base)))
    assert torch.equal(task_arithmetic(experts, base, given("task_arithmetic", scaling=0.0)), base)
    normalised = task_arithmetic(experts, base, given("task_arithmetic", (1, 2, 5), scaling=1.0, normalize=True))
    torch.testing.assert_close(normalised, (a + 2 * b + 5 * c) / 8)


def test_task_arithmetic_with_shares_that_sum_to_one_is_the_mean(experts, base):
    merged = task_arithmetic(experts, base, given("task_arithmetic", scaling=1 / 3))
    torch.testing.assert_close(merged, experts.mean(dim=0))


@pytest.mark.parametrize("name", [name for name, default in DEFAULTS.items() if default.needs_base])
def test_methods_of_task_vectors_need_a_base(name, experts):
    with pytest.raises(ValueError, match="base"):
        MERGE_METHODS[name](experts, None, given(name))


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_equal_experts_merge_to_themselves(name, base):
    experts = torch.stack([base, base])
    torch.testing.assert_close(MERGE_METHODS[name](experts, base, given(name, (1, 3))), base)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_the_order_of_the_experts_changes_nothing(name, experts, base):
    settings = replace(given(name, (1, 2, 3)), thresholds=(0.1, 0.2, 0.3))
    turned = replace(settings, weights=(3, 1, 2), names=("c", "a", "b"), thresholds=(0.3, 0.1, 0.2))
    before = MERGE_METHODS[name](experts, base, settings)
    torch.testing.assert_close(MERGE_METHODS[name](experts[[2, 0, 1]], base, turned), before)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_merging_changes_no_input(name, experts, base):
    copies = experts.clone(), base.clone()
    MERGE_METHODS[name](experts, base, replace(given(name), thresholds=(0.5, 0.5, 0.5), density=0.5))
    assert torch.equal(experts, copies[0]) and torch.equal(base, copies[1])


@pytest.mark.parametrize("name", [name for name, default in DEFAULTS.items() if default.needs_base])
def test_lambda_scales_what_is_added_to_the_base(name, experts, base):
    one, two = (MERGE_METHODS[name](experts, base, given(name, scaling=scaling)) for scaling in (1.0, 0.25))
    torch.testing.assert_close(two - base, 0.25 * (one - base))


# ---- TIES -------------------------------------------------------------------------------------------------------


def naive_ties(vectors, weights, thresholds, normalize=True) -> list[float]:
    """TIES of flat task vectors, entry by entry in Python."""
    merged = []
    for entries in zip(*vectors, strict=True):
        kept = [v if abs(v) >= limit else 0.0 for v, limit in zip(entries, thresholds, strict=True)]
        total = sum(w * v for w, v in zip(weights, kept, strict=True))
        sign = (total > 0) - (total < 0)
        side = [(w, v) for w, v in zip(weights, kept, strict=True) if w * v * sign > 0]
        value = sum(w * v for w, v in side)
        merged.append(value / sum(abs(w) for w, _ in side) if normalize and side else value)
    return merged


def merge_vectors(method, vectors, **settings) -> torch.Tensor:
    """Merge task vectors over a base of 0."""
    experts = torch.tensor(vectors, dtype=torch.float64)
    fields = {"weights": (1.0,) * len(vectors), "thresholds": (0.0,) * len(vectors), **settings}
    return method(experts, torch.zeros_like(experts[0]), MergeSettings(**fields))


def test_ties_by_hand():
    #          agree  conflict  cancel  one zero  all zero  trimmed   at the threshold
    vectors = [
        [1.0, 5.0, 2.0, 0.0, 0.0, 0.25, 0.5],
        [3.0, -2.0, -2.0, -4.0, 0.0, 0.25, 0.25],
        [2.0, -1.0, 0.0, -2.0, 0.0, -0.75, 0.0],
    ]
    merged = merge_vectors(ties, vectors, thresholds=(0.5, 0.5, 0.5))
    assert merged.tolist() == [2.0, 5.0, 0.0, -3.0, 0.0, -0.75, 0.5]


def test_entries_equal_to_the_threshold_stay_and_smaller_ones_go():
    just_below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    merged = merge_vectors(ties, [[0.5, -0.5, just_below]], thresholds=(0.5,))
    assert merged.tolist() == [0.5, -0.5, 0.0]


def test_ties_elects_by_mass_and_not_by_count():
    assert merge_vectors(ties, [[5.0], [-1.0], [-1.0]]).tolist() == [5.0]
    assert merge_vectors(ties, [[1.5], [-1.0], [-1.0]]).tolist() == [-1.0]


def test_weights_count_in_election_and_mean():
    assert merge_vectors(ties, [[1.0], [-2.0], [4.0]], weights=(5.0, 1.0, 0.5)).tolist() == [pytest.approx(7 / 5.5)]
    assert merge_vectors(ties, [[1.0], [-2.0]], weights=(1.0, 1.0)).tolist() == [-2.0]
    assert merge_vectors(ties, [[1.0], [-2.0]], weights=(3.0, 1.0)).tolist() == [1.0]
    assert merge_vectors(ties, [[1.0], [2.0]], weights=(1.0, 0.0)).tolist() == [1.0]
    assert merge_vectors(ties, [[1.0], [2.0]], weights=(1.0, -2.0)).tolist() == [-2.0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 0.5, 0.0), (1.0, -0.5, 2.0, 0.25)])
def test_ties_equals_a_plain_recomputation(weights, normalize):
    # Coarse values, so that zeros, equal magnitudes and exact cancellation all occur.
    rng = np.random.RandomState(0)
    vectors = (rng.randint(-6, 7, size=(4, 500)) / 4).tolist()
    limits = (0.5, 1.0, 0.0, 1.25)
    merged = merge_vectors(ties, vectors, weights=weights, thresholds=limits, normalize=normalize)
    expected = torch.tensor(naive_ties(vectors, weights, limits, normalize), dtype=torch.float64)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert (expected == 0).sum() > 5


def test_ties_is_not_the_mean_where_signs_conflict():
    agreeing = [[1.0, -2.0], [3.0, -4.0]]
    conflicting = [[1.0, -2.0], [3.0, 4.0]]
    settings = {"weights": (1.0, 1.0)}
    mean = merge_vectors(linear, agreeing, **settings)
    assert torch.equal(merge_vectors(ties, agreeing, **settings), mean)
    assert not torch.equal(merge_vectors(ties, conflicting, **settings), merge_vectors(linear, conflicting, **settings))


def test_ties_without_thresholds_is_refused(experts, base):
    with pytest.raises(ValueError, match="thresholds"):
        ties(experts, base, SUM)


# ---- DARE -------------------------------------------------------------------------------------------------------


def thinned(seed=0, name="a", tensor="w", density=0.25, size=4000) -> torch.Tensor:
    """What DARE leaves of a task vector of ones."""
    settings = MergeSettings((1.0,), 1.0, density, False, (name,), seed, tensor)
    return dare_linear(torch.ones(1, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), settings)


def test_dare_drops_or_rescales_and_nothing_else():
    values = thinned()
    assert set(values.tolist()) == {0.0, 4.0}
    assert torch.equal(thinned(density=1.0), torch.ones(4000, dtype=torch.float64))


def test_dare_is_unbiased_over_seeds():
    seeds, size, density = 50, 4000, 0.25
    values = torch.stack([thinned(seed) for seed in range(seeds)])
    deviation = ((1 - density) / density) ** 0.5  # of one entry
    # Seeds are fixed, so this cannot flake; six standard errors say that it holds for others as well.
    assert abs(float(values.mean()) - 1) < 6 * deviation / (seeds * size) ** 0.5
    each = values.mean(dim=0)
    assert float((each - 1).abs().max()) < 6 * deviation / seeds**0.5
    assert float(each.var()) == pytest.approx(deviation**2 / seeds, rel=0.2)


def test_without_rescaling_it_would_not_be_unbiased():
    dropped_only = thinned() * 0.25
    assert abs(float(dropped_only.mean()) - 1) > 0.5


def test_draws_depend_on_seed_expert_and_tensor_only():
    first = thinned()
    assert torch.equal(first, thinned())
    for other in ({"seed": 1}, {"name": "b"}, {"tensor": "v"}):
        assert not torch.equal(first, thinned(**other))
    torch.rand(7)  # the global state has no part in it
    assert torch.equal(first, thinned())


def test_the_masks_of_experts_are_independent_of_the_others_and_of_each_other():
    fields = {"scaling": 1.0, "density": 0.5, "normalize": False, "tensor": "w"}
    ones, zero = torch.ones(2, 4000), torch.zeros(4000)
    both = dare_linear(ones, zero, MergeSettings((1.0, 10.0), names=("a", "b"), **fields))
    a = dare_linear(ones[:1], zero, MergeSettings((1.0,), names=("a",), **fields))
    b = dare_linear(ones[:1], zero, MergeSettings((1.0,), names=("b",), **fields))
    torch.testing.assert_close(both, a + 10 * b)
    assert abs(float((a * b).mean()) - 1) < 0.1  # E[xy] = E[x] E[y]


def survivors(experts, base, names, density) -> list[torch.Tensor]:
    """Thinned task vectors, drawn one by one."""
    fields = {"scaling": 1.0, "density": density, "normalize": False, "tensor": "w"}
    return [
        dare_linear(expert[None], base, MergeSettings((1.0,), names=(name,), **fields)) - base
        for expert, name in zip(experts, names, strict=True)
    ]


def test_dare_linear_is_task_arithmetic_of_what_survives(experts, base):
    settings = given("dare_linear", (1, 2, -1), scaling=0.7, density=0.5)
    a, b, c = survivors(experts, base, "abc", 0.5)
    torch.testing.assert_close(dare_linear(experts, base, settings), base + 0.7 * (a + 2 * b - c))
    normalised = given("dare_linear", (1, 2, 5), scaling=0.7, density=0.5, normalize=True)
    torch.testing.assert_close(dare_linear(experts, base, normalised), base + 0.7 * (a + 2 * b + 5 * c) / 8)


def test_dare_ties_elects_among_what_survives(experts, base):
    settings = given("dare_ties", (1, 2, 3), scaling=0.7, density=0.5)
    flat = [v.flatten().tolist() for v in survivors(experts, base, "abc", 0.5)]
    expected = torch.tensor(naive_ties(flat, (1, 2, 3), KEEP_ALL), dtype=torch.float64).reshape(4, 5)
    torch.testing.assert_close(dare_ties(experts, base, settings), base + 0.7 * expected, rtol=0, atol=1e-6)


def test_dare_that_drops_nothing_is_the_plain_method(experts, base):
    plain = task_arithmetic(experts, base, given("task_arithmetic"))
    torch.testing.assert_close(dare_linear(experts, base, given("dare_linear", density=1.0)), plain)
    untrimmed = ties(experts, base, given("ties"))
    torch.testing.assert_close(dare_ties(experts, base, given("dare_ties", density=1.0)), untrimmed)
    assert not torch.allclose(dare_linear(experts, base, given("dare_linear", density=0.5)), plain)


# ---- TSV-M ------------------------------------------------------------------------------------------------------


def test_tsv_equals_a_recomputation_with_numpy():
    rng = np.random.RandomState(0)
    base, experts = rng.randn(9, 6), rng.randn(3, 9, 6)
    lefts, values, rights = [], [], []
    for expert in experts:
        u, s, vh = np.linalg.svd(expert - base)
        lefts.append(u[:, :2]), values.append(s[:2]), rights.append(vh[:2])
    left, right = np.concatenate(lefts, 1), np.concatenate(rights, 0)
    # Nearest orthonormal matrix by the inverse square root of the Gram matrix.
    whiten = [np.linalg.eigh(gram) for gram in (left.T @ left, right @ right.T)]
    roots = [vectors @ np.diag(found**-0.5) @ vectors.T for found, vectors in whiten]
    expected = base + 0.5 * (left @ roots[0]) @ np.diag(np.concatenate(values)) @ (roots[1] @ right)
    merged = tsv_m(torch.tensor(experts), torch.tensor(base), given("tsv_m", scaling=0.5))
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-6)


def test_tsv_keeps_tasks_that_do_not_overlap_and_means_vectors():
    experts = torch.zeros(2, 4, 4)
    experts[0, 0, 1], experts[0, 1, 0], experts[1, 2, 3], experts[1, 3, 2] = 3.0, 2.0, 5.0, 1.0
    merged = tsv_m(experts, torch.zeros(4, 4), given("tsv_m", (1, 1)))
    torch.testing.assert_close(merged, experts.sum(0))
    vectors = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert tsv_m(vectors, torch.zeros(2), given("tsv_m", (1, 1))).tolist() == [2.0, 4.0]


def test_tsv_of_more_experts_than_rows_keeps_one_triplet_each():
    experts = torch.randn(5, 3, 4)
    assert torch.isfinite(tsv_m(experts, torch.zeros(3, 4), given("tsv_m", (1,) * 5))).all()
