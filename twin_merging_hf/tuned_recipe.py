"""Write a recipe again with other values for some keys, and with paths that are right from its new folder."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from .distributed import is_main
from .errors import TwinMergingError
from .recipe import BASE, Recipe


def write_tuned(
    recipe: Recipe, out: Path, log: Path, chosen: dict[str, float], left: dict[str, str], record: dict[str, Any]
) -> None:
    """
    Write the recipe with the chosen `lambda`, `density` and `rank`, and the record of all candidates as JSON; of several
    processes one does.

    Raises:
        TwinMergingError: a file cannot be written.
    """
    if not is_main():
        return
    lines = [f"# Tuned on held-out rows; {log.name} holds the scores of every candidate. Chosen:"]
    lines += [f"#   {key}: {value:g}" for key, value in chosen.items()] or ["#   nothing"]
    lines += [f"# Left as it was: {key}, because {reason}." for key, reason in left.items()]
    body = yaml.safe_dump(tuned_content(recipe, out.parent, chosen), sort_keys=False, allow_unicode=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        out.write_text("\n".join([*lines, body]), encoding="utf-8")
    except OSError as error:
        raise TwinMergingError(f"{out} cannot be written: {error}") from error


def tuned_content(recipe: Recipe, folder: Path, chosen: dict[str, float]) -> dict:
    """The recipe's YAML content with the chosen values and with relative paths that hold from `folder`."""
    content = yaml.safe_load(recipe.text)
    parameters = {key: chosen[key] for key in ("lambda", "density") if key in chosen}
    if parameters:
        content["parameters"] = {**(content.get("parameters") or {}), **parameters}
    if "rank" in chosen:
        content["exclusive"] = {**(content.get("exclusive") or {}), "rank": int(chosen["rank"])}
    for key in ("base_model", "shared_model"):
        if content.get(key) not in (None, BASE) or (key == "base_model" and content.get(key)):
            content[key] = _model(content[key], recipe.folder, folder)
    for name, expert in zip(recipe.names, content["experts"], strict=True):
        expert.setdefault("name", name)  # an unnamed expert is called after its path, which may change
        expert["model"] = _model(expert["model"], recipe.folder, folder)
        data = expert.get("data")
        if isinstance(data, str):
            expert["data"] = _moved(data, recipe.folder, folder)
        elif data:
            expert["data"] = {part: _moved(file, recipe.folder, folder) for part, file in data.items()}
    return content


def _model(source: str, old: Path, new: Path) -> str:
    """A folder's path from the new folder; a Hub id stays."""
    return _moved(source, old, new) if (old / source).is_dir() else source


def _moved(path: str, old: Path, new: Path) -> str:
    if Path(path).is_absolute() or old.resolve() == new.resolve():
        return path
    return os.path.relpath((old / path).resolve(), new.resolve())
