"""Theorem: plans differ in cost alone. Each equals every other, and dense weights, for every kind of batch."""

import pytest
import torch

from tests import tiny
from tests.modeling.dense import EXPERTS, MIXED, assert_close, columns, dense_logits, row
from twin_merging_hf.modeling.call_twin_merging import _places
from twin_merging_hf.modeling.plans_twin_merging import _equal


PLANS = ["factored", "gathered", "materialised", "auto"]
ROWS = 6
BATCHES = {
    "mixed": MIXED,
    "one-hot": torch.eye(3)[[0, 2, 1, 1, 2, 0]],
    "dense": torch.tensor([[0.2, 0.3, 0.5]] * 3 + [[0.6, 0.2, 0.1]] * 3),
    "one row of weights": torch.tensor([[0.5, 0.0, 0.4]] * ROWS),
    "some without": torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0.3], [1, 0, 0]]),
    "neighbours that have none between": torch.tensor([[0.4, 0, 0], [0.0, 0, 1], [0.4, 0, 0.6]] * 2),
    "zero": torch.zeros(ROWS, 3),
}
FAMILIES = ["bert", "vit", "gpt2", "llama"]


@pytest.fixture(scope="module")
def half_rank(world):
    """Models whose experts have different ranks, by kind."""
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = world.model(kind, exclusive={"energy": 0.8}, router={"type": "projection"}, data=False)
        return found[kind]

    return get


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_equals_dense_weights(world, half_rank, family, batch):
    model, weights, inputs = half_rank(family), BATCHES[batch], tiny.batch(family, ROWS)
    expected = [
        [dense_logits(model, family, world.experts(family), w, name, row(inputs, i)) for name in EXPERTS]
        for i, w in enumerate(weights)
    ]
    for plan in PLANS:
        with model.use_plan(plan):
            output = model(**inputs, expert_weights=weights).expert_logits
        for i, own in enumerate(expected):
            for name, logits in zip(EXPERTS, own, strict=True):
                assert_close(output[i : i + 1, columns(model, name)], logits)


def test_weights_are_the_same_by_their_numbers_wherever_they_lie():
    stacked = torch.tensor([[0.2, 0.3], [0.2, 0.3], [0.4, 0.3]])
    first, second, other = stacked
    assert _equal(first, first) and _equal(first, second) and _equal(first, second.clone())
    assert not _equal(first, other) and not _equal(other, first)  # whichever lies first in memory
    assert not _equal(first, stacked[:1])


def test_pictures_have_as_many_tokens_as_patches(world):
    model = world.model("vit")
    for height, width in ((tiny.IMAGE, tiny.IMAGE), (2 * tiny.IMAGE, tiny.IMAGE)):
        embedded = model.shared.vit.embeddings.patch_embeddings.projection(torch.zeros(1, 3, height, width))
        found = model._computed_width({"pixel_values": torch.zeros(1, 3, height, width)})
        assert found == embedded.shape[2] * embedded.shape[3] > 1


def test_tokens_are_counted_where_the_mask_is_that_of_this_input(world):
    model = world.model("bert")
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    assert model._tokens({**inputs, "attention_mask": mask[:, :5]}, 2) == [3, 5]
    for not_of_it in (None, mask, mask[:, :4], mask[:, None, :5]):
        assert model._tokens({**inputs, "attention_mask": not_of_it}, 2) == [5, 5]


def test_factors_that_lie_together_are_not_copied():
    ranks = (2, 3, 1)
    for experts, places in ((None, slice(0, 6)), ((1, 2), slice(2, 6)), ((0,), slice(0, 2)), ((), slice(0, 0))):
        assert _places(experts, ranks, torch.device("cpu")) == places
    assert _places((0, 2), ranks, torch.device("cpu")).tolist() == [0, 1, 5]
