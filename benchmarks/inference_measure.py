"""Times of several ways to do the same work, in turn in one process, each after its output was found to be right."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm


LEAST_REPEATS = 15
BASE = "base"


class OutputDiffersError(Exception):
    """A variant's output is not the reference's: nothing of its cell is printed."""


@dataclass(frozen=True)
class Variant:
    """
    One way to do a cell's work.

    run: does it once and returns the output, rows first.
    expected: for a row of the output, what the dense reference says, and the largest difference allowed.
    rows: how many rows the output has.
    times: how often the work of `run` must be done for all of the cell's rows (where `run` does some of them).
    predicted: the cost model's ratio to the base.
    """

    name: str
    run: Callable[[], torch.Tensor]
    expected: Callable[[int], tuple[torch.Tensor, float]]
    rows: int
    times: float = 1.0
    predicted: float | None = None


@dataclass(frozen=True)
class Cell:
    """
    One table: the same work, done by variants; the first one is the base.

    settings: columns of the CSV file. close: called by whoever takes the cell, when all is done.
    """

    section: str
    name: str
    variants: list[Variant]
    settings: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    close: tuple[Callable[[], None], ...] = ()


@dataclass(frozen=True)
class Row:
    """
    A variant's line. ratio: of medians, to the base; low, high: quartiles of the ratios of single rounds. seconds: median.

    difference: largest absolute difference from the reference that was found, of `allowed`.
    """

    section: str
    cell: str
    variant: str
    ratio: float
    low: float
    high: float
    seconds: float
    repeats: int
    difference: float
    allowed: float
    predicted: float | None
    settings: dict[str, Any]


def check(cell: Cell, variant: Variant) -> tuple[float, float]:
    """
    Compare two rows of a variant's output (the first and the last) with the reference.

    Returns:
        The larger difference, and what was allowed there.

    Raises:
        OutputDiffersError: one of them differs by more than is allowed, or holds NaN.
    """
    output, found = variant.run(), (0.0, 0.0)
    for row in sorted({0, variant.rows - 1}):
        expected, allowed = variant.expected(row)
        difference = float((output[row].to(expected.dtype) - expected).abs().max())
        if not difference <= allowed:
            raise OutputDiffersError(
                f"{cell.section}, {cell.name}: row {row} of {variant.name!r} differs from the dense reference by "
                f"{difference:.2e} (allowed: {allowed:.2e}); nothing of this table is printed"
            )
        found = max(found, (difference, allowed))
    return found


def measure(cell: Cell, repeats: int, quiet: bool = True) -> list[Row]:
    """
    Check every variant, warm it up, then run all of them in turn, `repeats` rounds in a new order each.

    CPU time, which other work on the machine disturbs little; wall time where threads or a GPU are compared.

    Raises:
        OutputDiffersError: see `check`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        with torch.no_grad():
            found = [check(cell, variant) for variant in cell.variants]
            rounds = _rounds(cell, repeats, clock_of(cell), quiet)
    finally:
        torch.set_num_threads(before)
    bases = rounds[cell.variants[0].name]
    rows = []
    for variant, (difference, allowed) in zip(cell.variants, found, strict=True):
        times = rounds[variant.name]
        low, high = quartiles([one / base for one, base in zip(times, bases, strict=True)])
        median = statistics.median(times)
        rows.append(Row(cell.section, cell.name, variant.name, median / statistics.median(bases), low, high, median, repeats,
                        difference, allowed, variant.predicted, cell.settings))  # fmt: skip
    return rows


def _rounds(cell: Cell, repeats: int, clock: Callable[[], float], quiet: bool) -> dict[str, list[float]]:
    order, shuffler = list(cell.variants), random.Random(0)
    for variant in order:
        variant.run()
    found: dict[str, list[float]] = {variant.name: [] for variant in order}
    for _ in tqdm(range(repeats), desc=f"{cell.section}, {cell.name}", leave=False, disable=True if quiet else None):
        shuffler.shuffle(order)
        for variant in order:
            start = clock()
            variant.run()
            found[variant.name].append(variant.times * max(clock() - start, 1e-9))
    return found


def clock_of(cell: Cell) -> Callable[[], float]:
    """Threads wait for each other, and a GPU is not the CPU: there the wall clock counts."""
    return wall_seconds if cell.section == "threads" or torch.cuda.is_initialized() else time.process_time


def wall_seconds() -> float:
    """Wall clock; a GPU's work is waited for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
