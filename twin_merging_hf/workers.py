"""Work on one tensor after the other, shared between the cores: a thread for each, with one BLAS thread of its own."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import torch


T = TypeVar("T")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    function: Callable[[str], T],
    names: Iterable[str],
    workers: int | None = None,
    size: Callable[[str], int] = lambda name: 0,
    tick: Callable[[str], Any] = lambda name: None,
) -> list[T]:
    """
    The function's results for all names, in the order of the names.

    PyTorch lets go of the interpreter inside its kernels, so threads are enough. Each has one BLAS thread, whatever the
    number of workers, so that results do not depend on it.

    Args:
        workers: how many at a time; None: one for each core.
        size: of a name's work: the largest begins first, so that no worker is left with it at the end.
        tick: called with each name that is done.

    Raises:
        Exception: what the function raised first; what has not begun by then does not begin.
    """
    names, before = list(names), torch.get_num_threads()
    pool = ThreadPoolExecutor(workers or cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {pool.submit(function, name): name for name in sorted(names, key=size, reverse=True)}
        found = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            tick(futures[future])
        return [found[name] for name in names]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
