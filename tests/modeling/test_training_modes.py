"""Activation checkpointing and compilation change how a model runs, never what it computes."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests import tiny
from tests.modeling.dense import MIXED, assert_close
from tests.modeling.shallow import shallow


LABELS = torch.tensor([0, 6, 3, 2, 5, 4])
ROWS = len(MIXED)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(mine: dict, expected: dict, least: int = 100) -> None:
    assert mine.keys() == expected.keys() and len(mine) > least
    for name, value in expected.items():
        assert torch.allclose(mine[name], value, atol=1e-6, rtol=1e-4), name


def training(world: Any, kind: str, checkpointing: dict | None) -> Any:
    """A model in training mode without dropout, with or without activation checkpointing."""
    model = without_dropout(world.model(kind).train())
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing or None)
    return model


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout_prob", None), float):
            module.dropout_prob = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


# ---- activation checkpointing ---------------------------------------------------------------------------------------

MODES = {"default": {}, "not reentrant": {"use_reentrant": False}}


class Recomputes:
    """Counts runs of the first layer's own parts."""

    def __init__(self, model: Any):
        layer = model.shared.get_submodule(model.config.layers_path)[0]
        part = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm))
        self.count = 0
        part.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("weights", [None, MIXED], ids=["routed", "given"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_activation_checkpointing_gives_the_same_gradients(world, kind, mode, weights):
    inputs, found = tiny.batch(kind, ROWS), []
    for checkpointing in (None, mode):
        model = training(world, kind, checkpointing)
        runs = Recomputes(model)
        loss = model(**inputs, labels=LABELS, expert_weights=weights).loss
        before = runs.count
        loss.backward()
        assert (runs.count > before) == (checkpointing is not None)  # it does recompute, else this shows nothing
        found.append((loss.detach(), gradients(model)))
    assert_close(found[1][0], found[0][0], 1e-6)
    assert_same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize("weights", [None, MIXED], ids=["routed", "given"])
def test_reentrant_checkpointing_is_right_or_refused_by_name(world, weights):
    expected = training(world, "bert", None)
    expected(**tiny.batch("bert", ROWS), labels=LABELS, expert_weights=weights).loss.backward()
    try:
        model = training(world, "bert", {"use_reentrant": True})
        model(**tiny.batch("bert", ROWS), labels=LABELS, expert_weights=weights).loss.backward()
    except ValueError as error:
        assert "use_reentrant" in str(error)
    else:
        assert_same_gradients(gradients(model), gradients(expected))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_two_forwards_before_one_backward_keep_their_own_weights_under_checkpointing(world, kind):
    inputs, found = tiny.batch(kind, 2), []
    for checkpointing in (None, {}):
        model = training(world, kind, checkpointing)
        losses = [model(**inputs, labels=LABELS[:2], experts=name).loss for name in ("a", "c")]
        sum(losses).backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_a_forward_of_another_batch_size_between_does_not_disturb_checkpointing(world):
    found = []
    for checkpointing in (None, {}):
        model = training(world, "bert", checkpointing)
        loss = model(**tiny.batch("bert", 3), labels=LABELS[:3], expert_weights=MIXED[3:6]).loss
        model(**tiny.batch("bert", 2), experts="b")
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_use_experts_holds_for_the_recomputation_too(world):
    inputs, found = tiny.batch("bert", 2), []
    for checkpointing in (None, {}):
        model = training(world, "bert", checkpointing)
        with model.use_experts("c"):
            loss = model(**inputs, labels=LABELS[:2]).loss
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_a_copy_of_a_checkpointing_model_recomputes_with_its_own_weights(world):
    inputs, found = tiny.batch("bert", 2), []
    for checkpointing in (None, {}):
        model = copy.deepcopy(training(world, "bert", checkpointing))
        model(**inputs, labels=LABELS[:2], experts="c").loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_activation_checkpointing_can_be_switched_off_again(world):
    inputs, model = tiny.batch("bert", 2), training(world, "bert", {})
    model.gradient_checkpointing_disable()
    runs = Recomputes(model)
    model(**inputs, labels=LABELS[:2], experts="c").loss.backward()
    assert runs.count == 1


# ---- compilation ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_gives_equal_outputs_for_any_given_weights_without_compiling_again(kind, model):
    model, inputs, counter = shallow(model), tiny.batch(kind, ROWS), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    random = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(0)) / 3
    for weights in (MIXED, MIXED.flip(0), random):
        expected, output = (m(**inputs, expert_weights=weights) for m in (model, compiled))
        assert_close(output.logits, expected.logits)
        assert_close(output.expert_logits, expected.expert_logits)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_model_gives_equal_outputs_for_routed_rows(kind, model):
    model, counter = shallow(model), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        inputs = tiny.batch(kind, ROWS, seed)
        expected, output = model(**inputs), compiled(**inputs)
        assert_close(output.expert_weights, expected.expert_weights)
        assert_close(output.expert_logits, expected.expert_logits)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_model_gives_equal_outputs_for_names(bert):
    model, inputs = shallow(bert), tiny.batch("bert", 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, output = (m(**inputs, experts=["a", "c", "__shared__"]) for m in (model, compiled))
    assert_close(output.expert_logits, expected.expert_logits)


@torch.no_grad()
def test_a_compiled_model_gives_equal_outputs_for_left_padding(bert):
    model, inputs = shallow(bert), tiny.batch("bert", ROWS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    left = {name: value.flip(1) for name, value in inputs.items()}
    assert (left["attention_mask"][:, 0] == 0).any() and (left["attention_mask"][:, 0] == 1).any()
    expected, output = model(**left), compiled(**left)
    assert_close(output.expert_weights, expected.expert_weights)
    assert_close(output.expert_logits, expected.expert_logits)


@torch.no_grad()
def test_a_compiled_model_gives_equal_outputs_for_pictures_of_another_size(models):
    model, inputs = shallow(models("vit")), tiny.image_batch(ROWS, size=24)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    options = {"expert_weights": MIXED, "interpolate_pos_encoding": True}
    assert_close(compiled(**inputs, **options).expert_logits, model(**inputs, **options).expert_logits)


@torch.no_grad()
def test_a_compiled_model_obeys_use_experts_and_forgets_it_after(bert):
    model, inputs = shallow(bert), tiny.batch("bert", 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    routed = compiled(**inputs).expert_weights
    with model.use_experts("c"):
        assert torch.equal(compiled(**inputs).expert_weights, torch.eye(3)[[2, 2, 2]])
    assert_close(compiled(**inputs).expert_weights, routed)


@torch.no_grad()
def test_a_compiled_call_leaves_nothing_behind_for_eager_calls(bert):
    model, inputs = shallow(bert), tiny.batch("bert", 3)
    expected = model.shared.base_model(**inputs).last_hidden_state
    torch.compile(model, fullgraph=True, backend="eager")(**inputs, experts="c")
    assert torch.equal(model.shared.base_model(**inputs).last_hidden_state, expected)
    with model.use_experts("a"):
        assert torch.equal(model(**inputs).expert_weights, torch.eye(3)[[0, 0, 0]])


def test_a_compiled_model_has_the_same_gradients(bert):
    inputs, found = tiny.batch("bert", ROWS), []
    for compiling in (False, True):
        model = shallow(bert)
        run = torch.compile(model, fullgraph=True, backend="eager") if compiling else model
        run(**inputs, labels=LABELS, expert_weights=MIXED).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], least=50)


def test_a_compiled_model_with_checkpointing_has_the_same_gradients(bert):
    # Not as one graph: Transformers' own warning about caches, which checkpointing evokes, breaks it.
    inputs, found = tiny.batch("bert", ROWS), []
    for compiling in (False, True):
        model = without_dropout(shallow(bert).train())
        if compiling:
            model.gradient_checkpointing_enable()
        run = torch.compile(model, backend="aot_eager") if compiling else model
        run(**inputs, labels=LABELS, expert_weights=MIXED).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], least=50)


def break_graph(*_: Any) -> None:
    """A forward pre-hook that no graph can hold, as users' own hooks may be."""
    torch._dynamo.graph_break()


@pytest.mark.parametrize(("weights", "grad"), [(None, False), (MIXED, True)], ids=["routed", "given, with gradients"])
def test_a_graph_that_breaks_inside_the_shared_model_changes_nothing(bert, weights, grad):
    model, inputs = shallow(bert), tiny.batch("bert", ROWS)
    with torch.set_grad_enabled(grad):
        expected = model(**inputs, expert_weights=weights)
        model.shared.get_submodule(model.config.layers_path)[0].attention.register_forward_pre_hook(break_graph)
        output = torch.compile(model, backend="eager")(**inputs, expert_weights=weights)
    assert_close(output.expert_weights, expected.expert_weights)
    assert_close(output.expert_logits, expected.expert_logits)
