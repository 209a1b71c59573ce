"""
How much memory a build takes: a script that builds once and prints the peak of anonymous memory above that after importing.

usage: memory.py RECIPE OUT WORKERS SHARD   (SHARD as `max_shard_size` of `save_pretrained`)
Files that are mapped do not count: the system may drop their pages at any time.
"""

import sys
import threading
import time
from pathlib import Path

import torch

from twin_merging_hf import builder, probe, verdict  # noqa: F401
from twin_merging_hf.progress import Progress


def anonymous() -> int:
    """Bytes of anonymous memory in use."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def main(recipe: str, out: str, workers: int, shard: str) -> None:
    builder._SHARD = shard
    torch.linalg.svd(torch.randn(256, 256))  # what libraries set up at their first use is no part of a build
    torch.randn(512, 512) @ torch.randn(512, 512)
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        builder.build_artifact(recipe, out, Progress(quiet=True), workers=workers, low_memory=True)
    finally:
        done.set()
        watcher.join()
    print(peak - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
