"""Theorem: plans differ in cost alone. Each equals every other, and dense weights, for every kind of batch."""

import pytest
import torch

from tests import tiny
from tests.modeling.dense import EXPERTS, MIXED, assert_close, columns, dense_logits, row


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
