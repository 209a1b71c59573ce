"""
Work that the processes of `accelerate launch` share: each runs a part of the rows, all get all results, one writes.

Without such a launch there is one process, and nothing here does anything.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def start() -> None:
    """Join the other processes, if this one was launched as one of several; harmless to call again."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_on():
        from accelerate import PartialState

        PartialState()


def rank() -> int:
    return dist.get_rank() if _is_on() else 0


def world() -> int:
    return dist.get_world_size() if _is_on() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def gathered(mine: Sequence[Any]) -> list[Any]:
    """What all processes have, one's after the other's. Every process must call it equally often."""
    if not _is_on():
        return list(mine)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(mine))
    return [item for part in parts for item in part]


def wait_for_all() -> None:
    if _is_on():
        dist.barrier()


def _is_on() -> bool:
    return dist.is_available() and dist.is_initialized()
