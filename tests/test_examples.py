"""The scripts in examples/ run: the quick ones on tiny artifacts, the training ones as far as their options."""

import runpy
import sys
from pathlib import Path

import pytest

from tests import tiny
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.progress import Progress


ROOT = Path(__file__).parents[1] / "examples"
SCRIPTS = [
    path for path in sorted(ROOT.rglob("*.py")) if path.parent.name != "roberta_glue"
]  # which starts to download


def run(monkeypatch, capsys, name: str, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_example_explains_itself(script, monkeypatch, capsys):
    if "lora" in script.name:
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_the_table_names_every_example():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(path.name in text for path in ROOT.glob("*.py")) and "roberta_glue" in text


@pytest.fixture
def work(tmp_path):
    """A folder as examples/text/make_experts.py and `build` leave it, of tiny experts."""
    tiny.make_experts("bert", tmp_path, {"newsgroups": ["x", "y"], "election": ["p", "q"]})
    (tmp_path / "experts").mkdir()
    (tmp_path / "data").mkdir()
    entries = {}
    for name in ("newsgroups", "election"):
        (tmp_path / name).rename(tmp_path / "experts" / name)
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "data" / f"{name}.train.jsonl")
        entries[name] = {"model": f"experts/{name}", "data": f"data/{name}.train.jsonl"}
    recipe = tiny.write_recipe(tmp_path, list(entries), experts=entries, exclusive={"rank": tiny.FULL_RANK})
    build_artifact(recipe, tmp_path / "artifact", Progress(quiet=True))
    return tmp_path


def test_several_questions(work, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "several_questions.py", work / "artifact", "w25 w26", "w30")
    assert said.count("newsgroups: newsgroups/") == 2 and said.count("election: election/") == 2


def test_an_expert_leaves_and_comes_back(work, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "add_expert.py", work)
    assert "without: ['newsgroups']" in said and "again: ['newsgroups', 'election']" in said and "agreement" in said


def test_exports(work, monkeypatch, capsys):
    said = run(monkeypatch, capsys, "export.py", work / "artifact", work / "out")
    assert "BertForSequenceClassification" in said and "LoRA of rank" in said
    assert float(said.split("differ by ")[1].split()[0]) < 1e-5


def test_images(world, tmp_path, monkeypatch, capsys):
    artifact = world.artifact("vit")
    folder = tmp_path / "demo"
    for name in "abc":
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "images").symlink_to(artifact.parent / "images")
        (folder / "data" / name / "test.jsonl").write_text((artifact.parent / f"{name}.jsonl").read_text())
    (folder / "artifact").symlink_to(artifact)
    said = run(monkeypatch, capsys, "images.py", folder, "--rows", 2)
    assert "of 6 right" in said
