"""The union label space and the heads beside each other, without a model around them."""

import pytest
import torch
from torch import nn

from tests.modeling.dense import assert_close
from twin_merging_hf.modeling.heads_twin_merging import ExpertHeads, LabelSpace, head_prior


def entry(name: str, *labels: str, regression: bool = False) -> dict:
    problem = "regression" if regression else "single_label_classification"
    return {"name": name, "labels": list(labels), "problem_type": problem}


UNION = LabelSpace.of([entry("a", "x", "y"), entry("b", "p", "q", "r")])
SAME = LabelSpace.of([entry("a", "x", "y", "z"), entry("b", "z", "x", "y")])
MIXED = LabelSpace.of([entry("a", "x", "y"), entry("s", "score", regression=True)])
VALUE = LabelSpace.of([entry("s", "score", regression=True), entry("t", "score", regression=True)])


def outputs(space: LabelSpace, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, space.spans[-1][1], generator=torch.Generator().manual_seed(0))


WEIGHTS = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.1, 0.3]])
PRIOR = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.25, 0.75]])


# ---- which space ----------------------------------------------------------------------------------------------------


def test_different_labels_make_a_union_in_the_order_of_experts():
    assert UNION.kind == "union"
    assert UNION.labels == ("a/x", "a/y", "b/p", "b/q", "b/r")
    assert UNION.spans == ((0, 2), (2, 5))
    assert [UNION.columns(t) for t in range(2)] == [[0, 1], [2, 3, 4]]


def test_one_set_of_names_makes_one_space_in_the_order_of_the_first_expert():
    assert SAME.kind == "same"
    assert SAME.labels == ("x", "y", "z")
    # Expert b's own outputs z, x, y stand in columns 2, 0, 1.
    assert [SAME.columns(t) for t in range(2)] == [[0, 1, 2], [2, 0, 1]]


@pytest.mark.parametrize(
    "experts",
    [
        [entry("a", "x", "y"), entry("b", "x", "y", "z")],
        [entry("a", "x", "y"), entry("b", "X", "Y")],
        [entry("a", "LABEL_0", "LABEL_1"), entry("b", "LABEL_0", "LABEL_1")],
        [entry("a", "x"), entry("b", "x", regression=True)],
    ],
    ids=["a larger set", "another case", "automatic names", "class and number"],
)
def test_labels_that_only_look_alike_stay_apart(experts):
    space = LabelSpace.of(experts)
    assert space.kind == "union"
    assert len(set(space.labels)) == sum(len(e["labels"]) for e in experts)


def test_regressions_alone_make_one_number_named_after_their_common_label():
    assert VALUE.kind == "value" and VALUE.labels == ("score",)
    other = LabelSpace.of([entry("s", "score", regression=True), entry("t", "stars", regression=True)])
    assert other.labels == ("value",)
    assert [VALUE.columns(t) for t in range(2)] == [[0], [0]]


def test_a_single_expert_keeps_its_own_labels():
    space = LabelSpace.of([entry("a", "x", "y")])
    assert space.labels == ("x", "y")
    raw = outputs(space)
    logits, expert_logits = space.compose(raw, torch.ones(3, 1))
    assert_close(logits, raw.log_softmax(dim=1))
    assert_close(expert_logits, raw)


# ---- composing ------------------------------------------------------------------------------------------------------


def test_union_weighs_each_expert_s_distribution_and_keeps_raw_outputs():
    raw = outputs(UNION)
    logits, expert_logits = UNION.compose(raw, WEIGHTS)
    expected = torch.cat([raw[:, :2].softmax(1) * PRIOR[:, :1], raw[:, 2:].softmax(1) * PRIOR[:, 1:]], dim=1)
    assert_close(logits.exp(), expected)
    assert torch.equal(expert_logits, raw)


def test_same_mixes_probabilities_by_name():
    raw = outputs(SAME)
    logits, expert_logits = SAME.compose(raw, WEIGHTS)
    reordered = raw[:, [4, 5, 3]]
    assert_close(logits.exp(), raw[:, :3].softmax(1) * PRIOR[:, :1] + reordered.softmax(1) * PRIOR[:, 1:])
    assert_close(expert_logits, raw[:, :3] * PRIOR[:, :1] + reordered * PRIOR[:, 1:])


def test_a_regression_slot_holds_the_log_prior_and_the_number():
    raw = outputs(MIXED)
    logits, expert_logits = MIXED.compose(raw, WEIGHTS)
    assert_close(logits[:, 2].exp(), PRIOR[:, 1])
    assert_close(logits.exp().sum(dim=1), torch.ones(3))
    assert torch.equal(expert_logits[:, 2], raw[:, 2])


def test_value_is_the_weighted_number():
    raw = outputs(VALUE)
    logits, expert_logits = VALUE.compose(raw, WEIGHTS)
    assert_close(logits, (raw * PRIOR).sum(dim=1, keepdim=True))
    assert torch.equal(expert_logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("space", [UNION, SAME, MIXED], ids=["union", "same", "mixed"])
def test_no_weights_and_huge_outputs_stay_finite_in_every_type(space, dtype):
    raw = (outputs(space) * 1e4).to(dtype)
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e-30, 0.0]])
    logits, expert_logits = space.compose(raw, weights)
    assert logits.dtype == expert_logits.dtype == dtype
    assert torch.isfinite(logits).all() and torch.isfinite(logits.exp()).all()
    assert_close(logits.float().exp().sum(dim=1), torch.ones(3), 2e-2)


@pytest.mark.parametrize("space", [UNION, SAME, MIXED], ids=["union", "same", "mixed"])
def test_gradients_are_finite_even_where_a_weight_is_zero(space):
    raw, weights = outputs(space).requires_grad_(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]]).requires_grad_()
    logits, _ = space.compose(raw, weights)
    logits.sum().backward()
    assert torch.isfinite(raw.grad).all() and torch.isfinite(weights.grad).all()


def test_head_prior_scales_to_one_and_is_uniform_for_nothing():
    prior = head_prior(torch.tensor([[0.2, 0.2], [0.0, 0.0], [0.0, 3.0], [1e-38, 3e-38]]))
    assert_close(prior, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0], [0.25, 0.75]]))


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_heads_stand_side_by_side_on_the_same_features():
    one, two = nn.Linear(4, 2), nn.Linear(4, 3)
    x = torch.randn(5, 7, 4)
    assert torch.equal(ExpertHeads([one, two], chained=False)(x), torch.cat([one(x), two(x)], dim=-1))


def test_chained_heads_get_the_features_of_their_own_expert():
    first = ExpertHeads([nn.Linear(4, 4), nn.Linear(4, 4)], chained=False)
    second = ExpertHeads([nn.Linear(4, 2), nn.Linear(4, 3)], chained=True)
    x = torch.randn(5, 4)
    # What stands between them in a task model (ReLU, dropout) acts on each feature alone.
    chain = second(torch.relu(first(x)))
    expected = [b(torch.relu(a(x))) for a, b in zip(first.heads, second.heads, strict=True)]
    assert torch.equal(chain, torch.cat(expected, dim=-1))
