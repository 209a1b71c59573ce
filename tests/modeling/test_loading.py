"""Loading and saving: the same answers after every trip, and damaged artifacts refused by the name of the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from tests import tiny
from tests.conftest import load
from tests.modeling.dense import MIXED, assert_close


def auto_class(kind: str) -> Any:
    return AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification


@torch.no_grad()
def answers(model: Any, kind: str) -> torch.Tensor:
    inputs = tiny.batch(kind, len(MIXED))
    outputs = [model(**inputs, expert_weights=weights) for weights in (None, MIXED)]
    return torch.cat([torch.cat([o.logits.exp(), o.expert_logits, o.expert_weights], dim=1) for o in outputs]).float()


# ---- trips ----------------------------------------------------------------------------------------------------------


def test_the_auto_classes_load_the_artifact(kind, artifact, model):
    loaded = auto_class(kind).from_pretrained(artifact).eval()
    assert type(loaded) is type(model)
    assert torch.equal(answers(loaded, kind), answers(model, kind))
    body = AutoModel.from_pretrained(artifact)
    assert type(body).__name__ == "TwinMergingModel"


def test_the_auto_class_of_another_task_is_refused_and_names_the_right_one(world):
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        AutoModelForImageClassification.from_pretrained(world.artifact("bert"))
    with pytest.raises(ValueError, match="AutoModelForImageClassification"):
        AutoModelForSequenceClassification.from_pretrained(world.artifact("vit"))


def test_a_saved_model_loads_equal_with_its_companions(tmp_path, kind, artifact, model):
    load(artifact).save_pretrained(tmp_path / "again")
    assert torch.equal(answers(load(tmp_path / "again"), kind), answers(model, kind))
    again = {path.name for path in (tmp_path / "again").iterdir()}
    assert again >= {path.name for path in artifact.iterdir()}


def test_a_sharded_save_loads_equal(tmp_path, kind, artifact, model):
    load(artifact).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert torch.equal(answers(load(tmp_path / "shards"), kind), answers(model, kind))


def test_the_model_without_heads_saves_the_whole_artifact(tmp_path, kind, artifact, model):
    AutoModel.from_pretrained(artifact).save_pretrained(tmp_path / "again")
    assert torch.equal(answers(load(tmp_path / "again"), kind), answers(model, kind))


def test_loading_info_comes_on_request(artifact):
    model, info = AutoModel.from_pretrained(artifact, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_tensor_parallelism_is_refused(artifact):
    with pytest.raises(ValueError, match="tensor parallelism"):
        load(artifact, tp_plan="auto")


# ---- placement ------------------------------------------------------------------------------------------------------


def test_a_device_map_of_one_device_gives_equal_outputs(kind, artifact, model):
    placed = load(artifact, device_map="cpu")
    assert torch.equal(answers(placed, kind), answers(model, kind))


def test_disk_offload_gives_equal_outputs(tmp_path, kind, artifact, model):
    offloaded = load(artifact, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    on_disk = [name for name, parameter in offloaded.named_parameters() if parameter.is_meta]
    assert len(on_disk) > 100  # else this would show nothing
    assert_close(answers(offloaded, kind), answers(model, kind), 1e-6)


def test_offload_of_some_parts_only_gives_equal_outputs(tmp_path, kind, artifact, model):
    device_map = {"shared": "disk", "deltas": "cpu", "router": "cpu"}
    offloaded = load(artifact, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in offloaded.shared.parameters())
    assert_close(answers(offloaded, kind), answers(model, kind), 1e-6)


# ---- damage ---------------------------------------------------------------------------------------------------------


def damaged(source: Path, target: Path, change: Callable[[dict], Any]) -> Path:
    """A copy of an artifact whose tensors `change` has edited."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def first(tensors: dict, part: str) -> str:
    """Name of a tensor of a part: a delta's factor, a delta of a vector, a head, the router."""
    return next(name for name in sorted(tensors) if part in name)


PARTS = [".up", ".down", ".delta", ".heads.1.", "router."]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_raises_and_is_named(tmp_path, kind, artifact, part):
    names = []
    folder = damaged(artifact, tmp_path / "x", lambda t: names.append(first(t, part)) or t.pop(names[0]))
    with pytest.raises(ValueError, match=f"missing keys.*{names[0]}"):
        load(folder)


def test_a_missing_tensor_of_the_shared_model_raises_and_is_named(tmp_path, world):
    name = "shared.bert.encoder.layer.1.output.dense.weight"
    folder = damaged(world.artifact("bert"), tmp_path / "x", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"missing keys.*{name}"):
        load(folder)


@pytest.mark.parametrize("name", ["deltas.nothing.up", "shared.classifier.heads.3.weight", "stray"])
def test_an_extra_tensor_raises_and_is_named(tmp_path, world, name):
    folder = damaged(world.artifact("bert"), tmp_path / "x", lambda t: t.update({name: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=f"unexpected keys.*{name}"):
        load(folder)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignoring sizes"])
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_shape_raises_and_is_named(tmp_path, world, part, options):
    names = []
    folder = damaged(
        world.artifact("bert"),
        tmp_path / "x",
        lambda t: names.append(first(t, part)) or t.update({names[0]: t[names[0]][:-1].clone()}),
    )
    with pytest.raises(ValueError, match=names[0]):
        load(folder, **options)


def test_an_artifact_of_a_newer_format_is_refused_with_a_remedy(tmp_path, world):
    folder = shutil.copytree(world.artifact("bert"), tmp_path / "x")
    content = json.loads((folder / "config.json").read_text())
    content["format_version"] += 1
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format_version.*pip install -U"):
        load(folder)


# ---- types ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_the_router_in_fp32_and_outputs_finite(kind, artifact, dtype):
    model = load(artifact, dtype=dtype)
    assert {p.dtype for p in model.router.parameters()} == {torch.float32}
    assert {p.dtype for p in (*model.shared.parameters(), *model.deltas.parameters())} == {dtype}
    inputs = tiny.batch(kind, len(MIXED))
    for call in ({}, {"expert_weights": MIXED}, {"experts": "__shared__"}, {"experts": "all"}):
        output = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, **call)
        assert output.logits.dtype == output.expert_logits.dtype == dtype
        assert output.expert_weights.dtype == torch.float32
        assert torch.isfinite(output.logits).all() and torch.isfinite(output.logits.exp()).all()
        assert torch.isfinite(output.expert_logits).all()
        assert_close(output.logits.float().exp().sum(-1), torch.ones(output.logits.shape[:-1]), 2e-2)


@torch.no_grad()
def test_narrow_types_are_near_full_precision(kind, artifact, model):
    inputs = tiny.batch(kind, len(MIXED))
    expected = model(**inputs, expert_weights=MIXED).expert_logits
    narrow = load(artifact, dtype=torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    assert_close(narrow(**inputs, expert_weights=MIXED).expert_logits.float(), expected, 5e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "router", [{}, {"router": "mlp"}, {"router": "projection"}], ids=["linear", "mlp", "projection"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_after_loading_still_routes(world, router, dtype):
    model = world.model("bert", **router)
    inputs = tiny.batch("bert", 3)
    expected = model.route(**inputs)
    model.to(dtype)
    output = model(**inputs)
    assert torch.isfinite(output.logits).all()
    assert (output.expert_weights - expected).abs().max() < 0.1


def test_a_recipe_in_bf16_saves_and_loads_in_bf16(tmp_path, world):
    folder = world.artifact("bert", out_dtype="bfloat16", exclusive={"rank": 4, "dtype": "bf16"})
    model = load(folder)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.router.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_narrow_factors_stay_narrow_on_disk_after_a_save(tmp_path, world):
    folder = world.artifact("bert", exclusive={"rank": 4, "dtype": "bf16"})
    model = load(folder)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert {t.dtype for name, t in after.items() if name.endswith((".up", ".down"))} == {torch.bfloat16}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
