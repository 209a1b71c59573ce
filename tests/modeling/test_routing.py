"""Routers and the pass that feeds them: padding, temperature, top-k, and how far the shared model runs."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests import tiny
from tests.modeling.dense import MIXED, assert_close, dense_hidden
from twin_merging_hf.modeling import TwinMergingConfig, TwinMergingModel
from twin_merging_hf.modeling.routing_twin_merging import (
    LinearRouter,
    MLPRouter,
    ProjectionRouter,
    masked_mean,
    new_router,
    weights_from_logits,
)


# ---- pooling --------------------------------------------------------------------------------------------------------


def test_masked_mean_is_the_mean_of_each_row_s_valid_tokens():
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    pooled = masked_mean(hidden, mask)
    assert_close(pooled[0], hidden[0, :3].mean(dim=0))
    assert_close(pooled[1], hidden[1, 1])
    assert_close(masked_mean(hidden, None), hidden.mean(dim=1))


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_masked_mean_ignores_whatever_stands_in_padding(rubbish):
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = masked_mean(hidden, mask)
    hidden[0, 2:] = rubbish
    assert torch.equal(masked_mean(hidden, mask), expected)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_masks_of_every_type_mean_the_same(dtype):
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(masked_mean(hidden, mask.to(dtype)), masked_mean(hidden, mask))


def test_a_row_without_valid_tokens_pools_to_zero():
    assert torch.equal(masked_mean(torch.randn(1, 4, 3), torch.zeros(1, 4)), torch.zeros(1, 3))


def test_projection_shares_lie_between_0_and_1_and_ignore_padding():
    router = ProjectionRouter(6, experts=2, rank=2)
    with torch.no_grad():
        router.basis.copy_(torch.linalg.qr(torch.randn(6, 4)).Q.T.reshape(2, 2, 6))
    inside = router.basis[1].sum(dim=0)  # a state that lies in the second expert's subspace
    hidden = torch.stack([inside, torch.full((6,), float("nan"))])[None]
    shares = router.features(hidden, torch.tensor([[1, 0]]))
    assert_close(shares, torch.tensor([[0.0, 1.0]]))
    random = router.features(torch.randn(50, 3, 6), None)
    assert random.min() >= 0 and random.max() <= 1


# ---- weights --------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, 1.0]])


def test_weights_are_a_softmax_at_the_temperature():
    for temperature in (0.25, 1.0, 8.0):
        assert_close(weights_from_logits(LOGITS, temperature, None), (LOGITS / temperature).softmax(dim=1))


def test_a_lower_temperature_is_surer_and_a_higher_one_more_even():
    largest = [float(weights_from_logits(LOGITS, t, None).max()) for t in (0.01, 0.5, 1.0, 5.0, 1000.0)]
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0.999 and largest[-1] < 0.26


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_the_largest_and_renormalises(top_k):
    weights = weights_from_logits(LOGITS, 1.0, top_k)
    kept = weights > 0
    assert (kept.sum(dim=1) == top_k).all()
    full = LOGITS.softmax(dim=1)
    assert_close(weights, torch.where(kept, full, 0) / torch.where(kept, full, 0).sum(dim=1, keepdim=True))
    assert torch.equal(kept, full >= full.topk(top_k, dim=1).values[:, -1:])


def test_top_k_of_all_or_more_changes_nothing():
    for top_k in (4, 5, None):
        assert torch.equal(weights_from_logits(LOGITS, 1.0, top_k), LOGITS.softmax(dim=1))


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert (weights_from_logits(torch.zeros(2, 4), 1.0, 2) > 0).sum().item() == 4


def test_gradients_pass_through_top_k():
    logits = LOGITS.clone().requires_grad_()
    weights_from_logits(logits, 1.0, 2)[:, 0].sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "expected"), [("linear", LinearRouter), ("mlp", MLPRouter), ("projection", ProjectionRouter)]
)
def test_each_router_type_is_made_for_the_config_s_experts(kind, expected):
    config = SimpleNamespace(
        router_type=kind, router_input_size=6, router_rank=2, router_none_distance=None, experts=[{}] * 3
    )
    router = new_router(config).eval()
    assert type(router) is expected
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        assert router(torch.randn(4, 5, 6), torch.ones(4, 5)).shape == (4, 3)


# ---- the pass -------------------------------------------------------------------------------------------------------


class LayerCounts:
    """Counts how often each layer of the shared model runs to its end."""

    def __init__(self, model: Any):
        layers = model.shared.get_submodule(model.config.layers_path)
        self.counts: Counter = Counter()
        self.handles = [
            layer.register_forward_hook(lambda *_, i=i: self.counts.update([i])) for i, layer in enumerate(layers)
        ]

    def __enter__(self) -> Counter:
        return self.counts

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def rerouted(world: Any, kind: str, **fields: Any) -> Any:
    """A model that reads its routing state elsewhere (its router is not trained for that, which is no matter here)."""
    config = TwinMergingConfig.from_pretrained(world.artifact(kind))
    for name, value in fields.items():
        setattr(config, name, value)
    return TwinMergingModel.from_pretrained(world.artifact(kind), config=config).eval()


@torch.no_grad()
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_a_prefix_pass_runs_exactly_k_layers_and_gives_the_shared_state_there(world, kind, layer):
    model, inputs = rerouted(world, kind, router_layer=layer), tiny.batch(kind, 3)
    with LayerCounts(model) as counts:
        features = model.routing_features(**inputs)
    assert counts == Counter(range(layer))
    states = dense_hidden(model, kind, world.experts(kind), torch.zeros(3), inputs).hidden_states
    assert_close(features, masked_mean(states[layer], inputs.get("attention_mask")))
    assert_close(model.routing_logits(**inputs), model.router.score(features))


@torch.no_grad()
def test_a_full_pass_runs_all_layers_and_gives_the_last_shared_state(world, kind):
    model, inputs = rerouted(world, kind, router_pass="full", router_layer=None), tiny.batch(kind, 3)
    with LayerCounts(model) as counts:
        features = model.routing_features(**inputs)
    assert counts == Counter(range(tiny.LAYERS))
    last = dense_hidden(model, kind, world.experts(kind), torch.zeros(3), inputs).last_hidden_state
    assert_close(features, masked_mean(last, inputs.get("attention_mask")))


@torch.no_grad()
def test_a_routed_call_costs_the_prefix_and_a_given_call_does_not(kind, model):
    inputs = tiny.batch(kind, 2)
    with LayerCounts(model) as counts:
        model(**inputs)
    assert [counts[i] for i in range(tiny.LAYERS)] == [2, 2, 1, 1]
    for call in ({"experts": "a"}, {"expert_weights": MIXED[:2]}, {"experts": "all"}):
        with LayerCounts(model) as counts:
            model(**inputs, **call)
        assert [counts[i] for i in range(tiny.LAYERS)] == [1, 1, 1, 1]
    with model.use_experts("a"), LayerCounts(model) as counts:
        model(**inputs)
    assert sum(counts.values()) == tiny.LAYERS


@torch.no_grad()
def test_the_route_is_read_from_the_shared_model_whatever_experts_are_in_use(kind, model):
    inputs = tiny.batch(kind, 3)
    expected = model.route(**inputs)
    with model.use_experts("c"):
        assert torch.equal(model.route(**inputs), expected)
    assert torch.equal(model(**inputs).expert_weights, expected)


@torch.no_grad()
def test_the_route_uses_the_config_s_temperature_and_top_k(world):
    model, inputs = world.model("bert"), tiny.batch("bert", 4)
    logits = model.routing_logits(**inputs)
    model.config.router_temperature, model.config.router_top_k = 3.0, 2
    assert_close(model.route(**inputs), weights_from_logits(logits, 3.0, 2))
    assert (model(**inputs).expert_weights > 0).sum(dim=1).tolist() == [2] * 4


def test_routing_leaves_no_graph_of_the_shared_pass(bert):
    hidden_has_graph = bert.routing_features(**tiny.batch("bert", 2)).requires_grad
    assert not hidden_has_graph


@torch.no_grad()
def test_routing_by_embeddings_equals_routing_by_ids(models):
    model, inputs = models("bert"), tiny.batch("bert", 3)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    by_embeddings = model.route(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    assert_close(by_embeddings, model.route(**inputs))


def test_a_mask_that_is_no_batch_of_tokens_is_refused_where_a_route_is_needed(bert):
    inputs = tiny.batch("bert", 2)
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :]
    with pytest.raises(ValueError, match=r"\[batch, token\].*or give `experts`"):
        bert(**inputs)


@torch.no_grad()
def test_rows_of_a_task_go_to_its_expert(world, kind, model):
    # The point of it all: the tiny tasks can be told apart, and are.
    folder = world.experts(kind)
    for index, name in enumerate(tiny.LABELS):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        if kind == "vit":
            processor = AutoImageProcessor.from_pretrained(world.artifact(kind))
            pictures = [tiny.picture(index, i + 1000 * index) for i in range(len(rows))]
            inputs = processor(images=pictures, return_tensors="pt")
        else:
            tokenizer = AutoTokenizer.from_pretrained(world.artifact(kind))
            inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
            inputs.pop("token_type_ids", None)
        chosen = model.route(**inputs).argmax(dim=1)
        assert (chosen == index).float().mean() > 0.8
