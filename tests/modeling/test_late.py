"""Theorem: a `late` pass routes as a `prefix` pass would and answers as with those weights given, and runs no layer twice."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests import files, tiny
from tests.modeling.dense import MIXED, assert_close, columns, dense_logits, row
from tests.modeling.test_training_modes import LABELS, assert_same_gradients, gradients, without_dropout
from twin_merging_hf.late import WHY


LAYER = 2
FAMILIES = ["bert", "vit", "gpt2", "llama"]
ROWS = len(MIXED)


def late(world: Any, kind: str, **router: Any) -> Any:
    return world.model(kind, router={"type": "linear", "pass": "late", "layer": LAYER, "temperature": 5.0, **router})


def forward_counts(model: Any) -> list[int]:
    """How often each layer ran, counted from now on."""
    layers = model.shared.get_submodule(model.config.layers_path)
    counts = [0] * len(layers)

    def count(index: int):
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(count(index))
    return counts


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_routes_and_answers_as_two_would(world, family):
    model, inputs = late(world, family), tiny.batch(family, ROWS)
    weights = model.route(**inputs)
    expected = model(**inputs, expert_weights=weights)
    counts = forward_counts(model)
    output = model(**inputs)
    assert counts == [1] * tiny.LAYERS
    assert_close(output.expert_weights, weights, 1e-6)
    assert_close(output.expert_logits, expected.expert_logits)
    assert (output.expert_weights[0] - output.expert_weights[1]).abs().max() > 1e-3, "rows that are routed alike"
    for i in range(ROWS):
        alone = model(**row(inputs, i))
        assert_close(alone.expert_logits, output.expert_logits[i : i + 1])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_act_from_the_routing_layer_on_and_nowhere_below(world, family):
    model, inputs = late(world, family), tiny.batch(family, ROWS)
    path = model.config.layers_path
    names = [*model.config.ranks, *model.config.exact_deltas]
    below = tuple(f"{path}.{i}." for i in range(LAYER))
    assert names and not [name for name in names if name.startswith(below) or "embeddings" in name or "wte" in name]
    assert [name for name in names if name.startswith(f"{path}.{LAYER}.")]
    assert [name for name in names if not name.startswith(f"{path}.")], "what comes after the layers keeps its deltas"
    output = model(**inputs, expert_weights=MIXED)
    for i, weights in enumerate(MIXED):
        expected = dense_logits(model, family, world.experts(family), weights, "b", row(inputs, i))
        assert_close(output.expert_logits[i : i + 1, columns(model, "b")], expected)


def test_what_is_left_out_is_reported_with_its_energy(world):
    folder = world.artifact("bert", router={"type": "linear", "pass": "late", "layer": LAYER})
    report = files.read_json(folder / "report.json")
    entry = report["tensors"]["bert.encoder.layer.0.output.dense.weight"]
    assert entry["treatment"] == "excluded" and entry["why"] == WHY and entry["dropped_energy"] > 0
    assert report["tensors"][f"bert.encoder.layer.{LAYER}.output.dense.weight"]["treatment"] == "factored"
    assert report["exclusive"]["relative_error"] > 0.1
    assert "experts act from layer 2 on" in (folder / "README.md").read_text(encoding="utf-8")


@torch.no_grad()
def test_left_padding_changes_nothing(world):
    model, inputs = late(world, "bert"), tiny.text_batch(ROWS)
    left = {name: value.flip(1).clone() for name, value in inputs.items()}
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        left["input_ids"][i, -length:] = inputs["input_ids"][i, :length]
    expected, output = model(**inputs), model(**left)
    assert_close(output.expert_weights, expected.expert_weights)
    assert_close(output.expert_logits, expected.expert_logits)


@torch.no_grad()
def test_plans_reach_the_second_half(world):
    model, inputs = late(world, "bert"), tiny.text_batch(ROWS)
    expected = model(**inputs)
    for plan in ("factored", "gathered", "materialised"):
        with model.use_plan(plan):
            assert_close(model(**inputs).expert_logits, expected.expert_logits)


@torch.no_grad()
def test_it_compiles_to_one_graph_that_serves_every_mix(world):
    model, counter = late(world, "bert"), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        inputs = tiny.batch("bert", ROWS, seed)
        expected, output = model(**inputs), compiled(**inputs)
        assert_close(output.expert_weights, expected.expert_weights)
        assert_close(output.expert_logits, expected.expert_logits)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_gradients_are_those_of_given_weights_and_survive_checkpointing(world):
    inputs, found = tiny.batch("bert", ROWS), []
    for checkpointing in (False, True):
        model = without_dropout(late(world, "bert").train())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=LABELS).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], least=50)
    assert any(name.startswith("router.") for name in found[0]), "the router learns"


@pytest.mark.parametrize(
    "router", [{"type": "projection"}, {"type": "auto"}, {"type": "auto", "layer": [1, LAYER]}], ids=str
)
def test_other_routers_fit_in(world, router):
    data = {} if router["type"] == "auto" else {"data": False}
    model = world.model("bert", router={"pass": "late", "layer": LAYER, **router}, **data)
    assert model.config.router_pass == "late" and model.config.router_layer == LAYER
    inputs = tiny.text_batch(ROWS)
    counts = forward_counts(model)
    with torch.no_grad():
        output = model(**inputs)
    assert counts == [1] * tiny.LAYERS
    assert_close(output.expert_weights, model.route(**inputs).detach(), 1e-6)
