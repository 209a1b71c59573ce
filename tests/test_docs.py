"""The pages of docs/ say what the code does."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.files import ROOT
from twin_merging_hf import recipe


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
