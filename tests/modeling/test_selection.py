"""The selector on planted weights, masks and phases of a BERT-base and a small decoder: each rule decides what it says."""

from dataclasses import replace

import pytest
import torch

from tests import tiny
from twin_merging_hf.modeling.costs_twin_merging import DEFAULTS, Costs, Sizes
from twin_merging_hf.modeling.selection_twin_merging import Batch, Limits, copies_bytes, decide


CONSTANTS = DEFAULTS["cpu", torch.float32]
EXPERTS, RANK = 8, 16
ROOM = 1 << 40


def sizes(experts: int = EXPERTS, rank: int = RANK, layers: int = 12, d: int = 768) -> Sizes:
    """A BERT's matrices: four of d x d and two of d x 4d in each layer."""
    entries, sides = layers * 12 * d * d, layers * 18 * d
    return Sizes(
        6 * layers, entries, entries, (rank * sides,) * experts, (rank * entries,) * experts, 4 * d * d, 4, sides
    )


def choose(
    weights, tokens, width, *, expected: int = 0, plan: str = "auto", budget: int = ROOM, of=None, unusable=None
):
    batch = Batch.of(torch.as_tensor(weights).tolist(), tokens, width, expected)
    costs = Costs(of or sizes(len(weights[0])), CONSTANTS, batch.rows, width)
    return decide(batch, costs, Limits(plan, budget, unusable or {}))


def one_hot(*experts: int, of: int = EXPERTS) -> torch.Tensor:
    return torch.eye(of)[list(experts)]


def dense(rows: int, of: int = EXPERTS) -> torch.Tensor:
    return torch.rand(rows, of, generator=torch.Generator().manual_seed(0)).softmax(1)


def test_experts_without_weight_are_left_out():
    weights = dense(4).clone()
    weights[:, [0, 3, 4]] = 0
    assert choose(weights, [64] * 4, 64).batch.union == (1, 2, 5, 6, 7)


def test_no_weight_at_all_is_the_base_path():
    decision = choose(torch.zeros(4, EXPERTS), [64] * 4, 64)
    assert decision.plan == "base" and decision.call(torch.zeros(4, EXPERTS), None) is None


def test_rows_with_equal_weights_are_one_group_and_padding_does_not_count():
    decision = choose(one_hot(1, 1, 2, 1), [60, 5, 30, 7], 64)
    assert [(group.rows, group.tokens) for group in decision.batch.groups] == [((0, 1, 3), 72), ((2,), 30)]


def test_dense_rows_of_usual_length_are_factored():
    assert choose(dense(16), [64] * 16, 64).plan == "factored"


def test_one_group_is_merged_from_the_crossover_on():
    crossover = sizes().crossover
    assert crossover == 512
    row = dense(1)
    for tokens, plan in ((int(crossover / 2), "factored"), (4 * int(crossover), "materialised")):
        assert choose(row, [tokens], tokens).plan == plan


def test_long_groups_are_merged_and_short_ones_are_not():
    weights = dense(6)[[0, 0, 0, 0, 1, 2]]
    decision = choose(weights, [512] * 4 + [100, 100], 512)
    assert decision.plan == "mixed" and decision.merged == (0,)
    call = decision.call(weights, None)
    assert [part.call.method for part in call.parts] == ["materialised", decision.method]


def test_padding_does_not_make_a_group_long():
    decision = choose(dense(6)[[0, 0, 0, 0, 1, 2]], [20] * 4 + [100, 100], 512)
    assert decision.plan != "mixed"


def test_few_experts_of_many_are_gathered_where_rows_are_long_enough():
    weights = one_hot(*range(16), of=32)
    assert choose(weights, [64] * 16, 64).plan == "gathered"
    assert choose(weights, [8] * 16, 8).plan == "factored", "below 16 tokens the union is read as fast"


def test_dense_weights_are_never_gathered():
    assert "gathered" not in (choose(dense(16), [64] * 16, 64).plan, choose(dense(2), [256] * 2, 256).plan)


STEPS = [(1, 200, True), (1, 1, False), (8, 200, False)]


@pytest.mark.parametrize(("groups", "expected", "kept"), STEPS)
def test_copies_are_kept_over_a_generation_if_few_and_if_it_is_long(groups, expected, kept):
    weights = dense(groups)[torch.arange(8) % groups]
    decision = choose(weights, [1] * 8, 1, expected=expected)
    assert decision.kept == kept and decision.plan == ("materialised" if kept else "factored")


def test_two_copies_beat_factors_only_of_many_ranks():
    for experts, plan in ((8, "factored"), (64, "materialised")):
        weights = dense(2, experts)[torch.arange(8) % 2]
        assert choose(weights, [1] * 8, 1, expected=1000).plan == plan


def test_copies_that_the_budget_has_no_room_for_are_not_kept():
    weights = dense(1).expand(8, -1)
    room = copies_bytes(Batch.of(weights.tolist(), [1] * 8, 1), Costs(sizes(), CONSTANTS, 8, 1), (0,))
    assert room == sizes().owned * 4
    assert choose(weights, [1] * 8, 1, expected=500, budget=room).kept
    assert choose(weights, [1] * 8, 1, expected=500, budget=room - 1).plan == "factored"


def test_what_cannot_be_used_is_not_chosen():
    row = dense(1)
    assert choose(row, [4096], 4096, unusable={"materialised": "offloaded"}).plan == "factored"
    weights = one_hot(*range(16), of=32)
    assert choose(weights, [64] * 16, 64, unusable={"gathered": "sparse"}).plan != "gathered"


@pytest.mark.parametrize("plan", ["factored", "gathered", "materialised"])
def test_a_plan_that_is_asked_for_is_taken(plan):
    assert choose(dense(4), [64] * 4, 64, plan=plan).plan == plan


def test_auto_is_what_is_predicted_to_be_cheapest():
    for weights in (dense(16), one_hot(*range(16), of=32), dense(1).expand(16, -1)):
        decision = choose(weights, [64] * 16, 64)
        assert decision.extra == min(decision.options.values())


# ---- what a user sees -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_explain_says_what_was_chosen_and_why(bert):
    inputs = tiny.text_batch(3)
    report = bert.explain(**inputs, experts=["a", "c", "a"], measure=True)
    assert report.experts == ("a", "c") and report.groups == 2
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    assert report.tokens == (lengths[0] + lengths[2], lengths[1])
    assert report.predicted[report.plan] == min(report.predicted.values()) and report.measured > 0
    text = str(report)
    assert f"plan: {report.plan}" in text and "experts with weight: 2" in text
    unmeasured = bert.explain(**inputs, experts="__shared__")
    assert unmeasured.plan == "base" and unmeasured.measured is None
    for tokens, shown in (
        ((5, 4), "of 5, 4 tokens"),
        ((1,) * 6, "1, 1, 1, 1, 1, 1 tokens"),
        ((1,) * 7, "1, ... tokens"),
    ):
        assert shown in str(replace(report, tokens=tokens))


def test_plans_that_cannot_be_used_are_refused_by_name(world, bert):
    with pytest.raises(ValueError, match="'fastest'"):
        bert.set_plan("fastest")
    with pytest.raises(ValueError, match="memory_budget"):
        bert.set_plan("auto", memory_budget=-1)
    with pytest.raises(ValueError, match="one merged matrix takes 8192 bytes, the memory budget is 100"):
        bert.set_plan("materialised", memory_budget=100)
    sparse = world.model(
        "bert", exclusive={"method": "magnitude", "ratio": 0.2}, router={"type": "projection"}, data=False
    )
    with pytest.raises(ValueError, match="sparse"):
        sparse.set_plan("gathered")
    with torch.device("meta"):
        empty = type(bert)(bert.config)
    with pytest.raises(ValueError, match="meta device"):
        empty.set_plan("materialised")


def test_a_choice_holds_in_its_block_and_thread_only(world):
    model = world.model("bert")
    model.set_plan("gathered")
    with model.use_plan("materialised"):
        assert model.explain(**tiny.text_batch(2), experts="a").plan == "materialised"
    assert model.explain(**tiny.text_batch(2), experts="a").plan == "gathered"


@torch.no_grad()
def test_offloaded_weights_are_not_merged_and_auto_does_without(world, tmp_path):
    inputs, expected = tiny.text_batch(4), world.model("bert")
    expected = expected(**inputs, experts="a").expert_logits
    model = (
        type(world.model("bert"))
        .from_pretrained(world.artifact("bert"), device_map={"": "disk"}, offload_folder=str(tmp_path))
        .eval()
    )
    with pytest.raises(ValueError, match="offloaded"):
        model.set_plan("materialised")
    for plan in ("auto", "factored", "gathered"):
        with model.use_plan(plan), model.generating(100):
            torch.testing.assert_close(model(**inputs, experts="a").expert_logits, expected, atol=1e-5, rtol=0)
