"""Model cards: true, readable by the Hub, and safe against what labels and recipes may hold."""

import copy
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests import files, tiny
from twin_merging_hf import checkpoints
from twin_merging_hf.artifact import read_config
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.hub_upload import render_card, write_card


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def rendered(folder: Path, **report) -> str:
    content = {**files.read_json(folder / "report.json"), **report}
    return render_card(read_config(folder), content, "seed: 0", "text")


def table(text: str, title: str) -> list[list[str]]:
    """Rows of the first table below a heading."""
    lines = text.split(f"## {title}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")])
    return rows


def test_the_hub_can_read_it(kind, artifact):
    data = card_of(artifact).data
    task = "image-classification" if kind == "vit" else "text-classification"
    assert (data.library_name, data.pipeline_tag) == ("transformers", task)
    assert {"twin-merging", "merge", "custom_code"} <= set(data.tags)
    assert data.base_model is None
    text = card_of(artifact).text
    assert f'pipeline("{task}"' in text and 'experts="a"' in text


def test_it_says_what_the_report_says(artifact):
    text, report = card_of(artifact).text, files.read_json(artifact / "report.json")
    assert [row[0] for row in table(text, "Experts")[2:]] == list(tiny.LABELS)
    assert [row[3] for row in table(text, "Experts")[2:]] == [", ".join(labels) for labels in tiny.LABELS.values()]
    confusion = [[int(cell) for cell in row[1:]] for row in table(text, "Routing")[2:]]
    assert confusion == report["router"]["confusion"]
    agreement = {row[0]: row[2:] for row in table(text, "How close it comes to its experts")[2:]}
    for name, share in report["verdict"]["agreement"].items():
        assert agreement[name] == [f"{share:.1%}", f"{report['verdict']['given'][name]:.1%}"]
    assert f"{report['storage']['total'] / 1e6:.2f} MB" in text
    assert (artifact / "recipe.yaml").read_text().strip() in text


def test_every_table_has_as_many_cells_in_each_row(artifact):
    text = card_of(artifact).text
    for title in ("Experts", "Routing", "How close it comes to its experts"):
        assert len({len(row) for row in table(text, title)}) == 1


def test_without_data_it_claims_nothing(world):
    text = card_of(world.artifact("bert", router={"type": "projection"}, data=False)).text
    assert "accuracy was not measured" in text and "Not measured: the recipe gave no data" in text


def test_folders_are_no_repositories_and_hub_ids_are(world, tmp_path, monkeypatch):
    """Wherever the build runs: a folder such as `models/a` looks like a Hub id from elsewhere."""
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "models")

    def download(repo_id, **kwargs):
        assert repo_id == "org/b"
        return str(folder / "b")

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    monkeypatch.chdir("/")
    experts = {"a": {"model": "models/a"}, "b": {"model": "org/b@main"}}
    recipe = tiny.write_recipe(tmp_path, ("a", "b"), base_model="models/base", experts=experts, data=False)
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    data = card_of(tmp_path / "out").data
    assert data.base_model in ("org/b", ["org/b"]) and data.base_model_relation == "merge"


def test_labels_cannot_break_tables(world):
    config = copy.deepcopy(read_config(world.artifact("bert")))
    config.experts[0]["labels"] = ["a|b", "two\nlines"]
    report = files.read_json(world.artifact("bert") / "report.json")
    text = render_card(config, report, "", "text")
    assert len({len(row) for row in table(text, "Experts")}) == 1
    assert len(table(text, "Experts")) == 2 + len(tiny.LABELS)


@pytest.mark.parametrize("recipe", ["{count} {nothing} {0}", "}{", "%s %(x)s", "# ```\n# text below a fence\nseed: 0"])
def test_a_recipe_may_hold_anything(world, recipe):
    folder = world.artifact("bert")
    text = render_card(read_config(folder), files.read_json(folder / "report.json"), recipe, "text")
    assert recipe in text
    before, after = text.split(recipe)
    fence = before.rsplit("\n", 2)[1].removesuffix("yaml")
    assert set(fence) == {"`"} and after.startswith(f"\n{fence}\n") and fence not in recipe


def test_a_recipe_made_in_python_says_so(world):
    folder = world.artifact("bert")
    text = render_card(read_config(folder), files.read_json(folder / "report.json"), "", "text")
    assert "without a recipe file" in text


def test_the_front_matter_is_plain_yaml(artifact):
    text = (artifact / "README.md").read_text(encoding="utf-8")
    _, front, _ = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) <= {"library_name", "pipeline_tag", "base_model", "base_model_relation", "tags"}


def test_writing_is_rendering(world, tmp_path):
    folder = world.artifact("bert")
    report = files.read_json(folder / "report.json")
    write_card(tmp_path / "card.md", read_config(folder), report, "seed: 0", "text")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == rendered(folder)
