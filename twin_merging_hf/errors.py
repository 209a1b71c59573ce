"""The one error type for everything a user can fix, and helpers for messages, names of files and optional packages."""

import importlib
import re
from pathlib import Path
from types import ModuleType


class TwinMergingError(ValueError):
    """Something in recipe, checkpoints, data or artifact that the user can fix. Says found, expected, remedy."""


_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}")


def without_tokens(text: str) -> str:
    """A text for messages and logs, with every Hub token blotted out."""
    return _TOKEN.sub("[token]", text)


def is_file(path: Path) -> bool:
    """`path.is_file()`, and False for names that no file can have, which anyone may write into an index."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


_PIP_NAMES = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "rouge_score": "rouge-score",
    "prometheus_client": "prometheus-client",
}


def require_extra(module: str, extra: str) -> ModuleType:
    """
    Import an optional package.

    Raises:
        TwinMergingError: it is not installed; the message names the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise  # it is there, but what it needs is not
        raise TwinMergingError(
            f"this needs {_PIP_NAMES.get(package, package)}, which is not installed; "
            f"run `pip install 'twin-merging-hf[{extra}]'`"
        ) from error
