"""Similarities equal what brute force says, and assignments are the best there are."""

import itertools

import numpy as np
import pytest
import torch

from tests.alignment import zoo
from twin_merging_hf.alignment import Permutation, Site
from twin_merging_hf.alignment.activations import Moments, activation_similarities, samples
from twin_merging_hf.alignment.matching import match_block
from twin_merging_hf.alignment.spec import Layout
from twin_merging_hf.alignment.sweep import DualSpace
from twin_merging_hf.alignment.weights import WeightSpace


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.corrcoef(a, b)[: len(a), len(a) :]


def test_streamed_correlation_equals_numpy_also_where_means_are_large():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(70, 5, generator=generator) * torch.tensor([1, 0.01, 3, 1, 1]) + torch.tensor([0, 1000.0, -2, 0, 5])
    b = a @ torch.randn(5, 4, generator=generator) + torch.randn(70, 4, generator=generator)
    moments = Moments()
    for start in range(0, 70, 16):
        moments.add(a[start : start + 16], b[start : start + 16])
    expected = _correlation(a.double().numpy().T, b.double().numpy().T)
    np.testing.assert_allclose(moments.correlation().numpy(), expected, atol=1e-6)


def test_constant_and_dead_features_are_similar_to_nothing():
    a = torch.cat([torch.randn(40, 1), torch.full((40, 1), 0.1), torch.zeros(40, 1)], 1)
    moments = Moments()
    moments.add(a[:20], a[:20])
    moments.add(a[20:], a[20:])
    found = moments.correlation()
    assert torch.isfinite(found).all() and found[0, 0] == pytest.approx(1.0) and found[1:].abs().max() == 0


def test_padding_is_no_sample_and_pixels_are():
    value, mask = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert samples(value, 2, mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert samples(torch.zeros(2, 5, 4, 3), 5, None).shape == (24, 5)
    assert samples(torch.zeros(2, 7), 7, mask).shape == (2, 7)


def test_what_stands_at_padding_changes_no_similarity():
    model, layout = zoo.model("bert"), zoo.layout("bert")
    other = [dict(batch) for batch in zoo.batches("bert")]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"], 7)
    found = [activation_similarities(model, zoo.model("bert", 1), layout, b) for b in (zoo.batches("bert"), other)]
    for path, similarity in found[0].items():
        torch.testing.assert_close(similarity, found[1][path], rtol=0, atol=1e-5)


def _weight_space(name: str, kind: str) -> tuple[WeightSpace, dict, dict, Permutation]:
    one, other = dict(zoo.model(name).state_dict()), dict(zoo.model(name, 1).state_dict())
    space = WeightSpace(zoo.layout(name), one.__getitem__, other.__getitem__, kind)
    return space, one, other, Permutation.random(zoo.layout(name), 3)


@pytest.mark.parametrize("kind", ["pearson", "cosine"])
@pytest.mark.parametrize(
    ("name", "root"), [("bert", "ff.0"), ("llama-gqa2-biases", "ff.0"), ("llama-gqa2-biases", "res")]
)
def test_weight_similarity_equals_brute_force_on_concatenated_vectors(name, root, kind):
    space, one, other, permutation = _weight_space(name, kind)
    positive, negative = space.similarity(root, permutation)[root,]
    for found, sign in ((positive, 1.0), (negative, -1.0)):
        if found is None:
            assert not zoo.layout(name).sites[root].signed
            continue
        rows: list[list[torch.Tensor]] = [[], []]
        for entry in zoo.layout(name).entries[root]:
            moved = permutation.align(entry.tensor, other[entry.tensor], without=entry.dim)
            turn = sign if entry.role != "*" else 1.0
            for side, tensor in enumerate((one[entry.tensor], moved * turn)):
                rows[side].append(tensor.movedim(entry.dim, 0).reshape(entry.length, -1))
        a, b = (torch.cat(side, 1).double() for side in rows)
        if kind == "pearson":
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        expected = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)


def test_matched_similarity_is_the_diagonal_of_the_whole():
    name = "llama-gqa2-biases"
    space, *_, permutation = _weight_space(name, "pearson")
    index, sign = permutation.flat(("ff.0",))
    positive, negative = space.similarity("ff.0", permutation)["ff.0",]
    rows = torch.arange(len(index))
    expected = torch.where(sign > 0, positive[rows, index], negative[rows, index])
    torch.testing.assert_close(space.matched("ff.0", permutation)["ff.0"].float(), expected, rtol=0, atol=1e-5)
    # Heads: summed over all queries of a group, a leaf's contributions are its correlation.
    assert space.matched("kv.0", permutation)["vo.0"].shape == (2, 8)


def test_the_ends_of_the_weight_share_are_one_space_alone():
    name, activations = (
        "bert",
        activation_similarities(zoo.model("bert"), zoo.model("bert", 1), zoo.layout("bert"), zoo.batches("bert")),
    )
    space, *_, permutation = _weight_space(name, "pearson")
    alone = DualSpace(zoo.layout(name), space, activations, 0.0).block("ff.0", permutation)
    torch.testing.assert_close(alone["ff.0",][0], activations["ff.0",])
    weights = DualSpace(zoo.layout(name), space, activations, 1.0).block("ff.0", permutation)
    torch.testing.assert_close(weights["ff.0",][0], space.similarity("ff.0", permutation)["ff.0",][0])
    half = DualSpace(zoo.layout(name), space, activations, 0.5).block("ff.0", permutation)
    torch.testing.assert_close(half["ff.0",][0], (alone["ff.0",][0] + weights["ff.0",][0]) / 2)


def _groups(signed: bool) -> Layout:
    sites = [Site("h", 3), Site("c", 3, parent="h", signed=signed)]
    return Layout({site.name: site for site in sites}, {}, {}, [])


@pytest.mark.parametrize("signed", [False, True])
def test_two_levels_find_the_best_of_all_permutations(signed):
    layout, generator = _groups(signed), torch.Generator().manual_seed(0)
    for _ in range(5):
        plus = torch.randn(9, 9, generator=generator)
        minus = torch.randn(9, 9, generator=generator) if signed else None
        found = Permutation.identity(layout)
        match_block(layout, "h", {("h", "c"): (plus, minus)}, found)
        index, sign = found.flat(("h", "c"))
        rows = torch.arange(9)
        chosen = plus[rows, index] if minus is None else torch.where(sign > 0, plus[rows, index], minus[rows, index])
        assert float(chosen.sum()) == pytest.approx(
            _best(plus if minus is None else torch.maximum(plus, minus)), abs=1e-4
        )


def _best(scores: torch.Tensor) -> float:
    """The largest sum over all ways to move three groups, and three units inside each."""
    blocks = scores.reshape(3, 3, 3, 3).permute(0, 2, 1, 3).numpy()
    orders = list(itertools.permutations(range(3)))
    inner = np.array(
        [[max(sum(blocks[j, k][u, o[u]] for u in range(3)) for o in orders) for k in range(3)] for j in range(3)]
    )
    return max(sum(inner[j, o[j]] for j in range(3)) for o in orders)
