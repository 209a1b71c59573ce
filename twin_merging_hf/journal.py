"""
Finished parts of a split on disk: what keeps a build small, and lets it go on where a killed one stopped.

A part is the split of one tensor: a safetensors file, with what the report says of it in its header. A file gets its name
when it is whole. The folder lies beside the artifact to be, hidden, and is of no use once that is there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


_KEY = "key"
_LOCK = "lock"
_RECORD = "record"


class Journal:
    """
    The parts in one folder.

    Args:
        folder: made if it is not there.
        key: names everything that the parts depend on; parts of another key are thrown away.

    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        if not (folder / _KEY).is_file() or (folder / _KEY).read_text(encoding="utf-8") != key:
            _empty(folder)
            folder.mkdir(exist_ok=True)
            (folder / _KEY).write_text(key, encoding="utf-8")
        self._earlier = {path.stem for path in folder.glob("*.safetensors")}
        self._read: set[str] = set()

    @property
    def found(self) -> int:
        """How many parts of an earlier run were of use."""
        return len(self._earlier & self._read)

    def read(self, part: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """A part's tensors, which stay in the file until they are looked at, and its record; None if it is not there."""
        path = self.folder / f"{part}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                record = json.loads(handle.metadata()[_RECORD])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - safe_open is no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # half of a file that a machine lost with its power: made again
        self._read.add(part)
        return tensors, record

    def write(self, part: str, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Keep a part."""
        self._earlier.discard(part)  # what was there under this name could not be read
        half = self.folder / f"{part}.half"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, half, {_RECORD: json.dumps(record)})
        os.replace(half, self.folder / f"{part}.safetensors")


@contextmanager
def journal(out: Path, key: str) -> Iterator[Journal]:
    """
    The journal of a build of `out`; it is there for the next try only if the process is killed inside the block.

    Where another process is building `out` at this moment, the parts go to a folder that is this process's alone.

    Args:
        key: as of `Journal`.
    """
    folder = out.parent / f".{out.name}.parts"
    lock = FileLock(folder / _LOCK)
    own = out.parent / f".{out.name}.parts-{os.getpid()}"
    try:
        yield Journal(folder if _taken(lock, folder) else own, key)
    finally:
        # Asked once more: a signal may have come between the making of the folder and the lock.
        if lock.is_locked or (folder.is_dir() and _taken(lock, folder)):
            _empty(folder)
            (folder / _LOCK).unlink(missing_ok=True)
            lock.release()
        _empty(own)
        for each in (folder, own):
            with suppress(OSError):
                each.rmdir()


def _taken(lock: FileLock, folder: Path) -> bool:
    """Whether this process has the folder, made if need be, to itself."""
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):  # another build has it, or the file system knows no locks
        return False
    return True


def _empty(folder: Path) -> None:
    for path in folder.glob("*"):
        if path.name != _LOCK:
            path.unlink(missing_ok=True)
