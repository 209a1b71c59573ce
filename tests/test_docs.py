"""The pages of docs/ say what the code does."""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import twin_merging_hf
from tests.files import ROOT
from twin_merging_hf import alignment, export, hub_upload, recipe


API = re.findall(r"^::: (\S+)", "".join(page.read_text() for page in sorted((ROOT / "docs").glob("api_*.md"))), re.M)
NOT_IN_API = {
    "checked_layout": "a step of align",
    "has_batch_norm": "a step of merge_models",
    "check_options": "of the command line",
    "parse_weights": "of the command line",
    "describe_export": "of the command line",
}


def reference() -> Any:
    """The script that writes the recipe reference, as a module."""
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/generate_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_reference_is_up_to_date() -> None:
    script = reference()
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python docs/generate_reference.py"


def test_the_recipe_reference_has_every_key_that_the_parser_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, check = set(), recipe._mapping

    def record(raw: Any, where: str, keys: tuple[str, ...]) -> dict:
        names = re.sub(r"\[\d+\]", "[]", "".join(f"{name}." for name in re.findall(r"`(.*?)`", where.split(" (")[0])))
        taken.update(names + key for key in keys)
        return check(raw, where, keys)

    monkeypatch.setattr(recipe, "_mapping", record)
    expert = {"model": "a", "data": {"train": "a.jsonl"}}
    recipe.parse_recipe({"experts": [expert], "alignment": "auto"}, Path("."))
    blocks = {"parameters", "experts[].parameters", "experts[].data", "experts", "exclusive", "router", "alignment"}
    assert taken - blocks == reference().keys() - blocks


def documented() -> Iterator[tuple[str, Any]]:
    """What the API pages show, by name; classes with their public methods."""
    for path in API:
        module, name = path.removeprefix("twin_merging_hf.").rsplit(".", 1)
        found = getattr(importlib.import_module(f"twin_merging_hf.{module}"), name)
        yield path, found
        if inspect.isclass(found):
            for key, method in inspect.getmembers(found, inspect.isfunction):
                if not key.startswith("_") and "twin_merging" in method.__module__:
                    yield f"{path}.{key}", method


def test_the_api_pages_have_every_public_name():
    shown = {path.rsplit(".", 1)[1] for path in API}
    packages: Any = (twin_merging_hf, alignment, export, hub_upload)
    public = {name for package in packages for name in package.__all__ if callable(getattr(package, name))}
    assert public - shown == set(NOT_IN_API)


def test_docstrings_name_arguments_that_exist():
    checked = 0
    for path, item in documented():
        text = re.search(r"^Args:\n((?: .*\n|\n)*)", f"{inspect.getdoc(item) or ''}\n", re.M)
        for names in re.findall(r"^ {4}(\w[^:(]*?)(?: \(.*?\))?(?:, \w+ \(.*?\))*:", text[1] if text else "", re.M):
            checked += 1
            assert set(names.split(", ")) <= set(inspect.signature(item).parameters), f"{path}: {names}"
    assert checked > 80
