"""Labelled rows for routers and scores: JSONL files, checked line by line, and seeded splits."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TwinMergingError, is_file, require_extra
from .prompt_rows import masked_row, prompt_key, prompt_row


# Beyond this, float32 is infinite.
_LARGEST = 3e38
EXAMPLES = {
    "text": '{"text": ..., "label": ...}',
    "image": '{"image": ..., "label": ...}',
    "tokens": '{"tokens": [...], "tags": [...]}',
    "prompt": '{"prompt": ..., "completion": ...}, or {"messages": [{"role": ..., "content": ...}, ...]}',
    "masked": '{"text": ...}',
}
"""What a row of each kind looks like."""
READ_AS_TEXT = ("text", "prompt", "masked")
"""Kinds of rows that are one text for the model, of which a router may read the tokens."""
_LANGUAGE_ROWS = {"prompt": prompt_row, "masked": masked_row}


@dataclass(frozen=True)
class ExpertRows:
    """
    Rows of one expert's task; each has `text` (and `text_pair`) or `image`, and `label`: the expert's own label id
    (int) or a number (float, regression). A row of a token classifier has `tokens` and as many `tags`, own label ids; one
    of a language model a `prompt` and its `completion` (see `prompt_rows`), or a `text` alone where masks are filled.

    train: rows for the router. held_out: rows that no training saw, for temperature, agreement and verdict.
    """

    train: list[dict]
    held_out: list[dict]


def read_rows(
    path: Path, kind: str, labels: list[str], regression: bool, prepare: Callable[[str], str] = lambda line: line
) -> list[dict]:
    """
    Read and check a JSONL file.

    Args:
        kind: `text`, `image`, `tokens`, `prompt` or `masked`.
        labels: the expert's label names, in id order.
        prepare: what is done to each line first.

    Raises:
        TwinMergingError: the file is missing, empty or holds a malformed row (named by its line number).
    """
    if not path.is_file():
        raise TwinMergingError(f"data file {path} does not exist")
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(prepare(line), f"{path}, line {number}", kind, labels, regression, path.parent))
    except UnicodeDecodeError as error:
        raise TwinMergingError(f"{path}: not UTF-8 text ({error})") from error
    except PermissionError as error:
        raise TwinMergingError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise TwinMergingError(f"{path} has no rows")
    return rows


def read_calibration_rows(path: Path, kind: str) -> list[dict]:
    """Rows of which only the inputs count: labels and tags may be missing or of any task. Raises as `read_rows`."""

    def without_labels(line: str) -> str:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return line  # complained about with its number
        if isinstance(row, dict) and kind in ("text", "image"):
            row["label"] = 0
        elif isinstance(row, dict) and isinstance(row.get("tokens"), list):
            row["tags"] = [0] * len(row["tokens"])
        return json.dumps(row)

    return read_rows(path, kind, ["O"], kind in ("text", "image"), without_labels)


def _row(line: str, where: str, kind: str, labels: list[str], regression: bool, folder: Path) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TwinMergingError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise TwinMergingError(f"{where}: expected an object such as {EXAMPLES[kind]}, got {row!r}")
    if kind in _LANGUAGE_ROWS:
        return _LANGUAGE_ROWS[kind](row, where)
    _check_kind(row, where, kind)
    if kind == "tokens":
        return _token_row(row, where, labels)
    if not isinstance(row.get(kind), str) or (kind == "text" and not row[kind].strip()):
        raise TwinMergingError(f"{where}: `{kind}` must be a non-empty string, got {row.get(kind)!r}")
    known = {"text", "text_pair", "label"} if kind == "text" else {"image", "label"}
    unknown = set(row) - known
    if unknown:
        raise TwinMergingError(f"{where}: unknown key {sorted(unknown)[0]!r} (known: {', '.join(sorted(known))})")
    checked = {"label": _label(row, where, labels, regression)}
    if kind == "text":
        _check_characters(row, where)
        checked["text"] = row["text"]
        if row.get("text_pair") is not None:
            if not isinstance(row["text_pair"], str):
                raise TwinMergingError(f"{where}: `text_pair` must be a string, got {row['text_pair']!r}")
            checked["text_pair"] = row["text_pair"]
        return checked
    checked["image"] = _image(folder / row["image"], where)
    return checked


def _image(path: Path, where: str) -> Path:
    """Check that an image can be opened, without reading its pixels."""
    if not is_file(path):
        raise TwinMergingError(f"{where}: image {path} does not exist")
    images = require_extra("PIL.Image", "vision")
    try:
        with images.open(path):
            return path
    except Exception as error:  # also of pictures that are made to exhaust whoever opens them
        raise TwinMergingError(f"{where}: image {path} cannot be read: {error}") from error


def _check_kind(row: dict, where: str, kind: str) -> None:
    """Refuse rows of the other sort of task as a whole, before single keys are looked at."""
    others = ("text", "image", "label") if kind == "tokens" else ("tokens", "tags")
    own = ("tokens", "tags") if kind == "tokens" else (kind,)
    found = [key for key in others if key in row]
    if found and not any(key in row for key in own):
        theirs, mine = ("whole texts or images", "tokens") if kind == "tokens" else ("tokens", f"whole {kind}s")
        raise TwinMergingError(
            f"{where}: `{found[0]}` belongs to rows of a classifier of {theirs}, but this expert is a classifier of {mine}, "
            f"whose rows are like {EXAMPLES[kind]}"
        )


def _token_row(row: dict, where: str, labels: list[str]) -> dict:
    unknown = set(row) - {"tokens", "tags"}
    if unknown:
        raise TwinMergingError(f"{where}: unknown key {sorted(unknown)[0]!r} (known: tags, tokens)")
    for key in ("tokens", "tags"):
        if not isinstance(row.get(key), list) or not row[key]:
            raise TwinMergingError(f"{where}: `{key}` must be a list that is not empty, got {_shown(row.get(key))}")
    for position, token in enumerate(row["tokens"]):
        if not isinstance(token, str) or not token.strip():
            raise TwinMergingError(f"{where}: token {position} must be a non-empty string, got {_shown(token)}")
        _check_characters({"text": token}, where, "tokens")
    if len(row["tokens"]) != len(row["tags"]):
        raise TwinMergingError(
            f"{where}: {len(row['tokens'])} `tokens`, but {len(row['tags'])} `tags`; every token needs one"
        )
    return {"tokens": row["tokens"], "tags": [_class_id(tag, where, labels, "tag") for tag in row["tags"]]}


def _check_characters(row: dict, where: str, name: str | None = None) -> None:
    for key in ("text", "text_pair"):
        try:
            str(row.get(key) or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise TwinMergingError(f"{where}: `{name or key}` holds half of a character: {error}") from error


def _label(row: dict, where: str, labels: list[str], regression: bool) -> Any:
    if "label" not in row:
        raise TwinMergingError(f"{where}: `label` is missing")
    label = row["label"]
    if regression:
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not abs(label) <= _LARGEST:
            raise TwinMergingError(f"{where}: a regression row's `label` must be a finite number, got {_shown(label)}")
        return float(label)
    return _class_id(label, where, labels, "label")


def _class_id(label: Any, where: str, labels: list[str], what: str) -> int:
    """Id of a label that is given by name or id."""
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    raise TwinMergingError(
        f"{where}: {what} {_shown(label)} is none of this expert's labels ({', '.join(labels[:20])}) nor an id from 0 to "
        f"{len(labels) - 1}"
    )


def _shown(label: Any) -> str:
    return "one too large" if isinstance(label, int) and label.bit_length() > 999 else repr(label)[:80]


def row_key(row: dict) -> str:
    """What makes a row the same input as another: its text, image or tokens, not its label."""
    if "tokens" in row:
        return json.dumps(["tokens", *row["tokens"]])
    if "prompt" in row:
        return json.dumps(["prompt", *prompt_key(row)])
    return json.dumps([str(row.get(key)) for key in ("text", "text_pair", "image")])


def split_rows(train: list[dict], validation: list[dict] | None, limit: int, seed: int, name: str) -> ExpertRows:
    """
    Choose router training rows and held-out rows; equal inputs never fall on both sides.

    Args:
        validation: held-out rows, if the user gave some; else a fifth of `train` is held out.
        limit: at most this many training rows (and half as many held-out ones).

    Raises:
        TwinMergingError: too few different rows to train and to hold out.
    """
    unique = list({row_key(row): row for row in train}.values())
    random.Random(f"{seed}:{name}").shuffle(unique)
    if validation is None:
        count = max(1, min(len(unique) // 5, limit // 2))
        held_out, rest = unique[:count], unique[count:]
    else:
        held_out = list({row_key(row): row for row in validation}.values())
        random.Random(f"{seed}:{name}:held-out").shuffle(held_out)
        held_out = held_out[: max(1, limit // 2)]
        seen = {row_key(row) for row in held_out}
        rest = [row for row in unique if row_key(row) not in seen]
    if len(rest) < 2 or not held_out:
        raise TwinMergingError(
            f"expert {name!r}: its data has {len(unique)} different training rows; at least 2 are needed besides 1 held out"
        )
    return ExpertRows(train=rest[:limit], held_out=held_out)
