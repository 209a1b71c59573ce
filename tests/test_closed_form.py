"""Routers in closed form, against plain NumPy, and what they must not do."""

import numpy as np
import pytest
import torch

from twin_merging_hf import closed_form
from twin_merging_hf.closed_form import (
    fit_centroid,
    fit_lexical_weight,
    fit_lexicon,
    fit_neighbours,
    fit_novelty,
    whitening,
)
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.modeling.routing_twin_merging import CentroidRouter, LexicalRouter, NeighbourRouter, Novelty
from twin_merging_hf.router_training import centre_groups


SIZE, EXPERTS = 10, 3


def planted(rows: int = 200, distance: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three experts with one covariance that is far from round."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    centres = distance * torch.randn(EXPERTS, SIZE, generator=torch.Generator().manual_seed(98)) @ mix / SIZE**0.5
    owners = torch.arange(EXPERTS).repeat_interleave(rows)
    return centres[owners] + torch.randn(EXPERTS * rows, SIZE, generator=rng) @ mix, owners


def plain_covariance(features: np.ndarray, owners: np.ndarray, share: float = 0.01) -> np.ndarray:
    residuals = features - np.stack([features[owners == t].mean(0) for t in range(owners.max() + 1)])[owners]
    covariance = residuals.T @ residuals / len(features)
    return (1 - share) * covariance + share * (residuals**2).mean() * np.eye(features.shape[1])


def test_one_centre_an_expert_is_the_textbook_discriminant():
    features, owners = planted()
    router = CentroidRouter(SIZE, [1] * EXPERTS)
    fit_centroid(router, features, owners)
    plain = plain_covariance(features.double().numpy(), owners.numpy())
    centres = np.stack([features.double().numpy()[owners == t].mean(0) for t in range(EXPERTS)])
    x, _ = planted(seed=1)
    gaps = x.double().numpy()[:, None] - centres[None]
    distances = np.einsum("rtd,de,rte->rt", gaps, np.linalg.inv(plain), gaps)
    expected = torch.tensor(-0.5 * distances).log_softmax(-1)
    torch.testing.assert_close(router.score(x).log_softmax(-1), expected.float(), rtol=0, atol=2e-3)


def test_what_all_rows_have_in_common_costs_no_digits():
    """Hidden states have directions that are large in every row; logits may not be large for it."""
    features, owners = planted()
    router, moved = CentroidRouter(SIZE, [1] * EXPERTS), CentroidRouter(SIZE, [1] * EXPERTS)
    fit_centroid(router, features, owners)
    common = 30.0
    fit_centroid(moved, features.double() + common, owners)
    x, _ = planted(seed=1)
    found = moved.score(x + common).log_softmax(-1)
    torch.testing.assert_close(found, router.score(x).log_softmax(-1), rtol=0, atol=2e-4)


def test_fewer_rows_than_features_give_the_same_router(monkeypatch):
    features, owners = planted(40)
    direct, by_rows = CentroidRouter(SIZE, [1] * EXPERTS), CentroidRouter(SIZE, [1] * EXPERTS)
    fit_centroid(direct, features, owners)
    monkeypatch.setattr(closed_form, "_LARGEST_COVARIANCE", SIZE - 1)
    fit_centroid(by_rows, features, owners)
    torch.testing.assert_close(by_rows.classifier.weight, direct.classifier.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_rows.classifier.bias, direct.classifier.bias, rtol=1e-4, atol=1e-4)


def test_an_expert_with_more_rows_gets_no_bonus():
    features, owners = planted(400, distance=0.5)
    even = CentroidRouter(SIZE, [1] * EXPERTS)
    fit_centroid(even, features, owners)
    keep = torch.cat([torch.arange(400), 400 + torch.arange(40), 800 + torch.arange(40)])
    skewed = CentroidRouter(SIZE, [1] * EXPERTS)
    fit_centroid(skewed, features[keep], owners[keep])
    x, _ = planted(400, distance=0.5, seed=1)
    taken = [float((router.score(x).argmax(1) == 0).float().mean()) for router in (even, skewed)]
    assert taken[1] < 1.35 * taken[0]


def test_an_expert_whose_labels_lie_apart_needs_a_centre_for_each():
    """Expert 0 sits on both sides of expert 1: one centre lies right where expert 1 is."""
    rng = torch.Generator().manual_seed(0)
    sides = torch.tensor([-4.0, 4.0]).repeat(100)[:, None] * torch.eye(SIZE)[0]
    features = torch.cat([sides, torch.zeros(200, SIZE)]) + torch.randn(400, SIZE, generator=rng)
    owners = torch.arange(2).repeat_interleave(200)
    groups, counts = centre_groups([[i % 2 for i in range(200)], [0] * 200])
    assert counts == (2, 1)
    one, two = CentroidRouter(SIZE, [1, 1]), CentroidRouter(SIZE, list(counts))
    fit_centroid(one, features, owners)
    fit_centroid(two, features, groups)
    accuracy = [float((router.score(features).argmax(1) == owners).float().mean()) for router in (one, two)]
    assert accuracy[0] < 0.8 and accuracy[1] > 0.95


def test_groups_are_labels_quarters_and_never_rare():
    groups, counts = centre_groups(
        [[0] * 50 + [1] * 30 + [2] * 3, [float(i) for i in range(100)], [None] * 10, [5] * 4]
    )
    assert counts == (2, 4, 1, 1)
    first = groups[:83]
    assert set(first[:50].tolist()) == {0} and set(first[50:80].tolist()) == {1}
    assert set(first[80:].tolist()) == {0}  # three rows go with the commonest label
    assert torch.bincount(groups[83:183] - 2).tolist() == [25, 25, 25, 25] or max(groups[83:183]) == 5
    assert groups[183:193].unique().tolist() == [6] and groups[193:].unique().tolist() == [7]


def test_rows_that_all_look_the_same_are_refused():
    with pytest.raises(TwinMergingError, match="look the same"):
        fit_centroid(CentroidRouter(SIZE, [1, 1]), torch.zeros(10, SIZE), torch.arange(2).repeat_interleave(5))


@pytest.mark.parametrize("rows", [200, 3])
def test_whitened_rows_scatter_evenly_and_the_first_directions_tell_experts_apart(rows):
    features, owners = planted(rows)
    projection = whitening(features, owners, EXPERTS, 6).numpy()
    if rows > SIZE:
        within = projection @ plain_covariance(features.double().numpy(), owners.numpy()) @ projection.T
        np.testing.assert_allclose(within, np.eye(len(projection)), atol=1e-6)
    centres = np.stack([features.double().numpy()[owners == t].mean(0) for t in range(EXPERTS)]) @ projection.T
    beyond = centres[:, EXPERTS - 1 :]
    np.testing.assert_allclose(beyond - beyond.mean(0), 0, atol=1e-5 * np.abs(centres).max())


def test_novelty_is_the_relative_mahalanobis_distance():
    features, owners = planted()
    novelty = Novelty(SIZE, EXPERTS, EXPERTS - 1)
    limit = fit_novelty(novelty, features, owners, planted(seed=2)[0], 0.05)
    x, known = planted(seed=3)[0], features.double().numpy()
    projection = whitening(features, owners, EXPERTS, EXPERTS - 1).numpy()
    points, rows = x.double().numpy() @ projection.T, known @ projection.T
    centres = np.stack([rows[owners == t].mean(0) for t in range(EXPERTS)])
    nearest = ((points[:, None] - centres[None]) ** 2).sum(-1).min(1)
    covariance = 0.99 * np.cov(rows.T, bias=True) + 0.01 * np.eye(EXPERTS - 1)
    gaps = points - rows.mean(0)
    expected = nearest - np.einsum("rd,de,re->r", gaps, np.linalg.inv(covariance), gaps)
    with torch.no_grad():
        found = novelty(x).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        share = float((novelty(planted(seed=2)[0]) > limit).float().mean())
    assert share == pytest.approx(0.05, abs=0.01)


@torch.no_grad()
def test_rows_between_the_experts_are_stranger_than_theirs():
    features, owners = planted(distance=6.0)
    novelty = Novelty(SIZE, EXPERTS, EXPERTS - 1)
    limit = fit_novelty(novelty, features, owners, planted(distance=6.0, seed=2)[0], 0.05)
    middle = features.mean(0) + 0.1 * torch.randn(50, SIZE)
    assert (novelty(middle) > limit).all()


@torch.no_grad()
def test_neighbours_vote_as_plain_distances_say():
    features, owners = planted(60, distance=12.0)
    router = NeighbourRouter(SIZE, EXPERTS, 5, 20, 7)
    fit_neighbours(router, features, owners, 0)
    mean = (features @ router.projection.T + router.shift).mean(0)  # distances near the origin round the least
    torch.testing.assert_close(mean, torch.zeros(5), rtol=0, atol=1e-4)
    x, truth = planted(60, distance=12.0, seed=1)
    points = x.double() @ router.projection.double().T + router.shift.double()
    exemplars = router.exemplars.double().reshape(-1, 5)
    for row, score in zip(points, router.score(x), strict=True):
        distances = (exemplars - row).pow(2).sum(1)
        near = distances.argsort()[:7]
        votes = (-distances[near] / distances[near].mean()).softmax(0)
        shares = torch.zeros(EXPERTS, dtype=torch.float64).index_add(0, near // 20, votes)
        torch.testing.assert_close(score.double(), (shares + 1 / (EXPERTS * 7)).log(), rtol=0, atol=1e-4)
    assert float((router.score(x).argmax(1) == truth).float().mean()) > 0.9


def lexical(tokens: list[list[int]], owners: list[int], vocabulary: int = 20) -> LexicalRouter:
    router = LexicalRouter(SIZE, [1] * EXPERTS, vocabulary)
    fit_lexicon(router, [torch.tensor(ids) for ids in tokens], torch.tensor(owners))
    return router


def test_the_lexicon_is_naive_bayes_over_the_tokens_that_were_seen():
    router = lexical([[1, 2, 2], [1, 3], [4, 3]], [0, 1, 2])
    seen = np.zeros((20, EXPERTS))
    for ids, owner in (([1, 2], 0), ([1, 3], 1), ([4, 3], 2)):
        seen[ids, owner] += 1
    likelihood = np.log((seen + 0.1) / (seen + 0.1).sum(0))
    expected = likelihood - likelihood.mean(1, keepdims=True)
    expected[seen.sum(1) == 0] = 0
    step = np.abs(expected).max() / 127
    found = (router.table.float() * router.scale).numpy()
    np.testing.assert_allclose(found, expected, atol=step)
    assert not found[5:].any() and found[2].argmax() == 0


def test_a_row_s_tokens_count_once_and_padding_not_at_all():
    router = lexical([[1, 2], [3], [4]], [0, 1, 2])
    table = router.table.float() * router.scale
    ids = torch.tensor([[1, 2, 1, 4], [3, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = torch.stack([table[1] + table[2] + table[4], table[3]])
    torch.testing.assert_close(router.lexical(ids, mask), expected)
    torch.testing.assert_close(router.lexical(ids.flip(1), mask.flip(1)), expected)


def test_tokens_get_the_weight_that_held_out_rows_give_them():
    """Tokens that tell the experts apart count, tokens that mislead do not."""
    router = LexicalRouter(SIZE, [1] * EXPERTS, 20)
    with torch.no_grad():
        router.classifier.weight.zero_()
        router.classifier.bias.zero_()
    owners = torch.arange(EXPERTS).repeat(40)
    truth = torch.nn.functional.one_hot(owners, EXPERTS).float()
    fit_lexical_weight(router, torch.cat([torch.zeros(120, SIZE), 2 * truth], dim=1), owners)
    assert float(router.weight) > 0
    fit_lexical_weight(router, torch.cat([torch.zeros(120, SIZE), -2 * truth], dim=1), owners)
    assert float(router.weight) == 0
