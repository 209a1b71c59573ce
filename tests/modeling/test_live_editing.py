"""`load_expert` and `delete_expert`: a loaded model becomes what the commands would have written, in place."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification as Auto

from tests import tiny
from tests.conftest import load
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.edit_recipe import Newcomer
from twin_merging_hf.editing import add_expert, remove_expert
from twin_merging_hf.progress import Progress


QUIET = Progress(quiet=True)
FULL = {"rank": tiny.FULL_RANK}


def same(model, other, kind: str) -> None:
    batch = tiny.batch(kind, 4)
    with torch.no_grad():
        assert model.config.id2label == other.config.id2label and model.expert_names == other.expert_names
        torch.testing.assert_close(model.route(**batch), other.route(**batch), rtol=0, atol=1e-6)
        for call in ({}, {"experts": model.expert_names[-1]}):
            torch.testing.assert_close(model(**batch, **call).logits, other(**batch, **call).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_deleted_expert_is_gone_as_by_the_command(world, kind, tmp_path):
    artifact = world.artifact(kind)
    model = load(artifact)
    model.set_plan("factored")
    kept = copy.deepcopy(model)
    model.delete_expert("b")
    remove_expert(artifact, "b", tmp_path / "removed", progress=QUIET)
    same(model, load(tmp_path / "removed"), kind)
    assert model.expert_names == ["a", "c"] and kept.expert_names == ["a", "b", "c"] and not model.training
    assert model._plan_choice == kept._plan_choice, "what was set stays set"
    model.save_pretrained(tmp_path / "saved")
    assert check_artifact(tmp_path / "saved") == []
    assert (tmp_path / "saved" / "README.md").read_bytes() == (tmp_path / "removed" / "README.md").read_bytes()
    same(load(tmp_path / "saved"), model, kind)
    model.delete_expert("c")
    with pytest.raises(ValueError, match="only expert"):
        model.delete_expert("a")
    with pytest.raises(ValueError, match="zz"):
        model.delete_expert("zz")
    assert model.expert_names == ["a"] and model(**tiny.batch(kind, 2)).logits.shape[1] == 2


def test_a_loaded_expert_is_there_as_by_the_command(tmp_path):
    folder = tiny.make_experts("bert", tmp_path)
    recipe = tiny.write_recipe(folder, ["a", "b"], exclusive=FULL)
    artifact = build_artifact(recipe, folder / "artifact", QUIET).folder
    model, rows = load(artifact), folder / "c.jsonl"
    model.load_expert("c", folder / "c", data=rows, recipe=recipe)
    add_expert(artifact, tmp_path / "added", Newcomer("c", str(folder / "c"), rows), recipe, QUIET)
    same(model, load(tmp_path / "added"), "bert")
    batch = tiny.batch("bert", 3)
    with torch.no_grad():
        expected = Auto.from_pretrained(folder / "c").eval()(**batch).logits
        found = model(**batch, experts="c").expert_logits[:, slice(*model.label_space.spans[2])]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="already"):
        model.load_expert("c", folder / "c", data=rows, recipe=recipe)
    assert model.expert_names == ["a", "b", "c"]


def test_an_expert_without_data_joins_a_router_that_needs_none(tmp_path, monkeypatch):
    folder = tiny.make_experts("bert", tmp_path, rows=0)
    monkeypatch.chdir(folder)  # the recipe's `base` is seen from here
    recipe = tiny.write_recipe(folder, ["a", "b"], data=False, exclusive=FULL)
    model = load(build_artifact(recipe, folder / "artifact", QUIET).folder)
    model.load_expert("c", folder / "c")
    assert model.expert_names == ["a", "b", "c"] and model.route(**tiny.batch("bert", 2)).shape == (2, 3)


def test_a_model_whose_weights_cannot_be_read_stays_as_it_is(world):
    model = world.model("bert")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        model.delete_expert("a")
    assert model.expert_names == ["a", "b", "c"]
