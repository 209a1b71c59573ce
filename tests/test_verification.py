"""Verification against sources: silent where all is the same, and it names what is not."""

import json
import shutil
from pathlib import Path

import pytest

from tests import files, tiny
from twin_merging_hf import TwinMergingError, checkpoints
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.verification import verify_artifact


@pytest.fixture
def inputs(world, tmp_path) -> Path:
    """Sources that may be changed; `world`'s artifact was built from their like."""
    return files.copy_inputs(world.experts("bert"), tmp_path / "in", ("base", *tiny.LABELS))


def changed(folder: Path, sources: Path) -> dict[str, tuple]:
    return {state.name: state.changed for state in verify_artifact(folder, sources) if not state.is_same}


def test_the_sources_of_a_build_are_the_same(world, inputs):
    states = verify_artifact(world.artifact("bert"), inputs)
    assert {state.name for state in states} == {"recipe.yaml", "base", *tiny.LABELS}
    assert all(state.is_same for state in states)


def test_it_names_what_changed(world, inputs):
    files.edit_tensors(inputs / "a", lambda tensors: tensors["classifier.bias"].add_(1e-3))
    files.edit_json(inputs / "b" / "config.json", hidden_act="relu")
    assert changed(world.artifact("bert"), inputs) == {"a": ("weights",), "b": ("config",)}


def test_it_names_a_changed_recipe(world, inputs, tmp_path):
    folder = Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))
    with (folder / "recipe.yaml").open("a") as stream:
        stream.write("seed: 1\n")
    assert changed(folder, inputs) == {"recipe.yaml": ("recipe",)}


def test_sources_that_are_gone_are_not_called_the_same(world, inputs):
    shutil.rmtree(inputs / "c")
    (state,) = [state for state in verify_artifact(world.artifact("bert"), inputs) if not state.is_same]
    assert state.name == "c" and state.changed == () and "`--from FOLDER`" in str(state.unknown)


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(world, inputs, monkeypatch):
    shutil.rmtree(inputs / "c")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    assert not all(state.is_same for state in verify_artifact(world.artifact("bert"), inputs))


def test_a_source_from_the_hub_records_its_commit_and_its_card(world, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = files.copy_inputs(world.experts("bert"), tmp_path / "snapshots", ("b",)) / "b"
    snapshot = snapshot.rename(tmp_path / "snapshots" / commit)
    (snapshot / "README.md").write_text("---\nlicense: mit\ndatasets: [glue]\n---\nText\n")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda repo_id, **kwargs: str(snapshot))
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ("base", "a"))
    shutil.copyfile(world.experts("bert") / "b.jsonl", folder / "b.jsonl")
    recipe = tiny.write_recipe(folder, ("a", "b"), experts={"b": {"model": "org/b@main"}})
    built = build_artifact(recipe, tmp_path / "out", Progress(quiet=True)).folder
    source = files.read_json(built / "config.json")["provenance"]["sources"]["b"]
    assert (source["revision"], source["license"], source["datasets"]) == (commit, "mit", ["glue"])
    assert all(state.is_same for state in verify_artifact(built, folder))


@pytest.mark.parametrize("sources", [None, [], {}])
def test_an_artifact_without_sources_says_so(world, tmp_path, sources):
    folder = Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))
    content = json.loads((folder / "config.json").read_text())
    content["provenance"]["sources"] = sources
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(TwinMergingError, match="nothing to verify"):
        verify_artifact(folder)


def test_a_malformed_record_is_not_called_the_same(world, inputs, tmp_path):
    folder = Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))
    content = json.loads((folder / "config.json").read_text())
    content["provenance"]["sources"]["a"] = 5
    (folder / "config.json").write_text(json.dumps(content))
    (state,) = [state for state in verify_artifact(folder, inputs) if not state.is_same]
    assert state.name == "a" and "records no" in str(state.unknown)


def test_the_fingerprint_covers_every_shard(tmp_path):
    """Also one that holds nothing but the head of another task."""
    tiny.new_model("bert").save_pretrained(tmp_path / "one", max_shard_size="20KB")
    before = checkpoints.weights_fingerprint(tmp_path / "one", "expert")
    shard = sorted((tmp_path / "one").glob("*.safetensors"))[-1]
    tensors = files.load_file(shard)
    next(iter(tensors.values())).add_(1)
    files.save_file(tensors, shard, {"format": "pt"})
    assert checkpoints.weights_fingerprint(tmp_path / "one", "expert") != before
