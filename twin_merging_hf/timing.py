"""How long one thing takes beside another, on a machine that is never quite quiet."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TimeRatio:
    """
    Medians of two times in seconds, and the median of the ratios first / second of the pairs, with the smallest and the
    largest ratio.
    """

    first: float
    second: float
    ratio: float
    smallest: float
    largest: float
    repeats: int


def time_ratio(first: Callable[[], Any], second: Callable[[], Any], repeats: int = 7) -> TimeRatio:
    """Run two things in turn, once each to warm up and then `repeats` times (at least 5), and compare pair by pair."""
    first(), second()
    pairs = [(_seconds(first), _seconds(second)) for _ in range(max(5, repeats))]
    ratios = [a / b for a, b in pairs]
    one, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    return TimeRatio(one, other, statistics.median(ratios), min(ratios), max(ratios), len(pairs))


def _seconds(action: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    action()
    _wait()
    return max(time.perf_counter() - start, 1e-9)


def _wait() -> None:
    """CUDA answers before it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
