"""What comes out: shapes, one distribution over the union of labels, and one column for each named label."""

import itertools
from typing import Any

import pytest
import torch

from tests import tiny
from tests.conftest import load
from tests.modeling.dense import EXPERTS, MIXED, assert_close, dense_logits, row, stock
from twin_merging_hf.modeling import TwinMergingModel


UNION = {name: list(labels) for name, labels in tiny.LABELS.items()}
SAME = {"a": ["no", "yes"], "b": ["yes", "no"], "c": ["no", "yes"]}
WITH_REGRESSION = {"a": ["x", "y"], "score": ["LABEL_0"], "c": ["m", "n", "o"]}
ALL_REGRESSION = {"warm": ["score"], "cold": ["score"], "wet": ["amount"]}
SPACES = {"union": UNION, "same": SAME, "with_regression": WITH_REGRESSION}


def outputs(model: Any, weights: torch.Tensor | None = MIXED, kind: str = "bert", **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**tiny.batch(kind, len(MIXED)), expert_weights=weights, **kwargs)


def assert_distribution(logits: torch.Tensor) -> None:
    assert_close(logits.exp().sum(dim=-1), torch.ones(logits.shape[:-1]))


# ---- shapes and distributions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, MIXED, MIXED[3:4]], ids=["routed", "given", "one row for all"])
def test_outputs_have_batch_first_and_one_column_for_each_label_and_expert(kind, model, weights):
    output = outputs(model, weights, kind)
    assert output.loss is None
    assert output.logits.shape == output.expert_logits.shape == (len(MIXED), 7)
    assert output.expert_weights.shape == (len(MIXED), 3)
    assert list(model.config.id2label.values()) == ["a/x", "a/y", "b/p", "b/q", "b/r", "c/m", "c/n"]
    assert_distribution(output.logits)


@pytest.mark.parametrize("labels", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("weights", [None, MIXED], ids=["routed", "given"])
def test_exp_of_logits_is_one_distribution_over_all_labels(world, labels, weights):
    model = world.model("bert", labels)
    output = outputs(model, weights)
    assert output.logits.shape[1] == model.config.num_labels == len(model.config.id2label)
    assert_distribution(output.logits)
    assert torch.isfinite(output.logits).all()


def test_logits_are_the_experts_probabilities_times_their_weights(kind, model):
    output = outputs(model, MIXED, kind)
    prior = torch.where(MIXED.sum(1, keepdim=True) > 0, MIXED / MIXED.sum(1, keepdim=True).clamp(min=1e-9), 1 / 3)
    start = 0
    for t, name in enumerate(EXPERTS):
        block = slice(start, start + len(UNION[name]))
        start = block.stop
        own = output.expert_logits[:, block].softmax(dim=1)
        assert_close(output.logits[:, block].exp(), own * prior[:, t : t + 1])


def test_the_model_without_heads_gives_hidden_states_and_weights(kind, artifact):
    body = TwinMergingModel.from_pretrained(artifact).eval()
    output = outputs(body, None, kind)
    assert output.last_hidden_state.shape[::2] == (len(MIXED), tiny.HIDDEN)
    assert output.expert_weights.shape == (len(MIXED), 3)


def test_hidden_states_and_attentions_come_out_on_request_and_only_then(kind, artifact):
    model = load(artifact, attn_implementation="eager")
    output = outputs(model, MIXED, kind, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == tiny.LAYERS + 1
    assert len(output.attentions) == tiny.LAYERS
    assert {len(state) for state in (*output.hidden_states, *output.attentions)} == {len(MIXED)}
    plain = outputs(model, MIXED, kind)
    assert plain.hidden_states is None and plain.attentions is None


def test_return_dict_false_gives_the_same_values_as_a_tuple(kind, model):
    output = outputs(model, MIXED, kind)
    as_tuple = outputs(model, MIXED, kind, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for value, expected in zip(as_tuple, output.to_tuple(), strict=True):
        assert torch.equal(value, expected)


# ---- one set of labels for all experts ------------------------------------------------------------------------------


@torch.no_grad()
def test_one_set_of_labels_in_another_id_order_is_matched_by_name(world):
    model, folder = world.model("bert", SAME), world.experts("bert", SAME)
    assert model.config.label2id == {"no": 0, "yes": 1}
    inputs = tiny.batch("bert", 3)
    output = model(**inputs, experts=["a", "b", "c"])
    for i, name in enumerate(SAME):
        own = stock("bert", folder / name)
        expected = own(**row(inputs, i)).logits[0]
        by_name = torch.stack([expected[own.config.label2id[label]] for label in ("no", "yes")])
        assert_close(output.expert_logits[i], by_name, 1e-4)
        assert_close(output.logits[i].exp(), by_name.softmax(dim=0), 1e-4)


@torch.no_grad()
def test_one_set_of_labels_gives_the_mean_of_probabilities_under_mixed_weights(world):
    model, folder = world.model("bert", SAME), world.experts("bert", SAME)
    inputs, weights = tiny.batch("bert", 1), torch.tensor([0.2, 0.3, 0.5])
    output = model(**inputs, expert_weights=weights[None])
    expected = torch.zeros(2)
    for weight, (name, labels) in zip(weights, SAME.items(), strict=True):
        own = dense_logits(model, "bert", folder, weights, name, inputs)[0].softmax(dim=0)
        expected += weight * torch.stack([own[labels.index(label)] for label in ("no", "yes")])
    assert_close(output.logits[0].exp(), expected)


def test_automatic_label_names_are_never_merged(world):
    labels = {"a": ["LABEL_0", "LABEL_1"], "b": ["LABEL_0", "LABEL_1"]}
    model = world.model("bert", labels)
    assert list(model.config.id2label.values()) == ["a/LABEL_0", "a/LABEL_1", "b/LABEL_0", "b/LABEL_1"]


# ---- regression -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_regression_expert_has_its_log_prior_in_logits_and_its_number_in_expert_logits(world):
    model, folder = world.model("bert", WITH_REGRESSION), world.experts("bert", WITH_REGRESSION)
    inputs = tiny.batch("bert", len(MIXED))
    output = model(**inputs, expert_weights=MIXED)
    slot = model.config.label2id["score/LABEL_0"]
    for i, weights in enumerate(MIXED):
        number = dense_logits(model, "bert", folder, weights, "score", row(inputs, i))
        assert_close(output.expert_logits[i, slot], number[0, 0])
        prior = weights[1] / weights.sum() if weights.sum() > 0 else torch.tensor(1 / 3)
        assert_close(output.logits[i, slot].exp(), prior)


@torch.no_grad()
def test_an_artifact_of_regressions_gives_the_weighted_number(world):
    model, folder = world.model("bert", ALL_REGRESSION), world.experts("bert", ALL_REGRESSION)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    inputs = tiny.batch("bert", len(MIXED))
    output = model(**inputs, expert_weights=MIXED)
    assert output.logits.shape == (len(MIXED), 1)
    for i, weights in enumerate(MIXED):
        numbers = [dense_logits(model, "bert", folder, weights, name, row(inputs, i)) for name in ALL_REGRESSION]
        prior = weights / weights.sum() if weights.sum() > 0 else torch.full((3,), 1 / 3)
        assert_close(output.logits[i, 0], (torch.cat(numbers)[:, 0] * prior).sum())


@torch.no_grad()
def test_a_regression_chosen_by_name_gives_its_own_stock_number(world):
    model, folder = world.model("bert", ALL_REGRESSION), world.experts("bert", ALL_REGRESSION)
    inputs = tiny.batch("bert", 3)
    output = model(**inputs, experts=list(ALL_REGRESSION))
    for i, name in enumerate(ALL_REGRESSION):
        assert_close(output.logits[i], stock("bert", folder / name)(**row(inputs, i)).logits[0], 1e-4)


# ---- label names ----------------------------------------------------------------------------------------------------


def test_label_names_and_ids_are_inverse_and_in_the_order_of_the_columns(world, kind, model):
    config = model.config
    assert config.label_names == [config.id2label[i] for i in range(len(config.id2label))]
    assert all(config.label2id[label] == i for i, label in config.id2label.items())
    names = list(itertools.chain(*([f"{name}/{label}" for label in labels] for name, labels in UNION.items())))
    assert config.label_names == names
