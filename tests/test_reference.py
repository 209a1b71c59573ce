"""A shared model by reference: nothing of the base is stored, loading brings it, and another base is refused."""

import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from tests import adapters, files, tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError, editing
from twin_merging_hf.artifact import check_artifact, inspect_artifact, tensor_sizes
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.editing import Newcomer
from twin_merging_hf.hub_upload.upload import push_artifact
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import parse_recipe


QUIET = Progress(quiet=True)
BY_REFERENCE = {"shared_model": "base", "shared_by_reference": True}


@pytest.fixture
def own(tmp_path):
    """Folder of base, adapters and an artifact by reference, for a test to change."""
    folder = adapters.make_adapters("bert", tmp_path / "own")
    build_artifact(adapters.recipe(folder, **BY_REFERENCE), folder / "artifact", QUIET)
    return folder


def same_answers(one, two) -> None:
    batch = tiny.batch("bert", 3)
    with torch.no_grad():
        torch.testing.assert_close(two(**batch).logits, one(**batch).logits, rtol=0, atol=1e-6)


def test_nothing_of_the_base_is_stored_and_the_model_is_the_same(own, tmp_path):
    whole = build_artifact(adapters.recipe(own, shared_model="base"), own / "whole", QUIET).folder
    stored = tensor_sizes(own / "artifact")
    assert all(name.startswith(("deltas.", "router.", "shared.classifier.heads.")) for name in stored)
    assert check_artifact(own / "artifact") == []
    model = load(own / "artifact")
    same_answers(load(whole), model)
    assert type(transformers.AutoModel.from_pretrained(own / "artifact")).__name__ == "TwinMergingModel"
    sizes, expected = (inspect_artifact(own / name).storage for name in ("artifact", "whole"))
    assert sizes == expected
    model.save_pretrained(tmp_path / "again")
    assert tensor_sizes(tmp_path / "again").keys() == stored.keys()
    same_answers(model, load(tmp_path / "again"))


def test_the_type_asked_for_is_that_of_the_shared_model_too(own):
    model = load(own / "artifact", dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "router" not in name} == {torch.bfloat16}


def test_another_base_is_refused_and_the_same_one_elsewhere_is_found_if_told(own, tmp_path):
    shutil.copytree(own / "base", tmp_path / "moved")
    shutil.rmtree(own / "base")
    with pytest.raises(ValueError, match="is not to be had.*no such folder.*shared_model.*shared_reference"):
        load(own / "artifact")
    model = load(own / "artifact", shared_model=str(tmp_path / "moved"))
    model.save_pretrained(tmp_path / "saved")
    reference = {**model.config.shared_reference, "model": str(tmp_path / "moved")}
    files.edit_json(own / "artifact" / "config.json", shared_reference=reference)
    same_answers(model, load(own / "artifact"))
    files.edit_tensors(tmp_path / "moved", lambda tensors: tensors["bert.pooler.dense.bias"].add_(1e-3))
    with pytest.raises(ValueError, match="is not the one that the artifact was built on.*SHA-256"):
        load(own / "artifact", shared_model=str(tmp_path / "moved"))


def test_a_changed_shared_model_is_not_saved_by_reference(own, tmp_path):
    model = load(own / "artifact")
    with torch.no_grad():
        model.shared.bert.pooler.dense.bias.add_(1e-3)
    with pytest.raises(ValueError, match="bert.pooler.dense.bias.*shared_reference = None"):
        model.save_pretrained(tmp_path / "saved")
    model.config.shared_reference = None
    model.save_pretrained(tmp_path / "saved")
    same_answers(model, load(tmp_path / "saved"))


def test_it_loads_as_remote_code_where_the_package_is_not(own, tmp_path):
    script = (
        "import sys; sys.modules['twin_merging_hf'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"model = Auto.from_pretrained({str(own / 'artifact')!r}, trust_remote_code=True)\n"
        "print(model.shared.bert.pooler.dense.weight.sum().item())\n"
    )
    environment = files.environment(HF_HOME=str(tmp_path / "home"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    expected = files.tensors_of(own / "base")["bert.pooler.dense.weight"].sum().item()
    assert float(run.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)


def test_an_expert_joins_and_the_reference_stays(own, tmp_path):
    recipe = adapters.recipe(own, {name: tiny.LABELS[name] for name in "ab"}, file="two.yaml", **BY_REFERENCE)
    two = build_artifact(recipe, own / "two", QUIET).folder
    newcomer = Newcomer("c", str(own / "c"), None, tuple(tiny.LABELS["c"]))
    three = editing.add_expert(two, tmp_path / "three", newcomer, None, QUIET).folder
    assert tensor_sizes(three).keys() == tensor_sizes(own / "artifact").keys()
    assert check_artifact(three) == []


def test_a_reference_to_a_folder_is_not_uploaded(own):
    with pytest.raises(TwinMergingError, match="nobody else has.*Hub id"):
        push_artifact(own / "artifact", "me/model")


def test_a_merged_shared_model_cannot_be_a_reference():
    with pytest.raises(TwinMergingError, match="shared_model: base"):
        parse_recipe({"experts": [{"model": "a"}], "shared_by_reference": True})


def test_a_shared_model_that_is_there_needs_no_other_place(world):
    with pytest.raises(ValueError, match="holds its shared model itself"):
        load(world.artifact("bert"), shared_model="elsewhere")
