"""Every kind of router in a whole build: what it reads, that it survives saving, and what `auto` and `none` do."""

import json
from collections import Counter

import pytest
import torch

from tests import tiny
from tests.conftest import load
from tests.modeling.dense import assert_close, dense_hidden
from tests.modeling.test_routing import LayerCounts
from twin_merging_hf import TwinMergingError
from twin_merging_hf.modeling.routing_twin_merging import masked_mean
from twin_merging_hf.recipe import parse_recipe
from twin_merging_hf.router_choice import Candidate, _winner, candidate_layers, candidates


KINDS = ["centroid", "lexical", "knn"]


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0, 1], [1, 3]])
def test_several_layers_are_read_side_by_side_and_no_more_are_run(world, layers):
    model = world.model("bert", router={"type": "centroid", "layer": layers})
    inputs = tiny.batch("bert", 3)
    with LayerCounts(model) as counts:
        features = model.routing_features(**inputs)
    assert counts == Counter(range(max(layers)))
    states = dense_hidden(model, "bert", world.experts("bert"), torch.zeros(3), inputs).hidden_states
    expected = [masked_mean(states[layer], inputs["attention_mask"]) for layer in layers]
    assert_close(features, torch.cat(expected, dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("router", KINDS)
def test_a_router_is_saved_again_byte_for_byte_and_routes_as_before(world, tmp_path, router):
    folder = world.artifact("bert", router=router)
    model, inputs = load(folder), tiny.batch("bert", 4)
    model.save_pretrained(tmp_path / "again")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    weights = load(tmp_path / "again").route(**inputs)
    assert torch.equal(weights, model.route(**inputs))
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    single = torch.cat([model.route(**{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(4)])
    torch.testing.assert_close(single, weights, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_lexical_router_hears_tokens_and_without_them_is_its_centroids(world):
    model, inputs = world.model("bert", router="lexical"), tiny.batch("bert", 4)
    router = model.router
    assert router.table.any() and router.table.dtype == torch.int8
    features = model.routing_features(**inputs)
    size = model.config.router_input_size
    expected = router.lexical(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(features[:, size:], expected)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with model.mix.applied(None):
        plain = model.routing_features(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    assert not plain[:, size:].any()
    assert_close(plain[:, :size], features[:, :size])


def test_a_lexical_router_is_for_texts(world):
    with pytest.raises(TwinMergingError, match="`router: lexical` looks at the tokens of texts"):
        world.artifact("vit", router="lexical")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_rows_that_the_none_route_takes_are_the_shared_model_s(world, kind):
    model, inputs = world.model(kind, router={"type": "centroid", "none": 0.2}), tiny.batch(kind, 4)
    plain = world.model(kind, router={"type": "centroid"})
    distances = model.router.novelty(model.routing_features(**inputs))
    model.config.router_none_distance = float(distances.sort().values[1:3].mean())
    strange = distances > model.config.router_none_distance
    assert strange.sum() == 2
    output = model(**inputs)
    assert not output.expert_weights[strange].any()
    torch.testing.assert_close(output.expert_weights[~strange], plain.route(**inputs)[~strange])
    assert_close(output.expert_logits[strange], model(**inputs, experts="__shared__").expert_logits[strange])


def test_a_none_route_without_data_is_refused():
    recipe = {"experts": [{"name": "a", "model": "x"}], "router": {"none": True}}
    with pytest.raises(TwinMergingError, match="`router.none` is measured on `data`"):
        parse_recipe(recipe)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_auto_reports_what_it_compared_and_takes_one(world, kind):
    folder = world.artifact(kind, router="auto")
    config = load(folder).config
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))["router"]
    chosen = [entry for entry in report["comparison"] if entry["chosen"]]
    assert len(chosen) == 1 and chosen[0]["pass"] == "prefix"
    assert (chosen[0]["type"], chosen[0]["layers"]) == (config.router_type, config.state_layers)
    assert report["accuracy"] == pytest.approx(chosen[0]["accuracy"], abs=1e-4)
    types = {entry["type"] for entry in report["comparison"]}
    assert types == {"linear", "centroid", "knn", "mlp"} | ({"lexical"} if kind == "bert" else set())


def measured(*figures: tuple[int, float]) -> list[tuple[Candidate, dict]]:
    return [
        (Candidate("linear", (layer,), "prefix"), {"accuracy": accuracy, "negative_log_likelihood": 0.0})
        for layer, accuracy in figures
    ]


def test_the_cheapest_within_one_standard_error_wins():
    # 0.9 of 900 rows: one standard error is 0.01.
    assert _winner(measured((0, 0.885), (1, 0.891), (3, 0.9)), 900).layers == (1,)
    assert _winner(measured((0, 0.885), (1, 0.889), (3, 0.9)), 900).layers == (3,)
    full = (Candidate("mlp", (), "full"), {"accuracy": 0.915, "negative_log_likelihood": 0.0})
    assert _winner([*measured((2, 0.9)), full], 900).layers == (2,)
    assert _winner([full], 900).router_pass == "full"


def test_candidates_read_what_they_say():
    assert candidate_layers(6) == (0, 1, 2, 3, 4, 5) and candidate_layers(2) == (0, 1)
    assert candidate_layers(32) == (0, 5, 10, 16, 21, 26)
    kinds = Counter(c.type for c in candidates((0, 1), 8, text=False))
    assert kinds == {"linear": 3, "centroid": 4, "knn": 1, "mlp": 1}
    assert Counter(c.type for c in candidates((0, 1), 8, text=True))["lexical"] == 2
    assert not any(c.type == "mlp" for c in candidates((0, 1), 4096, text=False))
