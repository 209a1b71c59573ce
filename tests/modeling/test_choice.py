"""Choosing experts by hand: names, lists, dicts, "all", `use_experts`; and what is refused, naming what is valid."""

import threading
from typing import Any

import pytest
import torch

from tests import tiny
from tests.modeling.dense import EXPERTS, MIXED, assert_close
from twin_merging_hf.modeling import (
    TwinMergingForImageClassification,
    TwinMergingForSequenceClassification,
    TwinMergingModel,
)


EYE = torch.eye(3)


@torch.no_grad()
def weights_of(model: Any, kind: str = "bert", rows: int = 3, **call: Any) -> torch.Tensor:
    return model(**tiny.batch(kind, rows), **call).expert_weights


# ---- the ways to choose ---------------------------------------------------------------------------------------------


def test_each_way_to_name_experts_means_its_weights(kind, model):
    cases: list[tuple[Any, torch.Tensor]] = [
        ("b", EYE[[1, 1, 1]]),
        (["c", "a", "b"], EYE[[2, 0, 1]]),
        (("c", "__shared__", "b"), torch.stack([EYE[2], torch.zeros(3), EYE[1]])),
        ({"a": 0.75, "c": 0.25}, torch.tensor([[0.75, 0.0, 0.25]] * 3)),
        ("__shared__", torch.zeros(3, 3)),
    ]
    for experts, expected in cases:
        assert torch.equal(weights_of(model, kind, experts=experts), expected), experts


@torch.no_grad()
def test_names_act_like_the_weights_they_stand_for(kind, model):
    inputs = tiny.batch(kind, 3)
    named = model(**inputs, experts=["c", "a", "__shared__"])
    given = model(**inputs, expert_weights=torch.stack([EYE[2], EYE[0], torch.zeros(3)]))
    assert torch.equal(named.logits, given.logits) and torch.equal(named.expert_logits, given.expert_logits)


@torch.no_grad()
def test_all_answers_each_row_with_every_expert_as_single_calls_do(kind, model):
    inputs = tiny.batch(kind, 4)
    everything = model(**inputs, experts="all", output_hidden_states=True)
    assert everything.logits.shape == everything.expert_logits.shape == (4, 3, 7)
    assert everything.expert_weights.shape == (4, 3, 3)
    for t, name in enumerate(EXPERTS):
        single = model(**inputs, experts=name, output_hidden_states=True)
        assert_close(everything.logits[:, t].exp(), single.logits.exp())
        assert_close(everything.expert_logits[:, t], single.expert_logits)
        assert torch.equal(everything.expert_weights[:, t], single.expert_weights)
        for state, own in zip(everything.hidden_states, single.hidden_states, strict=True):
            assert_close(state[:, t], own)


@torch.no_grad()
def test_all_works_without_heads_too(kind, artifact):
    body, inputs = TwinMergingModel.from_pretrained(artifact).eval(), tiny.batch(kind, 2)
    everything = body(**inputs, experts="all")
    for t, name in enumerate(EXPERTS):
        assert_close(everything.last_hidden_state[:, t], body(**inputs, experts=name).last_hidden_state)


@torch.no_grad()
def test_all_with_a_single_row_keeps_both_dimensions(bert):
    assert bert(**tiny.batch("bert", 1), experts="all").logits.shape == (1, 3, 7)


def test_weights_given_as_one_row_hold_for_every_row(kind, model):
    assert torch.equal(weights_of(model, kind, expert_weights=MIXED[3:4]), MIXED[[3, 3, 3]])


# ---- use_experts ----------------------------------------------------------------------------------------------------


def test_use_experts_chooses_within_the_block_only(kind, model):
    before = weights_of(model, kind)
    with model.use_experts("c") as inside:
        assert inside is model
        assert torch.equal(weights_of(model, kind), EYE[[2, 2, 2]])
    assert torch.equal(weights_of(model, kind), before)


def test_use_experts_nests_and_the_inner_block_wins(bert):
    with bert.use_experts("a"):
        with bert.use_experts({"b": 0.5, "c": 0.5}):
            assert torch.equal(weights_of(bert), torch.tensor([[0.0, 0.5, 0.5]] * 3))
            with bert.use_experts("__shared__"):
                assert torch.equal(weights_of(bert), torch.zeros(3, 3))
        assert torch.equal(weights_of(bert), EYE[[0, 0, 0]])


def test_use_experts_is_undone_when_the_block_raises(bert):
    before = weights_of(bert)
    with pytest.raises(KeyError):
        with bert.use_experts("a"):
            raise KeyError("inside")
    assert torch.equal(weights_of(bert), before)


def test_a_call_that_raises_leaves_nothing_behind(bert):
    before = weights_of(bert)
    with pytest.raises((IndexError, RuntimeError)):
        bert(input_ids=torch.full((1, 3), tiny.VOCABULARY + 7), experts="a")
    assert torch.equal(weights_of(bert), before)
    assert bert.mix.current() is None


def test_what_a_call_names_wins_over_use_experts(bert):
    with bert.use_experts("a"):
        assert torch.equal(weights_of(bert, experts="c"), EYE[[2, 2, 2]])
        assert torch.equal(weights_of(bert, expert_weights=MIXED[3:4]), MIXED[[3, 3, 3]])


def test_use_experts_takes_weights_for_all_rows_or_for_each(bert):
    with bert.use_experts(expert_weights=MIXED[3:4]):
        assert torch.equal(weights_of(bert), MIXED[[3, 3, 3]])
    with bert.use_experts(expert_weights=MIXED[:3]):
        assert torch.equal(weights_of(bert), MIXED[:3])
        with pytest.raises(ValueError, match="3 rows.*batch has 2"):
            weights_of(bert, rows=2)


def test_use_experts_of_one_model_leaves_another_model_alone(world, bert):
    other = world.model("bert")
    routed = weights_of(other)
    with bert.use_experts("c"):
        assert torch.equal(weights_of(other), routed)


def test_two_models_can_use_experts_at_the_same_time(world, bert):
    other = world.model("bert")
    with bert.use_experts("a"), other.use_experts("c"):
        assert torch.equal(weights_of(other), EYE[[2, 2, 2]])
        assert torch.equal(weights_of(bert), EYE[[0, 0, 0]])


def test_use_experts_holds_in_this_thread_only(bert):
    seen = []
    with bert.use_experts("c"):
        worker = threading.Thread(target=lambda: seen.append(weights_of(bert)))
        worker.start()
        worker.join()
    assert torch.equal(seen[0], weights_of(bert))


# ---- what is refused ------------------------------------------------------------------------------------------------

NAN = float("nan")
REFUSED: dict[str, tuple[dict, str]] = {
    "an unknown name": ({"experts": "d"}, r"'d'.*a, b, c"),
    "an unknown name in a list": ({"experts": ["a", "b", "z"]}, r"'z'.*a, b, c"),
    "an unknown name in a dict": ({"experts": {"a": 0.5, "q": 0.5}}, r"'q'.*a, b, c"),
    "a name of another case": ({"experts": "A"}, r"'A'.*a, b, c"),
    "too few names": ({"experts": ["a", "b"]}, r"names 2 rows.*batch has 3"),
    "all among the rows": ({"experts": ["all", "a", "b"]}, r"'all'.*a, b, c"),
    "a number": ({"experts": 1}, r"a, b, c"),
    "too few weights": ({"expert_weights": torch.ones(3, 2) / 2}, r"with 3 experts, got \[3, 2\]"),
    "weights without a batch": ({"expert_weights": torch.ones(3) / 3}, r"\[batch, expert\].*got \[3\]"),
    "weights of another batch": ({"expert_weights": torch.ones(2, 3) / 3}, r"2 rows.*batch has 3"),
    "NaN": ({"expert_weights": torch.tensor([[NAN, 0.0, 0.0]])}, r"NaN"),
    "infinity": ({"expert_weights": torch.tensor([[float("inf"), 0.0, 0.0]])}, r"infinity"),
    "a negative weight": ({"expert_weights": torch.tensor([[1.5, -0.5, 0.0]])}, r"negative"),
    "a negative weight by name": ({"experts": {"a": 1.5, "b": -0.5}}, r"negative"),
    "names and weights": ({"experts": "a", "expert_weights": MIXED[:3]}, r"`experts` or `expert_weights`"),
    "all and weights": ({"experts": "all", "expert_weights": MIXED[:3]}, r"`experts` or `expert_weights`"),
    "a misspelt argument": ({"expert_wieghts": MIXED[:3]}, r"'expert_wieghts'.*expert_weights, experts, .*labels"),
    "labels with all": ({"experts": "all", "labels": torch.zeros(3, dtype=torch.long)}, r"`labels`.*'all'"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_the_call_is_refused_naming_what_is_valid(bert, call, message):
    with pytest.raises(ValueError, match=message):
        weights_of(bert, **call)


@pytest.mark.parametrize("call", [{"experts": "d"}, {"expert_weights": torch.ones(3, 2)}, {"expert_wieghts": 1}])
def test_every_kind_of_model_refuses_wrong_calls(kind, model, call):
    with pytest.raises(ValueError, match="expert"):
        weights_of(model, kind, **call)


def test_use_experts_refuses_as_it_is_entered(bert):
    cases: list[tuple[tuple, dict, str]] = [
        (("d",), {}, "'d'.*a, b, c"),
        (("all",), {}, "`experts='all'`|experts='all'"),
        ((), {}, "either names"),
        (("a",), {"expert_weights": MIXED[:1]}, "not both"),
        ((), {"expert_weights": torch.ones(1, 2)}, "with 3 experts"),
        (({"a": -1.0},), {}, "negative"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            with bert.use_experts(*args, **kwargs):
                pytest.fail("entered")


def test_negative_weights_are_allowed_where_no_heads_are_mixed(world):
    body = TwinMergingModel.from_pretrained(world.artifact("bert")).eval()
    weights = torch.tensor([[1.5, -0.5, 0.0]])
    assert torch.equal(weights_of(body, rows=1, expert_weights=weights), weights)


def test_the_model_without_heads_refuses_labels_and_does_not_offer_them(world):
    body = TwinMergingModel.from_pretrained(world.artifact("bert")).eval()
    with pytest.raises(ValueError, match="unknown argument 'labels'") as caught:
        weights_of(body, labels=torch.zeros(3, dtype=torch.long))
    offered = str(caught.value).split("it takes ")[1].split(", ")
    assert "labels" not in offered and "experts" in offered


def test_an_input_that_the_shared_model_does_not_take_is_refused(world, models):
    with pytest.raises(ValueError, match="DistilBertForSequenceClassification takes no 'token_type_ids'"):
        weights_of(models("distilbert"), token_type_ids=torch.ones(3, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="takes no 'pixel_values'"):
        weights_of(models("bert"), pixel_values=torch.zeros(3, 3, 16, 16))


@torch.no_grad()
def test_all_zero_token_types_are_ignored_as_stock_distilbert_does(models):
    inputs = tiny.batch("distilbert", 3)
    plain = models("distilbert")(**inputs)
    assert torch.equal(models("distilbert")(**inputs, token_type_ids=torch.zeros(3, 9).long()).logits, plain.logits)


def test_a_call_without_inputs_says_which_input_is_missing(models):
    with pytest.raises(ValueError, match="needs `input_ids`"):
        models("bert")(experts="a")
    with pytest.raises(ValueError, match="needs `pixel_values`"):
        models("vit")(experts="a")


def test_a_class_refuses_another_class_s_artifact_and_names_the_right_one(world):
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        TwinMergingForImageClassification.from_pretrained(world.artifact("bert"))
    with pytest.raises(ValueError, match="AutoModelForImageClassification"):
        TwinMergingForSequenceClassification.from_pretrained(world.artifact("vit"))


def test_replacing_the_input_embeddings_is_refused(world):
    model = world.model("bert")
    with pytest.raises(ValueError, match="embeddings"):
        model.resize_token_embeddings(tiny.VOCABULARY + 5)
