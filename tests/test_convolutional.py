"""Convolutional models: batch norms whose statistics differ, group norms, standardised kernels, routing by feature maps."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from tests import tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.batch_statistics import common_statistics, restated
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.checkpoints import open_checkpoint
from twin_merging_hf.editing import Newcomer, add_expert
from twin_merging_hf.preflight import preflight
from twin_merging_hf.recipe import load_recipe


EXPERTS = {"a": ["x", "y"], "b": ["p", "q", "r"]}
FULL_RANK = {"method": "svd", "rank": tiny.FULL_RANK}


def train_statistics(folder, names) -> None:
    """Give each checkpoint statistics as different as those of models trained on other data."""
    for seed, name in enumerate(names):
        model = AutoModelForImageClassification.from_pretrained(folder / name)
        rng = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=rng))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=rng) * 3 + 0.1)
                module.num_batches_tracked.fill_(seed + 5)
        model.save_pretrained(folder / name)


@pytest.fixture(scope="module", params=["resnet", "bit"])
def world(request, tmp_path_factory):
    """Kind, folder of experts whose statistics differ, and an artifact of two of the three."""
    kind = request.param
    folder = tiny.make_experts(kind, tmp_path_factory.mktemp(kind), {**EXPERTS, "c": ["m", "n"]})
    train_statistics(folder, [*EXPERTS, "c"])
    recipe = tiny.write_recipe(folder, tuple(EXPERTS), exclusive=FULL_RANK, router="auto", base_model=None)
    build_artifact(recipe, folder / "out", Progress(quiet=True))
    return kind, folder, folder / "out"


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder).eval()


@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_answered_as_by_its_own_expert(world):
    kind, folder, out = world
    model, inputs = load(out), tiny.batch(kind, 4)
    output = model(**inputs, experts=["a", "b", "b", "a"]).expert_logits
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        columns = model.label_space.columns(list(EXPERTS).index(name))
        torch.testing.assert_close(
            output[rows][:, columns], load(folder / name)(**inputs).logits[rows], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_the_router_reads_means_of_feature_maps_row_by_row(world):
    kind, _, out = world
    model, inputs = load(out), tiny.batch(kind, 3)
    together, features = model(**inputs).expert_weights, model.routing_features(**inputs)
    assert features.shape == (3, model.config.router_input_size)
    for i in range(3):
        alone = model(pixel_values=inputs["pixel_values"][i : i + 1]).expert_weights
        torch.testing.assert_close(alone, together[i : i + 1])
    hidden = model.shared.base_model(**inputs, output_hidden_states=True).hidden_states
    expected = [hidden[layer].mean(dim=(2, 3)) for layer in model.config.state_layers]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    "router",
    [
        {"type": "mlp", "pass": "full"},
        {"type": "centroid", "layer": [0, 1]},
        {"type": "projection"},
        {"type": "linear", "pass": "late", "layer": 1},
    ],
)
def test_every_way_to_route_builds(world, router):
    kind, folder, _ = world
    out = folder / f"out-{router['type']}"
    exclusive = {"rank": 2, "dtype": "int4"}
    build_artifact(
        tiny.write_recipe(folder, tuple(EXPERTS), exclusive=exclusive, router=router, file=f"{out.name}.yaml"),
        out,
        Progress(quiet=True),
    )
    weights = load(out)(**tiny.batch(kind, 2)).expert_weights
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))


@torch.no_grad()
def test_a_narrow_artifact_takes_pixels_of_any_type(world):
    kind, folder, _ = world
    recipe = tiny.write_recipe(folder, tuple(EXPERTS), exclusive=FULL_RANK, out_dtype="bfloat16", file="narrow.yaml")
    build_artifact(recipe, folder / "narrow", Progress(quiet=True))
    model = AutoModelForImageClassification.from_pretrained(folder / "narrow", dtype="auto").eval()
    inputs = tiny.batch(kind, 2)
    output = model(**inputs, experts=["a", "a"])
    own = load(folder / "a")(**inputs).logits
    assert output.expert_logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.expert_logits[:, :2].float(), own, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_an_expert_that_joins_is_restated_in_the_artifact_s_statistics(world):
    kind, folder, out = world
    newcomer = Newcomer("c", str(folder / "c"), folder / "c.jsonl")
    add_expert(out, folder / "more", newcomer, progress=Progress(quiet=True))
    model, inputs = load(folder / "more"), tiny.batch(kind, 2)
    columns = model.label_space.columns(2)
    output = model(**inputs, experts=["c", "c"]).expert_logits[:, columns]
    torch.testing.assert_close(output, load(folder / "c")(**inputs).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_experts_that_were_aligned_are_restated_in_the_new_order_of_channels(tmp_path):
    folder = tiny.make_experts("resnet", tmp_path, EXPERTS)
    tiny.new_model("resnet", EXPERTS["b"], seed=99).save_pretrained(folder / "b")  # of another initialisation
    train_statistics(folder, EXPERTS)
    recipe = tiny.write_recipe(
        folder, tuple(EXPERTS), exclusive=FULL_RANK, base_model=None, alignment={"method": "mudsc", "max_sweeps": 1}
    )
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    model, inputs = load(tmp_path / "out"), tiny.batch("resnet", 2)
    for t, name in enumerate(EXPERTS):
        output = model(**inputs, experts=[name, name]).expert_logits[:, model.label_space.columns(t)]
        torch.testing.assert_close(output, load(folder / name)(**inputs).logits, atol=1e-4, rtol=1e-4)


# ---- batch norms ----------------------------------------------------------------------------------------------------


def batch_norm(seed: int) -> nn.BatchNorm2d:
    rng, norm = torch.Generator().manual_seed(seed), nn.BatchNorm2d(3, eps=0.01)
    for value in (norm.weight, norm.bias, norm.running_mean):
        value.data.copy_(torch.randn(3, generator=rng))
    norm.running_var.copy_(torch.rand(3, generator=rng) * 4)
    norm.num_batches_tracked.fill_(seed)
    return norm.eval()


def reader(norm: nn.BatchNorm2d):
    state = {f"norm.{name}": value for name, value in norm.state_dict().items()}
    return state.__getitem__, state


def in_common_statistics(norms: list) -> list[nn.BatchNorm2d]:
    skeleton = nn.ModuleDict({"norm": norms[0]})
    reads = [reader(norm) for norm in norms]
    common = common_statistics(skeleton, [read for read, _ in reads])
    result = []
    for read, state in reads:
        norm = nn.BatchNorm2d(3, eps=0.01)
        norm.load_state_dict({n.removeprefix("norm."): restated(read, n, norms[0], common) for n in state})
        result.append(norm.eval())
    return result


@torch.no_grad()
def test_a_restated_norm_is_the_same_map_and_a_mean_of_norms_is_the_mean_of_maps():
    norms, x = [batch_norm(seed) for seed in (1, 2, 3)], torch.randn(4, 3, 5, 5)
    again = in_common_statistics(norms)
    for norm, other in zip(norms, again, strict=True):
        torch.testing.assert_close(other(x), norm(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert all(torch.equal(getattr(other, name), getattr(again[0], name)) for other in again)
    mean = in_common_statistics(norms)[0]
    mean.weight.data = torch.stack([norm.weight.data for norm in again]).mean(dim=0)
    mean.bias.data = torch.stack([norm.bias.data for norm in again]).mean(dim=0)
    torch.testing.assert_close(mean(x), torch.stack([norm(x) for norm in norms]).mean(dim=0))


@torch.no_grad()
def test_common_statistics_are_those_of_all_inputs_together():
    norms = [batch_norm(1), batch_norm(2)]
    data = [torch.randn(600, 3, dtype=torch.float64) * (i + 1) + i for i in range(2)]
    for norm, rows in zip(norms, data, strict=True):
        norm.running_mean.copy_(rows.mean(dim=0))
        norm.running_var.copy_(rows.var(dim=0, unbiased=False))
    common, rows = in_common_statistics(norms)[0], torch.cat(data)
    torch.testing.assert_close(common.running_mean.double(), rows.mean(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(common.running_var.double(), rows.var(dim=0, unbiased=False), atol=1e-5, rtol=1e-5)


def test_norms_that_agree_are_left_as_they_are():
    norm = batch_norm(1)
    read, state = reader(norm)
    common = common_statistics(nn.ModuleDict({"norm": norm}), [read, read])
    assert common == {}
    narrow = common_statistics(nn.ModuleDict({"norm": norm}), [read, read], dtype=torch.bfloat16)
    assert torch.equal(narrow["norm.running_mean"], state["norm.running_mean"].bfloat16().float())


def test_a_build_says_that_statistics_were_restated(tmp_path):
    folder = tiny.make_experts("resnet", tmp_path, EXPERTS, rows=0)
    train_statistics(folder, EXPERTS)
    inputs = preflight(parse(folder))
    assert "the statistics of 8 batch norms differ; all are restated in common ones" in inputs.notes
    stored = open_checkpoint("a", folder, "expert 'a'")
    name = "resnet.embedder.embedder.normalization.running_mean"
    assert not torch.equal(inputs.experts[0].tensor(name), stored.tensor(name))
    assert torch.equal(inputs.experts[0].tensor(name), inputs.experts[1].tensor(name))
    inputs.close()


def parse(folder):
    return load_recipe(tiny.write_recipe(folder, tuple(EXPERTS), data=False))


def test_damaged_statistics_are_found_in_the_right_expert(tmp_path):
    folder = tiny.make_experts("resnet", tmp_path, EXPERTS, rows=0)
    model = AutoModelForImageClassification.from_pretrained(folder / "b")
    model.resnet.embedder.embedder.normalization.running_var[0] = float("nan")
    model.save_pretrained(folder / "b")
    with pytest.raises(
        TwinMergingError, match="^expert 'b': tensor 'resnet.embedder.embedder.normalization.running_var'"
    ):
        preflight(parse(folder))


def test_a_batch_norm_in_training_mode_is_refused(world):
    kind, _, out = world
    model, inputs = load(out).train(), tiny.batch(kind, 2)
    if kind == "bit":
        model(**inputs)  # group norms look at one row alone
        return
    for experts in (None, ["a", "b"], "__shared__"):
        with pytest.raises(ValueError, match="BatchNorm of the shared model is in training mode"):
            model(**inputs, experts=experts)
    for module in model.shared.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(**inputs, labels=torch.tensor([0, 1])).loss.requires_grad
