"""Saving over an earlier artifact: a reader sees all of the old one, nothing that loads, or all of the new one."""

import os
import re
import shutil
import tempfile
from contextlib import contextmanager


CONFIG = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_STAGING = re.compile(r"\.saving-(\d+)-.*")


@contextmanager
def staged_save(target: str):
    """
    Give a hidden folder in `target` whose files take their places when the block ends well; else they vanish.

    The old config goes first and the new one comes last, so that a process killed between leaves a folder that does not
    load, never a mixture of two artifacts; weights of an earlier save that the new one does not have go too. The next save
    removes what a killed one left.
    """
    os.makedirs(target, exist_ok=True)
    for name in os.listdir(target):
        left = _STAGING.fullmatch(name)
        if left and not is_running(int(left.group(1))):
            shutil.rmtree(os.path.join(target, name), ignore_errors=True)
    staging = tempfile.mkdtemp(prefix=f".saving-{os.getpid()}-", dir=target)
    try:
        yield staging
        _move(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move(staging: str, target: str) -> None:
    names = sorted(os.listdir(staging), key=lambda name: name == CONFIG)
    if CONFIG in names and os.path.lexists(os.path.join(target, CONFIG)):
        os.remove(os.path.join(target, CONFIG))
    if any(_WEIGHTS.fullmatch(name) for name in names):
        for name in os.listdir(target):
            if _WEIGHTS.fullmatch(name) and name not in names:
                os.remove(os.path.join(target, name))
    for name in names:
        os.replace(os.path.join(staging, name), os.path.join(target, name))


def is_running(pid: int) -> bool:
    """Whether a process with this number exists on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OverflowError, OSError):
        return False
    return True
