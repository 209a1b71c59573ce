"""`init`: what it says about checkpoints, and that the recipe it writes is one."""

import shutil
from pathlib import Path

import pytest
import transformers
import yaml

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import plan_build
from twin_merging_hf.recipe import load_recipe, parse_recipe
from twin_merging_hf.starter import describe_look, look_at, starter_recipe


def looks_of(folder: Path, names, base: str | None = "base"):
    return look_at([str(folder / name) for name in names], base and str(folder / base), folder)


def copy_as(source: Path, *targets: Path) -> list[Path]:
    for target in targets:
        shutil.copytree(source, target)
    return list(targets)


def test_checkpoints_that_fit_make_a_recipe_that_builds(world, kind, tmp_path):
    folder = world.experts(kind)
    looks = looks_of(folder, tiny.LABELS)
    assert [look.name for look in looks] == [*tiny.LABELS, "base"]
    assert all(look.misfits == [] for look in looks)
    path = tmp_path / "recipe.yaml"
    path.write_text(starter_recipe(looks, tmp_path), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.names == list(tiny.LABELS) and recipe.base_model == str(folder / "base")
    assert plan_build(path, tmp_path / "out").router_type == "projection"


def test_descriptions_name_class_size_and_labels(world):
    folder = world.experts("bert")
    looks = looks_of(folder, ("a", "b"))
    text = "\n".join(line for look in looks for line in describe_look(look))
    assert "a: BertForSequenceClassification" in text and "2 labels: x, y - fits" in text
    assert "3 labels: p, q, r" in text and "labels" not in describe_look(looks[-1])[0]


def test_paths_are_relative_to_the_recipe(world, tmp_path, monkeypatch):
    files.copy_inputs(world.experts("bert"), tmp_path / "experts")
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    looks = look_at(["experts/a", "experts/b/"], "experts/base", Path("."))
    path = Path("recipes/recipe.yaml")
    path.write_text(starter_recipe(looks, path.parent), encoding="utf-8")
    assert [Path(e.model) for e in load_recipe(path).experts] == [Path("../experts/a"), Path("../experts/b")]
    plan_build(path, "out")
    monkeypatch.chdir("/")
    plan_build(tmp_path / path, tmp_path / "out")


def test_checkpoints_that_do_not_fit_are_left_out_with_a_reason(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ("base", "a", "b", "c"))
    shutil.copytree(world.experts("roberta") / "a", folder / "other")
    files.edit_json(folder / "b" / "config.json", hidden_act="relu")
    content = files.read_json(folder / "c" / "tokenizer.json")
    files.edit_json(folder / "c" / "tokenizer.json", **{**content, "normalizer": {"type": "Lowercase"}})
    looks = looks_of(folder, ("a", "b", "c", "other"))
    reasons = {look.name: " ".join(look.misfits) for look in looks}
    assert reasons["a"] == reasons["base"] == ""
    assert "hidden_act" in reasons["b"]
    assert "normalizer" in reasons["c"]
    assert "it is a RobertaForSequenceClassification, a is a BertForSequenceClassification" in reasons["other"]
    assert "does not fit" in describe_look(looks[1])[0] and "hidden_act" in describe_look(looks[1])[1]
    recipe = parse_recipe(yaml.safe_load(starter_recipe(looks, folder)))
    assert recipe.names == ["a"]


def test_a_base_that_does_not_fit_is_left_out(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    tiny.new_model("bert", intermediate_size=48).save_pretrained(folder / "base")
    looks = looks_of(folder, ("a", "b"))
    assert looks[-1].misfits
    assert parse_recipe(yaml.safe_load(starter_recipe(looks, folder))).base_model is None


def test_a_base_saved_as_another_class_fits(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    model = transformers.BertModel.from_pretrained(folder / "base")
    shutil.rmtree(folder / "base")
    model.save_pretrained(folder / "base")
    assert looks_of(folder, ("a", "b"))[-1].misfits == []


def test_something_that_cannot_be_opened_is_named(world, tmp_path):
    with pytest.raises(TwinMergingError, match="expert 'missing': .* is not a folder"):
        look_at([str(world.experts("bert") / "a"), "./missing"], None, tmp_path)
    with pytest.raises(TwinMergingError, match="base model is a vit model"):
        look_at([str(world.experts("bert") / "a")], str(world.experts("vit") / "base"), tmp_path)


TRICKY = {
    "equal names": ["one/sst2", "two/sst2", "three/SST2"],
    "names that a number would make equal": ["one/a-3", "two/a", "three/a"],
    "letters that recipes do not allow": ["modèle", "with space", "(1)"],
    "reserved names": ["all", "none/None", "__base__", "__shared__"],
    "an expert called base": ["base", "other"],
}


@pytest.mark.parametrize("case", TRICKY)
def test_names_of_folders_become_legal_and_different_names(world, tmp_path, case):
    paths = [tmp_path / name for name in TRICKY[case]]
    copy_as(world.experts("bert") / "a", *paths)
    looks = look_at([str(path) for path in paths], str(world.experts("bert") / "base"), tmp_path)
    recipe = parse_recipe(yaml.safe_load(starter_recipe(looks, tmp_path)))
    assert [expert.model for expert in recipe.experts] == [str(path) for path in paths]
    assert recipe.base_model == str(world.experts("bert") / "base")


def test_the_comments_tell_what_rows_look_like(world, tmp_path):
    for kind, key in (("bert", '"text"'), ("vit", '"image"'), ("bert-tokens", '"tokens"')):
        assert key in starter_recipe(looks_of(world.experts(kind), ("a", "b")), tmp_path)
