"""Checkpoints: found, opened by Transformers' own names, read tensor by tensor."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests import files, tiny
from twin_merging_hf import TwinMergingError, checkpoints
from twin_merging_hf.checkpoints import open_checkpoint, resolve


HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "vit": ["classifier"],
}
LAYERS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
}


def test_every_tensor_of_the_task_model_is_found(world, kind):
    folder = world.experts(kind)
    checkpoint = open_checkpoint("b", folder, "expert 'b'")
    model = checkpoint.task_class.from_pretrained(folder / "b")
    assert checkpoint.task_class is type(tiny.new_model(kind))
    assert checkpoint.places.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), value)
        assert checkpoint.shape(name) == value.shape and checkpoint.dtype(name) == value.dtype
    assert (checkpoint.missing, checkpoint.extra, checkpoint.ignored) == ([], [], [])
    heads = set(checkpoint.head_tensors())
    assert heads | set(checkpoint.backbone) == set(checkpoint.places) and not heads & set(checkpoint.backbone)
    assert {name.split(".")[0] for name in heads} == set(checkpoint.head_modules)
    assert checkpoint.find_not_finite() is None


def test_heads_and_layers(world, kind):
    checkpoint = open_checkpoint("a", world.experts(kind), "expert 'a'")
    assert checkpoint.head_modules == HEADS[kind]
    assert checkpoint.layer_count == tiny.LAYERS
    layers = checkpoint.skeleton.get_submodule(checkpoint.layers_path)
    assert len(layers) == tiny.LAYERS and checkpoint.layers_path == LAYERS.get(kind, checkpoint.layers_path)


def test_a_base_has_no_head_whatever_it_was_saved_with(world, kind):
    folder = world.experts(kind)
    first = open_checkpoint("b", folder, "expert 'b'")
    base = open_checkpoint("base", folder, "base model", like=first)
    assert base.places.keys() == base.backbone.keys() == first.backbone.keys()
    assert base.head_tensors() == [] and base.missing == [] and base.extra == []
    assert {name.split(".")[0] for name in base.ignored} == set(first.head_modules)


def test_old_names_of_norms_are_found(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ["a"])
    expected = load_file(folder / "a" / files.WEIGHTS)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for key in expected
    }
    assert old != set(expected)

    def rename(tensors):
        for key in list(tensors):
            name = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[name] = tensors.pop(key)

    files.edit_tensors(folder / "a", rename)
    checkpoint = open_checkpoint("a", folder, "expert 'a'")
    assert checkpoint.missing == [] and checkpoint.extra == []
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in expected.items())


def test_nothing_is_read_before_it_is_asked_for(world):
    checkpoint = open_checkpoint("a", world.experts("bert"), "expert 'a'")
    assert all(parameter.is_meta for parameter in checkpoint.skeleton.parameters())
    assert checkpoint._handles == {}
    name = next(iter(checkpoint.places))
    value = checkpoint.tensor(name)
    checkpoint.close()
    assert checkpoint._handles == {} and torch.equal(checkpoint.tensor(name), value)


def test_the_first_tensor_that_is_not_finite_is_named(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ["a"])
    files.edit_tensors(folder / "a", lambda tensors: tensors["classifier.bias"].fill_(float("nan")))
    assert open_checkpoint("a", folder, "expert 'a'").find_not_finite() == "classifier.bias"


def test_narrow_checkpoints_stay_narrow(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ["a"])
    files.edit_tensors(folder / "a", lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    checkpoint = open_checkpoint("a", folder, "expert 'a'")
    assert {checkpoint.dtype(name) for name in checkpoint.places} == {torch.bfloat16}


# ---- where a source lies ----------------------------------------------------------------------------------------


def test_folders_are_relative_to_the_recipe_or_absolute(world, tmp_path, monkeypatch):
    folder = world.experts("bert")
    assert resolve("a", folder, "expert") == folder / "a"
    assert resolve(str(folder / "a"), tmp_path, "expert") == folder / "a"
    assert resolve(f"../{folder.name}/a", folder, "expert").samefile(folder / "a")
    monkeypatch.setenv("HOME", str(folder))
    assert resolve("~/a", tmp_path, "expert") == folder / "a"


@pytest.mark.parametrize("source", ["./none", "../none", "/none", "~/none", "a/b/c", "a b", "..", "@main", "é/x"])
def test_sources_that_can_only_be_folders_are_not_looked_for_on_the_hub(tmp_path, source, monkeypatch):
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(TwinMergingError, match="expert 'x': .* is not a folder"):
        resolve(source, tmp_path / "in", "expert 'x'")


@pytest.mark.parametrize(
    ("source", "repo_id", "revision"),
    [("org/name@v1.0", "org/name", "v1.0"), ("org/name", "org/name", None), ("gpt2", "gpt2", None)],
)
def test_hub_ids_are_fetched_at_their_revision_without_pickles_or_code(
    tmp_path, monkeypatch, source, repo_id, revision
):
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert resolve(source, tmp_path / "in", "expert") == tmp_path
    assert (asked["repo"], asked["revision"]) == (repo_id, revision)
    for unsafe in ("pytorch_model.bin", "code.py", "model.pt", "model.pkl", "tf_model.h5"):
        assert not any(Path(unsafe).match(pattern) for pattern in asked["patterns"])


def test_a_failing_hub_says_what_was_tried(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    with pytest.raises(TwinMergingError, match=r"expert: 'org/x' is neither a folder .* \(OSError: no route\)"):
        resolve("org/x", tmp_path, "expert")


def test_an_empty_error_of_the_hub_is_told_too(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    with pytest.raises(TwinMergingError, match="OSError"):
        resolve("org/x", tmp_path, "expert")


def test_code_is_never_offered_to_run(world, tmp_path, monkeypatch):
    """Transformers asks on a terminal whether to run a checkpoint's code, unless it is told no."""
    asked = []
    real = transformers.AutoConfig.from_pretrained

    def spy(path, **kwargs):
        asked.append(kwargs.get("trust_remote_code"))
        return real(path, **kwargs)

    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", spy)
    shutil.copytree(world.experts("bert") / "a", tmp_path / "a")
    open_checkpoint("a", tmp_path, "expert 'a'")
    assert asked and not any(value is None for value in asked)
