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


SPACES = {
    "labels of each": ({"a": ["x", "y"], "b": ["p", "q"]}, "over all experts' labels. `expert_weights`", "compete"),
    "labels of each and a number": (
        {"a": ["x", "y"], "r": ["value"]},
        "a regression stands in `expert_logits`",
        "compete",
    ),
    "common labels": ({"a": ["x", "y"], "b": ["y", "x"]}, "labels that all experts have", "only `expert_weights`"),
    "numbers": ({"r": ["value"], "s": ["value"]}, "one number a row", "only `expert_weights`"),
}


@pytest.mark.parametrize("case", SPACES)
def test_it_says_what_the_outputs_are(world, case):
    labels, meaning, limit = SPACES[case]
    text = card_of(world.artifact("bert", labels)).text
    assert meaning in text and limit in text.split("## Limits")[1]


def test_it_names_the_command_for_scores_only_where_that_gives_some(world):
    artifact = world.artifact("bert", data=False, router={"type": "projection", "rank": 4})
    assert "`twin-merging evaluate ARTIFACT" in card_of(artifact).text
    text = card_of(world.artifact("bert-tokens", tiny.TAGS)).text
    assert "`twin-merging evaluate` does not score taggers" in text and "evaluate ARTIFACT" not in text


def test_it_says_where_rows_of_nobody_go(world):
    config = read_config(world.artifact("bert"))
    report = files.read_json(world.artifact("bert") / "report.json")
    assert "is still given to one of them" in render_card(config, report, "seed: 0", "text")
    config.router_none_distance = 1.0
    text = render_card(config, report, "seed: 0", "text")
    assert "is still given to one of them" not in text and "goes to the shared model where the router" in text


def test_it_says_where_a_shared_model_by_reference_is(world):
    config = read_config(world.artifact("bert"))
    report = files.read_json(world.artifact("bert") / "report.json")
    assert "is fetched from" not in render_card(config, report, "seed: 0", "text")
    config.shared_reference = {"model": "me/base", "revision": "0" * 40, "sha256": "1" * 64}
    text = render_card(config, report, "seed: 0", "text")
    assert f"is fetched from [me/base](https://huggingface.co/me/base) at commit `{'0' * 40}`" in text
    config.shared_reference = {"model": "/there/base", "revision": None, "sha256": "1" * 64}
    assert "is fetched from the folder `/there/base`" in render_card(config, report, "seed: 0", "text")


def test_it_says_what_the_report_says(artifact):
    text, report = card_of(artifact).text, files.read_json(artifact / "report.json")
    assert [row[0] for row in table(text, "Experts")[2:]] == list(tiny.LABELS)
    assert [row[-1] for row in table(text, "Experts")[2:]] == [", ".join(labels) for labels in tiny.LABELS.values()]
    confusion = [[int(cell) for cell in row[1:]] for row in table(text, "Routing")[2:]]
    assert confusion == report["router"]["confusion"]
    agreement = {row[0]: row[2:] for row in table(text, "How close it comes to its experts")[2:]}
    for name, share in report["verdict"]["agreement"].items():
        assert agreement[name] == [f"{share:.1%}", f"{report['verdict']['given'][name]:.1%}"]
    assert f"{report['storage']['total'] / 1e6:.2f} MB" in text
    assert (artifact / "recipe.yaml").read_text().strip() in text


def test_every_table_has_as_many_cells_in_each_row(artifact):
    text = card_of(artifact).text
    for title in ("Experts", "Routing", "How close it comes to its experts", "Scores"):
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
    assert "https://huggingface.co/org/b" in card_of(tmp_path / "out").text
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
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags", "model-index"}


def test_writing_is_rendering(world, tmp_path):
    folder = world.artifact("bert")
    report = files.read_json(folder / "report.json")
    write_card(tmp_path / "card.md", read_config(folder), report, "seed: 0", "text")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == rendered(folder)


# ---- scores -----------------------------------------------------------------------------------------------------


def metrics_of(card: ModelCard) -> dict[tuple[str, str], float]:
    """Values of the model-index as the Hub reads it, by task and metric."""
    return {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results or []}


def test_scores_of_the_build_are_raw_and_normalised(artifact):
    verdict = files.read_json(artifact / "report.json")["verdict"]
    found = metrics_of(card_of(artifact))
    for name in tiny.LABELS:
        routed, own = verdict["scores"][name]["routed"], verdict["expert_scores"][name]["score"]
        assert found[name, "accuracy"] == routed
        assert found.get((name, "normalised_accuracy")) == (pytest.approx(100 * routed / own) if own else None)
    rows = {row[0]: row for row in table(card_of(artifact).text, "Scores")[2:]}
    assert set(rows) == set(tiny.LABELS)
    assert rows["b"][3] == f"{verdict['expert_scores']['b']['score']:.3f}"


EVALUATION = {
    "data": {"b": {"file": "/home/me/b.jsonl", "rows": 50, "metric": "macro_f1"}},
    "experts": {"scores": {"b": 0.8}, "source": "the experts themselves, on these rows"},
    "routed": {"raw": {"b": 0.6}},
    "given": {"raw": {"b": 0.7}},
    "merges": {"linear": {"raw": {"b": 0.5}}, "ties": {"raw": {"b": 0.4}}},
}


def test_an_evaluation_replaces_the_builds_scores(world):
    folder = world.artifact("bert")
    report = files.read_json(folder / "report.json")
    card = ModelCard(render_card(read_config(folder), report, "", "text", evaluation=EVALUATION))
    assert metrics_of(card) == {("b", "macro_f1"): 0.6, ("b", "normalised_macro_f1"): 75.0}
    header, _, row = table(card.text, "Scores")
    assert header[-2:] == ["static: linear", "static: ties"]
    assert row == ["b", "macro_f1", "50", "0.800", "0.600 (75.0%)", "0.700 (87.5%)", "0.500 (62.5%)", "0.400 (50.0%)"]
    assert "The worst task is b, at 75.0%" in card.text and "/home/me" not in str(card)


def test_an_expert_that_scores_nothing_has_no_normalised_score(world):
    folder = world.artifact("bert")
    evaluation = {**EVALUATION, "experts": {"scores": {"b": 0.0}, "source": ""}, "merges": {}}
    report = files.read_json(folder / "report.json")
    card = ModelCard(render_card(read_config(folder), report, "", "text", evaluation=evaluation))
    assert metrics_of(card) == {("b", "macro_f1"): 0.6} and "worst task" not in card.text


def test_scores_that_were_not_measured_are_not_claimed(world):
    card = card_of(world.artifact("bert", router={"type": "projection"}, data=False))
    assert card.data.eval_results is None and "twin-merging evaluate" in card.text.split("## Scores")[1][:200]


# ---- sources ----------------------------------------------------------------------------------------------------


def with_sources(folder: Path, **sources: dict) -> ModelCard:
    config = copy.deepcopy(read_config(folder))
    config.provenance["sources"] = {
        name: {"model": name, "from_hub": False, "sha256": "0" * 64, **facts} for name, facts in sources.items()
    }
    return ModelCard(render_card(config, files.read_json(folder / "report.json"), "", "text"))


def hub(model: str, **facts) -> dict:
    return {"model": model, "from_hub": True, "revision": "f" * 40, **facts}


def test_the_base_comes_first_and_every_source_has_its_commit(world):
    card = with_sources(world.artifact("bert"), a=hub("org/a@v1"), b=hub("org/b"), base=hub("org/base"), c={})
    assert card.data.base_model == ["org/base", "org/a", "org/b"]
    rows = {row[0]: row for row in table(card.text, "Experts")[2:]}
    assert rows["a"][1] == "[org/a](https://huggingface.co/org/a)" and rows["a"][2] == "`ffffffffffff`"
    assert rows["c"][1] == "`c`" and rows["c"][2] == "sha256 `000000000000`"


MIT, APACHE, NC = {"license": "mit"}, {"license": "Apache-2.0"}, {"license": "cc-by-nc-4.0"}
OWN = {"license": "other", "license_name": "llama3"}
# licences of a, b, c -> licence in the metadata, what the card says
LICENCES = {
    "all the same": ((MIT, MIT, MIT), "mit", "All sources with a recorded licence are under mit."),
    "permissive": ((MIT, APACHE, MIT), "other", "The sources are under apache-2.0, mit; keep the notices"),
    "in conflict": ((MIT, NC, MIT), "other", "(cc-by-nc-4.0, mit) and may conflict"),
    "own ones": ((OWN, NC, OWN), "other", "(cc-by-nc-4.0, llama3) and may conflict"),
    "one unknown": ((MIT, {}, MIT), "other", "No licence is recorded for b:"),
    "several of one source": (({"license": ["mit", "gpl-3.0"]}, MIT, MIT), "other", "may conflict"),
    "all unknown": (({}, {}, {}), None, "No source records a licence"),
}


@pytest.mark.parametrize("case", LICENCES)
def test_licences(world, case):
    sources, licence, text = LICENCES[case]
    card = with_sources(world.artifact("bert"), **dict(zip("abc", sources, strict=True)))
    assert card.data.license == licence
    assert text in card.text.split("## Licences")[1].split("## ")[0]


def test_data_sets_of_the_sources_are_named(world):
    a, b = hub("org/a", datasets=["glue", "org/data"]), hub("org/b", datasets=["glue", "no data set"])
    assert with_sources(world.artifact("bert"), a=a, b=b, c={}).data.datasets == ["glue", "org/data"]


# ---- the whole card ---------------------------------------------------------------------------------------------


def test_both_papers_are_cited(artifact):
    text = card_of(artifact).text
    assert "2406.15479" in text and "2403.01753" in text and text.count("@inproceedings") == 2


def test_a_very_long_label_is_cut(world):
    config = copy.deepcopy(read_config(world.artifact("bert")))
    config.experts[0]["labels"] = ["x" * 100_000, "y"]
    text = render_card(config, files.read_json(world.artifact("bert") / "report.json"), "", "text")
    assert len(text) < 20_000
