"""Cards of all kinds of artifacts, from end to end: the Hub reads them, and no section, table or cell is empty."""

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests import adapters, tiny
from tests.cards import complaints, sections
from tests.modeling.language import LanguageWorld
from twin_merging_hf.artifact import read_config
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.demo.story import tell
from twin_merging_hf.hub_upload.upload import card_for
from twin_merging_hf.progress import Progress


REAL = "TWIN_MERGING_ARTIFACTS"
TITLES = ["How to use", "Experts", "Routing", "How close it comes to its experts", "Scores", "Size", "Limits", "Licences",
          "Recipe", "Citation"]  # fmt: skip
CARDS = {
    "bert": {"exclusive": {"rank": 2, "dtype": "int4"}, "router": "auto"},
    "vit": {"exclusive": {"rank": 2}},
    "bert-tokens": {},
    "bert, a regression": {"labels": {"a": ["x", "y"], "b": ["value"]}},
    "bert, no data": {"router": {"type": "projection"}, "data": False},
    "bert, sparse": {"exclusive": {"method": "magnitude", "ratio": 0.1}},
}
LORAS: dict[str, list[str]] = {"a": [], "b": []}


def check(folder: Path, pipeline: bool = True) -> None:
    """Both cards: the one in the folder, and the one that an upload would write."""
    for text in ((folder / "README.md").read_text(encoding="utf-8"), card_for(folder, read_config(folder))):
        card = ModelCard(text)
        assert card.data.library_name == "transformers" and bool(card.data.pipeline_tag) == pipeline
        assert [title for title, _ in sections(card.text)][1:] == TITLES
        assert complaints(text) == []


@pytest.mark.parametrize("case", CARDS)
def test_of_classifiers(world, case):
    kind, recipe = case.split(",")[0], dict(CARDS[case])
    labels = recipe.pop("labels", tiny.TAGS if kind == "bert-tokens" else None)
    check(world.artifact(kind, labels, **recipe))


@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm"])
def test_of_language_models(tmp_path, kind):
    check(LanguageWorld(tmp_path).artifact(kind, data=True), pipeline=kind != "t5-lm")


@pytest.mark.parametrize("data", [True, False])
def test_of_adapters_of_a_language_model(tmp_path, data):
    adapters.make_adapters("llama-lm", tmp_path, LORAS, data=8, task_type="CAUSAL_LM")
    recipe = adapters.recipe(
        tmp_path, LORAS, data=data, shared_model="base", router="lexical" if data else "projection"
    )
    check(build_artifact(recipe, tmp_path / "artifact", Progress(quiet=True)).folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_the_demo(tmp_path):
    tell(tmp_path / "demo", 0, lambda line: None)
    check(tmp_path / "demo" / "artifact")


@pytest.mark.slow
def test_of_artifacts_that_are_there():
    """TWIN_MERGING_ARTIFACTS: folders of artifacts of real weights, with a colon between."""
    if REAL not in os.environ:
        pytest.skip(f"set {REAL} to folders of artifacts")
    for folder in os.environ[REAL].split(os.pathsep):
        check(Path(folder))


# ---- the check itself -------------------------------------------------------------------------------------------

GOOD = """\
---
license: mit
---
# A title

More than twenty letters of prose. What `x` costs.

## Table

| a | b \\| c |
| --- | --- |
| 1 | 2, more than twenty letters |

## Listing

````yaml
# no heading
```
x: None
````
"""
# what is replaced in a good card -> by what -> what is said about it
BAD = {
    "nothing below": ("More than twenty letters of prose. What `x` costs.", "", "A title: hardly a word"),
    "no rows": ("| 1 | 2, more than twenty letters |", "", "Table: a table without rows"),
    "an empty cell": ("| 1 |", "| |", "Table: an empty or missing cell"),
    "a cell less": ("| 1 |", "|", "Table: an empty or missing cell"),
    "no listing": ("# no heading\n```\nx: None\n", "", "Listing: an empty listing"),
    "None": ("| 1 |", "| None |", "Table: 'None'"),
    "nan": ("`x`", "nan%", "A title: 'nan'"),
    "a placeholder": ("`x`", "{x}", "A title: '{x}'"),
}


def test_a_good_card_is_not_complained_about():
    assert complaints(GOOD) == []


@pytest.mark.parametrize("case", BAD)
def test_what_is_missing_is_noticed(case):
    before, after, said = BAD[case]
    assert before in GOOD
    found = complaints(GOOD.replace(before, after))
    assert any(line.startswith(said) for line in found), found
