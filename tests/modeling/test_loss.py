"""Losses and gradients: the wrapper's own loss over the union of labels, and what learns from it."""

from typing import Any

import pytest
import torch

from tests import tiny
from tests.modeling.dense import MIXED, assert_close
from tests.modeling.test_outputs import ALL_REGRESSION, SAME, WITH_REGRESSION


ROWS = len(MIXED)
LABELS = torch.tensor([0, 6, 3, 2, 5, 4])
NUMBERS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5, -0.25])


def call(model: Any, labels: torch.Tensor | None, kind: str = "bert", **kwargs: Any) -> Any:
    return model(**tiny.batch(kind, ROWS), labels=labels, **kwargs)


# ---- classes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, MIXED], ids=["routed", "given"])
def test_the_loss_is_the_mean_negative_logit_of_the_labels(kind, model, weights):
    output = call(model, LABELS, kind, expert_weights=weights)
    assert_close(output.loss, -output.logits[torch.arange(ROWS), LABELS].mean())


@torch.no_grad()
def test_the_loss_of_one_set_of_labels_is_the_mean_negative_logit_too(world):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    output = call(world.model("bert", SAME), labels, expert_weights=MIXED)
    assert_close(output.loss, -output.logits[torch.arange(ROWS), labels].mean())


@torch.no_grad()
def test_the_loss_is_high_where_another_expert_owns_the_label(bert):
    right = call(bert, torch.full((ROWS,), 6), experts="c").loss
    wrong = call(bert, torch.full((ROWS,), 6), experts="a").loss
    assert right < 2 and wrong > 50
    assert torch.isfinite(wrong)


@torch.no_grad()
def test_labels_of_minus_100_are_left_out(bert):
    labels = LABELS.clone()
    labels[1::2] = -100
    output = call(bert, labels, expert_weights=MIXED)
    assert_close(output.loss, -output.logits[torch.arange(0, ROWS, 2), LABELS[::2]].mean())


@torch.no_grad()
def test_num_items_in_batch_divides_the_sum_of_losses(bert):
    mean = call(bert, LABELS, expert_weights=MIXED).loss
    assert_close(call(bert, LABELS, expert_weights=MIXED, num_items_in_batch=24).loss, mean * ROWS / 24)


@torch.no_grad()
def test_the_loss_stands_first_in_the_tuple(bert):
    loss, logits, *_ = call(bert, LABELS, expert_weights=MIXED, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (ROWS, 7)


def test_labels_of_another_number_of_rows_are_refused(bert):
    with pytest.raises(ValueError):
        call(bert, LABELS[:3])


# ---- regression -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_float_labels_give_the_mean_squared_error_of_the_regression_s_number(world):
    model = world.model("bert", WITH_REGRESSION)
    output = call(model, NUMBERS, experts="score")
    number = output.expert_logits[:, model.config.label2id["score/LABEL_0"]]
    assert_close(output.loss, (number - NUMBERS).pow(2).mean())


@torch.no_grad()
def test_an_artifact_of_regressions_has_the_squared_error_of_its_logits(world):
    output = call(world.model("bert", ALL_REGRESSION), NUMBERS, expert_weights=MIXED)
    assert_close(output.loss, (output.logits[:, 0] - NUMBERS).pow(2).mean())


@torch.no_grad()
def test_class_labels_of_a_mixed_artifact_have_their_own_loss(world):
    model = world.model("bert", WITH_REGRESSION)
    labels = torch.tensor([0, 1, 3, 4, 5, 0])
    output = call(model, labels, expert_weights=MIXED)
    assert_close(output.loss, -output.logits[torch.arange(ROWS), labels].mean())


def test_a_batch_that_mixes_regression_and_classes_is_refused(world):
    model = world.model("bert", WITH_REGRESSION)
    slot = model.config.label2id["score/LABEL_0"]
    with pytest.raises(ValueError, match="cannot mix regression and classes"):
        call(model, torch.tensor([0, 1, slot, 4, 5, 0]), expert_weights=MIXED)
    with pytest.raises(ValueError, match="cannot mix regression and classes"):
        call(model, NUMBERS, experts=["score", "a", "score", "score", "score", "score"])


def test_float_labels_without_a_regression_expert_are_refused(bert):
    with pytest.raises(ValueError, match="float labels need a regression expert"):
        call(bert, NUMBERS)


@pytest.mark.parametrize("experts", [ALL_REGRESSION, WITH_REGRESSION], ids=["all", "one"])
def test_float_labels_of_another_number_of_rows_are_refused(world, experts):
    name = next(name for name, labels in experts.items() if len(labels) == 1)
    for labels in (NUMBERS[:1], NUMBERS[:4]):
        with pytest.raises((ValueError, RuntimeError)):
            call(world.model("bert", experts), labels, experts=name)


# ---- gradients ------------------------------------------------------------------------------------------------------

EVEN = torch.full((1, 3), 1 / 3)


def is_invariant(name: str) -> bool:
    """Attention is the same whatever is added to all keys, so key biases have no gradient, here as in stock models."""
    return any(key in name for key in ("-key-bias", "-k_lin-bias", "-k_proj-bias")) and name.endswith(".delta")


def test_gradients_reach_every_delta_and_every_head(world, kind):
    model = world.model(kind)
    call(model, LABELS, kind, expert_weights=EVEN).loss.backward()
    checked = 0
    for name, parameter in model.named_parameters():
        if name.startswith("deltas.") or ".heads." in name:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert is_invariant(name) or parameter.grad.abs().max() > 1e-9, name
            checked += 1
    assert checked > 60


def test_gradients_of_one_expert_s_rows_stay_out_of_the_other_experts(world, kind):
    model = world.model(kind)
    call(model, torch.zeros(ROWS, dtype=torch.long), kind, experts="a").loss.backward()
    for name, ranks in model.config.ranks.items():
        delta = model.deltas[name.replace(".", "-")]
        assert delta.up.grad[:, ranks[0] :].abs().max() == 0, name
        assert delta.down.grad[ranks[0] :].abs().max() == 0, name
        assert delta.up.grad[:, : ranks[0]].abs().max() > 0, name
    for name in model.config.exact_deltas:
        assert model.deltas[name.replace(".", "-")].delta.grad[1:].abs().max() == 0, name


def test_a_routed_loss_teaches_the_router(world, kind):
    model = world.model(kind)
    torch.nn.init.zeros_(model.router.classifier.weight)  # undecided: a softmax that is sure has no gradient
    torch.nn.init.zeros_(model.router.classifier.bias)
    call(model, LABELS, kind).loss.backward()
    assert model.router.classifier.weight.grad.abs().max() > 0


def test_gradients_reach_weights_that_the_caller_gives(bert):
    weights = EVEN.repeat(ROWS, 1).requires_grad_()
    call(bert, LABELS, expert_weights=weights).loss.backward()
    assert weights.grad.abs().amax(dim=1).min() > 0
    bert.zero_grad(set_to_none=True)


def test_the_gradient_of_a_factor_is_that_of_the_dense_weight(world):
    model = world.model("bert")
    inputs, weights = tiny.batch("bert", 1), torch.tensor([[0.5, 0.2, 0.1]])
    model(**inputs, labels=LABELS[:1], expert_weights=weights).loss.backward()
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    delta, dense = model.deltas[name.replace(".", "-")], model.get_parameter(f"shared.{name}").grad
    start = 0
    for t, rank in enumerate(model.config.ranks[name]):
        block = slice(start, start + rank)
        start += rank
        assert_close(delta.up.grad[:, block], weights[0, t] * dense @ delta.down[block].T)
        assert_close(delta.down.grad[block], weights[0, t] * delta.up[:, block].T @ dense)


@pytest.mark.parametrize("weights", [None, EVEN], ids=["routed", "given"])
def test_a_few_steps_on_union_labels_lower_the_loss(world, kind, weights):
    model = world.model(kind)  # in eval mode: without dropout the loss of a step is the loss of the model
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = call(model, LABELS, kind, expert_weights=weights).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_a_few_steps_on_numbers_lower_the_loss(world):
    model = world.model("bert", ALL_REGRESSION)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = call(model, NUMBERS, expert_weights=EVEN).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("router", [{}, {"router": "mlp"}], ids=["linear", "mlp"])
def test_a_model_in_training_mode_routes_a_single_row(world, router):
    model = world.model("bert", **router).train()
    inputs = tiny.batch("bert", 1)
    loss = model(**inputs, labels=LABELS[:1]).loss
    assert torch.isfinite(loss)
