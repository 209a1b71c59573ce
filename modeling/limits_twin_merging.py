"""Sizes that no honest artifact has: refused while they are only numbers, before anything is built or allocated."""

import os
import re
from contextvars import ContextVar

from transformers.utils import cached_file


LARGEST = 1 << 31
MOST_LAYERS = 512
MOST_EXPERTS = 1024
STORED: ContextVar[int | None] = ContextVar("stored", default=None)
"""Bytes of the weights of the artifact that is being loaded in this thread."""
_DEEPEST = 50
_COUNTS_LAYERS = re.compile(r"(.*_)?n?(layers?|blocks|depths?|stages)")
_WEIGHTS = "model.safetensors"


def check_sizes(fields: dict, where: str) -> None:
    """
    Raise `ValueError` if a number anywhere in a model's config is beyond what such a model can have.

    Building a model takes time for each layer even where nothing is allocated, so layers have a limit of their own.
    """
    stack: list = [(where, fields, 0)]
    while stack:
        name, value, depth = stack.pop()
        if depth > _DEEPEST:
            raise ValueError(f"`{name}` is nested deeper than {_DEEPEST}")
        if isinstance(value, dict):
            stack += [(f"{name}.{key}", item, depth + 1) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [(name, item, depth + 1) for item in value]
            if _counts_layers(name) and len(value) > MOST_LAYERS:
                raise ValueError(f"`{name}` has {len(value)} items, more than {MOST_LAYERS}")
        elif isinstance(value, int) and not isinstance(value, bool):
            most = MOST_LAYERS if _counts_layers(name) else LARGEST
            if abs(value) > most:
                raise ValueError(f"`{name}` is {_shown(value)}; nothing that this code can load has more than {most}")


def _counts_layers(name: str) -> bool:
    return _COUNTS_LAYERS.fullmatch(name.rsplit(".", 1)[-1]) is not None


def _shown(value: int) -> str:
    return str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"


def stored_bytes(source: str, options: dict) -> int | None:
    """
    Bytes of an artifact's weight file, in a folder or on the Hub; None where it is in shards or not to be found.

    Args:
        options: `revision`, `token` and the like, as for `from_pretrained`.
    """
    if os.path.isdir(source):
        folder = os.path.join(source, options.get("subfolder") or "")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        paths = [os.path.join(folder, name) for name in names if name.endswith(".safetensors")]
        return sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) or None
    found = cached_file(source, _WEIGHTS, _raise_exceptions_for_missing_entries=False, **options)
    return os.path.getsize(found) if found else None


def check_fits(elements: int) -> None:
    """
    Raise `ValueError` if a model has more elements than the files that it is loaded from (`STORED`) can hold: each takes a
    byte at least, tied ones count twice.

    A config that describes a huge model would otherwise be allocated before anyone notices that its weights are small.
    """
    stored = STORED.get()
    if stored is not None and elements > 2 * stored + (1 << 20):
        raise ValueError(
            f"config.json describes {elements} numbers, but the weights have {stored} bytes; they do not belong together"
        )
