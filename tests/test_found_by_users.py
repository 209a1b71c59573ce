"""What testers stumbled over, each kept from coming back."""

import filecmp
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests import files, tiny
from twin_merging_hf.builder import Progress, build_artifact, plan_build
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.temperature import fit_temperature


TWO = {"a": ["x", "y"], "b": ["p", "q", "r"]}


@pytest.fixture
def folder(tmp_path):
    return tiny.make_experts("bert", tmp_path / "in", TWO)


def test_an_mlp_router_in_bf16_is_saved_again_byte_for_byte(folder, tmp_path):
    recipe = tiny.write_recipe(folder, tuple(TWO), router={"type": "mlp", "epochs": 1}, out_dtype="bfloat16")
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    compared = filecmp.dircmp(tmp_path / "out", tmp_path / "again")
    assert not compared.left_only and not compared.right_only and not compared.funny_files
    for name in compared.common_files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_labels_of_an_artifact_cannot_be_changed_at_loading(folder, tmp_path):
    build_artifact(tiny.write_recipe(folder, tuple(TWO)), tmp_path / "out", Progress(quiet=True))
    with pytest.raises(ValueError, match="follow from its experts"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)


def test_an_expert_without_data_is_named_because_no_router_is_trained(folder, tmp_path):
    recipe = tiny.write_recipe(folder, tuple(TWO), experts={"b": {"data": None}})
    plan = plan_build(recipe, tmp_path / "out")
    assert plan.router_type == "projection"
    assert any("no router is trained" in note and note.endswith(": b") for note in plan.notes)


def test_a_dry_run_finds_patterns_that_match_nothing(folder, tmp_path):
    with pytest.raises(TwinMergingError, match="matches no backbone tensor"):
        plan_build(tiny.write_recipe(folder, tuple(TWO), exclude=["bert.no_such.*"]), tmp_path / "out")


def test_config_fields_that_no_class_declares_are_no_obstacle(folder, tmp_path):
    extra = {
        "_num_labels": 2,
        "task_specific_params": {"x": 1},
        "language": "en",
        "model_max_length": 512,
        "adapters": {},
    }
    files.edit_json(folder / "a" / "config.json", **extra)
    plan_build(tiny.write_recipe(folder, tuple(TWO)), tmp_path / "out")


def test_projection_reads_the_input_side_of_conv1d_weights(tmp_path):
    folder = tiny.make_experts("gpt2", tmp_path / "in", TWO)
    build_artifact(tiny.write_recipe(folder, tuple(TWO), router="projection"), tmp_path / "out", Progress(quiet=True))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.router.basis.shape[-1] == tiny.HIDDEN


def test_rows_with_a_byte_order_mark_are_read(folder, tmp_path):
    path = folder / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    plan_build(tiny.write_recipe(folder, tuple(TWO)), tmp_path / "out")


def test_rows_that_separate_perfectly_do_not_drive_the_temperature_to_the_end():
    experts = torch.tensor([0, 1] * 20)
    logits = torch.nn.functional.one_hot(experts).float() * 20
    assert fit_temperature(logits, experts) == pytest.approx(1.0)
    assert fit_temperature(logits / 100, experts) < 0.2


@pytest.mark.parametrize("name", [".", ".."])
def test_names_of_folders_above_are_no_names(folder, tmp_path, name):
    recipe = tiny.write_recipe(folder, tuple(TWO))
    recipe.write_text(recipe.read_text().replace("name: b", f"name: {json.dumps(name)}"))
    with pytest.raises(TwinMergingError, match="not legal"):
        plan_build(recipe, tmp_path / "out")
