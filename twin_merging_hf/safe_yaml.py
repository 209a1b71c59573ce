"""YAML from anywhere: plain data only, each key once, and neither size, depth nor aliases can exhaust the machine."""

from typing import Any

import yaml


MOST_CHARACTERS = 1 << 20
_DEEPEST = 100


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last one."""


def _construct_unique(loader: Any, node: Any) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    seen: set = set()
    for key in keys:
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique)


def parse_yaml(text: str) -> Any:
    """
    Parse YAML of unknown origin.

    Raises:
        ValueError: it is no YAML, asks for other types than plain data, gives a key twice, or is longer, deeper or more
            self-referring than any honest file.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters, more than {MOST_CHARACTERS}")
    _check_depth(text)
    try:
        content = yaml.load(text, Loader=_StrictLoader)
        if _written_out(content, {}) > MOST_CHARACTERS:
            raise ValueError(f"its aliases stand for more than {MOST_CHARACTERS} characters")
        return content
    except (yaml.YAMLError, RecursionError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _check_depth(text: str) -> None:
    """The parser's time grows with the square of open brackets, and deep blocks exhaust its stack."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > _DEEPEST:
            raise ValueError(f"brackets are nested deeper than {_DEEPEST}")


def _written_out(value: Any, known: dict[int, int]) -> int:
    """Length of a value with every alias written out; one that holds itself is endless."""
    if not isinstance(value, (dict, list)):
        return len(str(value)) if isinstance(value, str) else 1
    if id(value) not in known:
        known[id(value)] = MOST_CHARACTERS + 1  # until it is known: what holds itself meets this
        items = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(item, known) for item in items)
    return known[id(value)]
