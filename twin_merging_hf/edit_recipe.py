"""The recipe of an edited artifact: settings as stored, experts as they are now, and where their files lie."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import TwinMergingError
from .recipe import Recipe, load_recipe, parse_recipe
from .safe_yaml import parse_yaml


@dataclass(frozen=True)
class Newcomer:
    """What the user says about an expert that joins: paths are relative to the current folder."""

    name: str
    model: str
    """Folder, or Hub id with an optional `@revision`."""
    data: Path | None = None
    labels: tuple[str, ...] | None = None


class StoredRecipe:
    """
    An artifact's recipe, with the help of a recipe file that the user gives.

    Args:
        text: the artifact's recipe.yaml; empty if it was built from Python.
        given: path of a recipe whose experts, matched by name, replace the stored entries (models and data).
        places: folders to try for the stored recipe's relative paths, if none is given.

    Raises:
        TwinMergingError: one of the recipes cannot be read.
    """

    def __init__(self, text: str, given: Path | None, places: Sequence[Path]):
        self.content: dict[str, Any] = _parsed(text)
        self.given, self.places = given, list(places)
        self.entries: dict[str, dict] = {_name(entry): entry for entry in self.content.get("experts", [])}
        if given is not None:
            load_recipe(given)  # says what is wrong with it
            other = _parsed(given.read_text(encoding="utf-8"))
            self.content = self.content or dict(other)
            if "base_model" in self.content and "base_model" in other:
                self.content["base_model"] = other["base_model"]
            self.entries |= {_name(entry): entry for entry in other["experts"]}
            self.places = [given.parent]

    def has_settings(self) -> bool:
        """Whether it is known how the artifact was built."""
        return bool(self.content)

    def folder(self, names: Sequence[str], data: bool, base: bool) -> Path | None:
        """
        The first folder in which the data files of these experts (and the base model) lie, or None.

        A base model's Hub id lies everywhere.
        """
        wanted: list[str] = []
        for name in names if data else ():
            entry = self.entries.get(name, {})
            if entry.get("data") is None:
                return None
            files = entry["data"]
            wanted += (
                [files] if isinstance(files, str) else [files[key] for key in ("train", "validation") if key in files]
            )
        source = self.content.get("base_model") if base else None
        places = [place for place in self.places if all((place / file).is_file() for file in wanted)]
        if source is None:
            return places[0] if places else None
        local = [place for place in places if (place / source).is_dir()]
        if not local and _looks_like_hub_id(source):
            local = places
        return local[0] if local else None

    def recipe(
        self,
        names: Sequence[str],
        newcomer: Newcomer | None,
        folder: Path,
        built_from: Sequence[str],
        needs_data: bool = False,
    ) -> Recipe:
        """
        The recipe of the artifact with these experts, in order.

        Args:
            newcomer: the one of `names` that joins; its paths are rewritten to be relative to `folder`.
            built_from: the experts that the shared model was made of.
            needs_data: whether every expert needs rows.

        Raises:
            TwinMergingError: the result is no possible recipe, or rows are missing.
        """
        entries = [self._entry(name, newcomer, folder) for name in names]
        if needs_data:
            for entry in entries:
                if entry.get("data") is None:
                    raise TwinMergingError(
                        f"expert {entry['name']!r} has no rows, and the artifact's router is fitted to rows of all "
                        "experts; give --data FILE with rows of a new expert, or `data` in the recipe"
                    )
        content = {**self.content, "experts": entries}
        router = content.get("router")
        if isinstance(router, dict) and isinstance(router.get("top_k"), int) and router["top_k"] > len(names):
            content["router"] = {**router, "top_k": len(names)}
        text = _HEADER.format(experts=", ".join(built_from)) + yaml.safe_dump(
            content, sort_keys=False, allow_unicode=True
        )
        return parse_recipe(content, folder=folder, text=text)

    def _entry(self, name: str, newcomer: Newcomer | None, folder: Path) -> dict:
        if newcomer is None or name != newcomer.name:
            return self.entries.get(name, {"name": name, "model": "unknown"})
        entry: dict[str, Any] = {"name": name, "model": _moved(newcomer.model, folder)}
        listed = self.entries.get(name, {}) if self.given is not None else {}
        if newcomer.data is not None:
            if not newcomer.data.is_file():
                raise TwinMergingError(f"expert {name!r}: data file {newcomer.data} does not exist")
            entry["data"] = _moved(str(newcomer.data), folder)
        elif listed.get("data") is not None:
            entry["data"] = listed["data"]
        if newcomer.labels is not None:
            entry["labels"] = list(newcomer.labels)
        elif listed.get("labels") is not None:
            entry["labels"] = listed["labels"]
        return entry


_HEADER = (
    "# Experts were added, removed or replaced after the build. The shared model is still the one merged from\n"
    "# {experts}; a new build of this file would merge another (see `edits` in report.json).\n"
)


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise TwinMergingError(f"the artifact's recipe is not valid YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def _name(entry: dict) -> str:
    return parse_recipe({"experts": [{key: entry[key] for key in ("name", "model") if key in entry}]}).names[0]


def _moved(source: str, folder: Path) -> str:
    """A path of the current folder as one relative to `folder`; absolute paths and Hub ids stay as they are."""
    path = Path(source).expanduser()
    if path.is_absolute() or not path.exists():
        return source
    return os.path.relpath(path.resolve(), folder.resolve())


def _looks_like_hub_id(source: str) -> bool:
    return not source.startswith((".", "/", "~")) and source.count("/") <= 1
