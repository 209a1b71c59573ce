"""The one error type for everything a user can fix, and helpers for messages, names of files and optional packages."""

import errno
import importlib
import re
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError


class TwinMergingError(ValueError):
    """Something in recipe, checkpoints, data or artifact that the user can fix. Says found, expected, remedy."""


_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}")
# A whole one has 34 characters behind its prefix; words of a vocabulary that begin so are shorter.
_WHOLE_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def without_tokens(text: str) -> str:
    """A text for messages and logs, with every Hub token blotted out."""
    return _TOKEN.sub("[token]", text)


def holds_token(content: bytes) -> bool:
    """Whether a file's content holds a whole Hub token, and not only something that begins like one."""
    return _WHOLE_TOKEN.search(content) is not None


def is_file(path: Path) -> bool:
    """`path.is_file()`, and False for names that no file can have, which anyone may write into an index."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


_STORAGE_ERRORS = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.ENOTEMPTY,
                   errno.EPERM, errno.EROFS}  # fmt: skip


def storage_error(error: BaseException) -> str | None:
    """What is wrong with a disk, if an error is about that: full, read-only, forbidden, or the folder was just made."""
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    text = str(error)
    if isinstance(error, SafetensorError) and "os error" in text:
        return text
    return None


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
