"""Merges of aligned models, and zip: exact for duplicates where it is allowed, refused elsewhere (T9, T10)."""

import copy

import numpy as np
import pytest
import torch

from tests.alignment import zoo
from twin_merging_hf.alignment import merge_models, reestimate_batch_norm
from twin_merging_hf.alignment.verification import outputs
from twin_merging_hf.alignment.zipping import memberships, zip_sites, zip_units
from twin_merging_hf.errors import TwinMergingError


def _load(merge, name, batches=None):
    model = zoo.fresh(name)
    merge.apply(model, batches)
    return model


@pytest.mark.parametrize("weight_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", zoo.ONE_OF_EACH)
def test_the_average_with_a_planted_copy_is_the_model_itself(name, weight_share):
    copied, _ = zoo.planted(name, seed=4)
    merge = merge_models([zoo.model(name), copied], zoo.batches(name), weight_share=weight_share)
    for key, tensor in zoo.model(name).state_dict().items():
        torch.testing.assert_close(merge.state[key], tensor, rtol=1e-5, atol=1e-6)


def test_the_plain_average_moves_nothing():
    one, other = zoo.model("bert"), zoo.model("bert", seed=1)
    merge = merge_models([one, other], mode="average")
    for key, tensor in merge.state.items():
        torch.testing.assert_close(tensor, (one.state_dict()[key] + other.state_dict()[key]) / 2)
    assert merge.alignments == [None, None] and merge.matrices == {}


@pytest.mark.parametrize("name", ["bert", "llama-gqa2-biases", "resnet-basic", "vit", "gpt2-tied"])
def test_zipping_a_planted_copy_gives_the_model_back(name):
    # Every cluster is a unit and its copy: the zip is the alignment.
    copied, _ = zoo.planted(name, seed=4)
    merge = merge_models([zoo.model(name), copied], zoo.batches(name), mode="zip")
    assert merge.matrices
    merged = zoo.fresh(name)
    merged.load_state_dict(merge.state)
    batch = zoo.batches(name)[0]
    expected = outputs(zoo.model(name), batch)
    assert float((outputs(merged, batch) - expected).abs().max() / expected.abs().max()) < 1e-5


def _paired(name: str, seed: int, kind: str):
    """A model of which the other tensors are those of `zoo.model(name)`, with every second unit a duplicate of the one before."""
    model, other = zoo.fresh(name), zoo.fresh(name, seed=seed)
    for layer, source in zip(model.bert.encoder.layer, other.bert.encoder.layer, strict=True):
        own = (layer.intermediate.dense, layer.output.dense) if kind == "ff" else _attention(layer)
        theirs = (source.intermediate.dense, source.output.dense) if kind == "ff" else _attention(source)
        with torch.no_grad():
            own[0].weight.copy_(theirs[0].weight[_halves(len(theirs[0].weight))])
            own[0].bias.copy_(theirs[0].bias[_halves(len(theirs[0].bias))])
            own[1].weight.copy_(theirs[1].weight[:, _halves(theirs[1].weight.shape[1])])
    return model


def _attention(layer):
    return layer.attention.self.value, layer.attention.output.dense


def _halves(size: int) -> torch.Tensor:
    return torch.arange(size) // 2 * 2


@pytest.mark.parametrize("kind", ["ff", "vo"])
def test_zip_is_exact_for_duplicates(kind):
    one, other = _paired("bert", 5, kind), _paired("bert", 6, kind)
    merge = merge_models(
        [one, other], zoo.batches("bert"), mode="zip", sites=[f"{kind}.0", f"{kind}.1"], weight_share=1.0
    )
    assert set(merge.matrices) == {f"{kind}.0", f"{kind}.1"}
    merged = _load(merge, "bert")
    x = torch.randn(5, 32)
    for layers in zip(*(model.bert.encoder.layer for model in (merged, one, other)), strict=True):
        if kind == "ff":
            found, a, b = (layer.output.dense(torch.relu(layer.intermediate.dense(x))) for layer in layers)
        else:
            # A mean over tokens stands for attention: any mixing of them with weights that sum to 1.
            found, a, b = (layer.attention.output.dense(layer.attention.self.value(x).mean(0)) for layer in layers)
        torch.testing.assert_close(found, (a + b) / 2, rtol=1e-5, atol=1e-5)


def test_the_average_of_the_same_duplicates_is_not_exact():
    one, other = _paired("bert", 5, "ff"), _paired("bert", 6, "ff")
    merged = _load(merge_models([one, other], zoo.batches("bert"), max_sweeps=1), "bert")
    x = torch.randn(5, 32)
    layers = [model.bert.encoder.layer[0] for model in (merged, one, other)]
    found, a, b = (layer.output.dense(torch.relu(layer.intermediate.dense(x))) for layer in layers)
    assert float((found - (a + b) / 2).detach().abs().max()) > 0.05


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("bert", "res", "statistics count every channel"),
        ("bert", "qk.0", "multiplied with each other"),
        ("bert", "h.0", "normalised one by one"),
        ("llama-gqa2-biases", "qk.0", "rotary"),
        ("llama-gqa1-tied", "res", "statistics"),
        ("bit", "c.stem", "statistics"),
        ("bert", "nowhere", "no site 'nowhere'"),
    ],
)
def test_zip_is_refused_where_it_is_not_exact_and_says_why(name, site, reason):
    with pytest.raises(TwinMergingError, match=reason):
        zip_sites(zoo.layout(name), [site])


def test_an_architecture_without_any_site_to_zip_is_refused():
    with pytest.raises(TwinMergingError, match="no site of this architecture"):
        zip_sites(zoo.layout("bit"))


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_three_models_keep_the_widths_and_their_order_changes_nothing(mode):
    models = [zoo.model("resnet-basic", seed) for seed in range(3)]
    batches = zoo.batches("resnet-basic")
    once = merge_models(models, batches, mode=mode, max_sweeps=2)
    again = merge_models([models[0], models[2], models[1]], batches, mode=mode, max_sweeps=2)
    assert all(once.state[key].shape == tensor.shape for key, tensor in models[0].state_dict().items())
    # Where units of the second model alone stand in the merge is free; what the merge computes is not.
    found = [outputs(_load(merge, "resnet-basic", batches), batches[0]) for merge in (once, again)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_batch_norm_is_estimated_anew_and_needs_inputs():
    models, batches = [zoo.model("resnet-basic", seed) for seed in range(2)], zoo.batches("resnet-basic")
    merge = merge_models(models, batches, max_sweeps=1)
    with pytest.raises(TwinMergingError, match="statistics do not follow"):
        merge.apply(zoo.fresh("resnet-basic"))
    merged = _load(merge, "resnet-basic", batches)
    again = copy.deepcopy(merged)
    reestimate_batch_norm(again, batches)
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, again.state_dict()[key])
    norm = merged.resnet.embedder.embedder
    seen = torch.stack([norm.convolution(batch["pixel_values"]).mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.normalization.running_mean, seen, rtol=1e-4, atol=1e-5)
    assert not merged.training and norm.normalization.momentum == 0.1


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_heads_are_averaged_or_kept(mode):
    one, other = zoo.model("bert"), zoo.fresh("bert", seed=1)
    options = {"mode": mode, "max_sweeps": 1}
    kept = merge_models([one, other], zoo.batches("bert"), heads="keep", **options)
    assert [set(head) for head in kept.heads] == [{"classifier.weight", "classifier.bias"}] * 2
    torch.testing.assert_close(kept.heads[1]["classifier.bias"], other.classifier.bias.detach())
    assert torch.equal(kept.state["classifier.weight"], kept.heads[0]["classifier.weight"])
    averaged = merge_models([one, other], zoo.batches("bert"), **options)
    torch.testing.assert_close(
        averaged.state["classifier.weight"], sum(head["classifier.weight"] for head in kept.heads) / 2
    )
    other.classifier = torch.nn.Linear(32, 5)
    with pytest.raises(TwinMergingError, match="heads cannot be averaged"):
        merge_models([one, other], **options)
    assert merge_models([one, other], heads="keep", **options).heads[1]["classifier.weight"].shape == (5, 32)


def test_zip_units_merges_the_most_similar_first():
    similarity = np.array([[1, 0.9, 0.1, 0.0], [0.9, 1, 0.2, 0.1], [0.1, 0.2, 1, 0.8], [0.0, 0.1, 0.8, 1]])
    assert zip_units(similarity, 2).tolist() == [0, 0, 1, 1]
    # No merges within a model: across, then.
    assert sorted(map(sorted, _clusters(zip_units(similarity, 2, budget=0.0)))) == [[0, 3], [1, 2]]


def test_merged_negatives_do_not_attract():
    # Of the published code, which scales negatives up by a factor below 1: it chains three of four units into one cluster.
    similarity = np.full((4, 4), -0.8)
    np.fill_diagonal(similarity, 1)
    assert sorted(len(cluster) for cluster in _clusters(zip_units(similarity, 2))) == [2, 2]


def test_memberships_hold_every_unit_once():
    cluster = zip_units(np.corrcoef(np.random.RandomState(0).randn(12, 40)), 3)
    matrices = memberships(cluster, 3)
    assert [tuple(m.shape) for m in matrices] == [(4, 4)] * 3
    assert all(torch.equal(m.sum(1), torch.ones(4)) for m in matrices)
    assert (torch.stack(matrices).sum((0, 1)) > 0).all()


def _clusters(cluster: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(cluster == number).tolist() for number in np.unique(cluster)]


@pytest.mark.parametrize(("mode", "heads"), [("mean", "average"), ("align", "mine")])
def test_unknown_choices_are_refused(mode, heads):
    with pytest.raises(ValueError, match="must be one of"):
        merge_models([zoo.model("bert")], mode=mode, heads=heads)
