"""What a source's own model card says about rights and data: read with care, as anyone may have written it."""

from pathlib import Path
from typing import Any

from .safe_yaml import parse_yaml


# Metadata of real cards is a few kilobytes, and stands first; what comes later is not read.
_MOST_BYTES = 1 << 20
_MOST_ITEMS = 100
_LONGEST = 200


def card_facts(folder: Path) -> dict[str, Any]:
    """
    `license` (with `license_name` where the card gives one) and `datasets` of a model folder's README.md, as far as they
    are there and are what they should be. A card that cannot be read says nothing.
    """
    metadata = _metadata(folder / "README.md")
    facts: dict[str, Any] = {}
    for key in ("license", "license_name"):
        names = _names(metadata.get(key))
        if names:
            facts[key] = names[0] if len(names) == 1 else names
    datasets = _names(metadata.get("datasets"))
    return {**facts, "datasets": datasets} if datasets else facts


def _metadata(card: Path) -> dict:
    try:
        with card.open("rb") as stream:
            text = stream.read(_MOST_BYTES).decode("utf-8")
        if not text.startswith("---\n"):
            return {}
        content = parse_yaml(text[4:].split("\n---", 1)[0])
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _names(value: Any) -> list[str]:
    """Short single-line strings out of a string or a list."""
    items = value if isinstance(value, list) else [value]
    return [
        v for v in items[:_MOST_ITEMS] if isinstance(v, str) and v.strip() and len(v) <= _LONGEST and v.isprintable()
    ]
