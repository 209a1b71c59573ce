"""Which rows an artifact was made with, as hashes, so that nobody scores it on them by mistake."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from .data import read_rows
from .errors import TwinMergingError
from .prompt_rows import prompt_key
from .recipe import Recipe


RowHashes = dict[str, dict[str, list[str]]]
"""Hashes by expert and by part of its data (`train`, `validation`), sorted, each once."""

_DIGITS = 16
_SHOWN = 5
_VERSION = 1


def row_hash(row: dict) -> str:
    """
    First 16 hex digits of the SHA-256 of what makes a row the same input wherever its file lies.

    Text: both texts after Unicode NFKC, case folding and runs of white space made one space; a missing second text is an
    empty one; tokens are a text with spaces between them, a prompt's messages one with their roles; the label and the
    completion do not count. Image: the bytes of its file.
    """
    if "image" in row:
        return hashlib.sha256(Path(row["image"]).read_bytes()).hexdigest()[:_DIGITS]
    texts = [_plain(_first_text(row)), _plain(row.get("text_pair") or "")]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:_DIGITS]


def _first_text(row: dict) -> str:
    if "prompt" in row:
        return "\n".join(prompt_key(row))
    return " ".join(row["tokens"]) if "tokens" in row else row["text"]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hashes_of(rows: Iterable[dict]) -> list[str]:
    """Hashes of rows, sorted, each once."""
    return sorted({row_hash(row) for row in rows})


def recorded_hashes(recipe: Recipe, entries: list[dict], kind: str) -> RowHashes:
    """
    Hashes of every row of the `train` and `validation` files that a recipe names, whether a build needed it or not: the
    experts themselves were trained or chosen on them. `test` files are not opened.

    Args:
        entries: the experts' config entries. kind: `text` or `image`.
    """
    hashes: RowHashes = {}
    for expert, entry in zip(recipe.experts, entries, strict=True):
        if expert.data is None:
            continue
        files = {"train": expert.data.train, "validation": expert.data.validation}
        regression = entry["problem_type"] == "regression"
        hashes[expert.name] = {
            part: hashes_of(read_rows(path, kind, entry["labels"], regression))
            for part, path in files.items()
            if path is not None
        }
    return hashes


def write_hashes(path: Path, hashes: RowHashes) -> None:
    """Write an artifact's row hashes, one line for each part, the same bytes for the same rows."""
    experts = []
    for name, parts in hashes.items():
        lines = [f"  {json.dumps(part)}: {json.dumps(values)}" for part, values in parts.items()]
        experts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    text = f'{{"version": {_VERSION}, "hash": "sha256/{_DIGITS}", "experts": {{\n' + ",\n".join(experts) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


def read_hashes(path: Path) -> RowHashes:
    """Read what `write_hashes` wrote. Raises `TwinMergingError` if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, expected {_VERSION}")
        return {
            str(name): {str(part): [str(value) for value in values] for part, values in parts.items()}
            for name, parts in content["experts"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TwinMergingError(
            f"{path} cannot be read ({error}); it says which rows the artifact was made with, and without it no row can be "
            "scored: build the artifact again"
        ) from error


def refuse_overlap(files: Mapping[str, tuple[Path, list[dict]]], recorded: Iterable[tuple[str, RowHashes]]) -> None:
    """
    Refuse rows that an artifact was made with.

    Args:
        files: for each task, the file and its rows, in the order of its non-empty lines.
        recorded: (by whom, hashes), such as `("the artifact", ...)`.

    Raises:
        TwinMergingError: some rows overlap; names every such file, how many rows, of whose data, and the first lines.
    """
    origins: dict[str, str] = {}
    for holder, hashes in recorded:
        for name, parts in hashes.items():
            for part, values in parts.items():
                for value in values:
                    origins.setdefault(value, f"the {part} rows of {name!r} ({holder})")
    problems = []
    for path, rows in files.values():
        found = [(i, origins[value]) for i, value in enumerate(map(row_hash, rows)) if value in origins]
        if found:
            problems.append(_describe(path, len(rows), found))
    if problems:
        raise TwinMergingError(
            "these rows were seen when the artifact or its experts were made, so scores on them would say nothing; "
            "evaluate on other rows:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def _describe(path: Path, count: int, found: list[tuple[int, str]]) -> str:
    lines = _line_numbers(path)
    shown = ", ".join(str(lines[i]) for i, _ in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    origins = "; ".join(f"{n} among {origin}" for origin, n in Counter(origin for _, origin in found).items())
    return f"{path}: {len(found)} of {count} rows overlap: {origins}; line{'s' * (len(found) > 1)} {shown}"


def _line_numbers(path: Path) -> list[int]:
    """Number of each line that holds a row."""
    with path.open(encoding="utf-8-sig") as lines:
        return [number for number, line in enumerate(lines, start=1) if line.strip()]
