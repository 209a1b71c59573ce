"""
Builds that are interrupted: a script that imports everything once and forks a build for each `SIGNAL:DELAY`.

usage: interrupts.py RECIPE FOLDER SIGNAL:DELAY...   (delay in seconds after the staging folder has appeared)
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

# Imported here so that no fork has to; an interrupted import of compiled code may end in any error.
import matplotlib.pyplot  # noqa: F401

from twin_merging_hf import builder, cli  # noqa: F401


# Exit codes: done, interrupted, terminated, killed.
ENDS = (0, 130, 143, -signal.SIGKILL)
OUT, LOG = "out", "log.txt"


def appear(folder: Path, before: list[str], child: int, timeout: float = 60.0) -> bool:
    """Wait until something new lies in the folder; False if the child ended before."""
    end = time.monotonic() + timeout
    while set(names(folder)) <= set(before):
        if time.monotonic() > end:
            raise TimeoutError("the build wrote nothing")
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0005)
    return True


def build_in_child(recipe: str, folder: Path) -> int:
    """Fork a build and return the child's process id."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(folder.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["twin-merging", "build", recipe, str(folder / OUT), "--quiet"]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return child


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def main(recipe: str, folder: Path, moments: list[str]) -> None:
    for moment in moments:
        number, delay = moment.split(":")
        before = names(folder)
        child = build_in_child(recipe, folder)
        if appear(folder, before, child):
            time.sleep(float(delay))
        os.kill(child, getattr(signal, number))
        _, status = os.waitpid(child, 0)
        found = {"moment": moment, "code": os.waitstatus_to_exitcode(status), "names": names(folder)}
        if found["code"] not in ENDS:
            found["said"] = (folder.parent / LOG).read_text(encoding="utf-8")[-2000:]
        print(json.dumps(found), flush=True)
        if OUT in found["names"]:
            (folder / OUT).rename(folder.parent / f"finished-{moment}")
    child = build_in_child(recipe, folder)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"moment": "none", "code": os.waitstatus_to_exitcode(status), "names": names(folder)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
