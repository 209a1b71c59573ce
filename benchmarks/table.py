"""The big table: scores, intervals and bytes of every method, printed, as CSV and as a picture."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from methods import Method
from scores import (
    Answers,
    Gold,
    calibration_error,
    interval,
    mean_over_seeds,
    normalised,
    resamples,
    right,
    task_scores,
)


@dataclass(frozen=True)
class Line:
    """
    One method's line; scores in percent, [task] or single; over rows, averaged over seeds.

    spread: standard deviation of the normalised score over seeds (0 with one). difference: normalised score less ours,
    with its paired 95 % interval; None where ours was not run. ece: of methods that give probabilities.
    """

    method: Method
    raw: np.ndarray
    ratios: np.ndarray
    normalised: float
    interval: tuple[float, float]
    spread: float
    difference: tuple[float, float, float] | None
    ratio: float
    ece: float | None
    seeds: int


def make_lines(found: Sequence[tuple[Method, list[Answers]]], experts: Answers, gold: Gold) -> list[Line]:
    """Score all methods on the same rows and the same bootstrap draws."""
    counts = resamples(gold)
    own, own_drawn = task_scores(experts, gold), task_scores(experts, gold, counts)
    drawn = {m.key: normalised(mean_over_seeds(a, gold, counts), own_drawn) for m, a in found}
    point = {m.key: normalised(mean_over_seeds(a, gold), own)[0] for m, a in found}
    lines = []
    for method, answers in found:
        raw = mean_over_seeds(answers, gold)[0]
        each = [normalised(task_scores(one, gold), own)[0] for one in answers]
        difference = None
        if "ours" in drawn:
            gap = drawn[method.key] - drawn["ours"]
            difference = (point[method.key] - point["ours"], *interval(gap))
        ratios = 100 * raw / np.where(own[0] > 0, own[0], np.nan)
        ece = None
        if not np.isnan(answers[0].confidence).any():
            ece = float(np.mean([calibration_error(a.confidence, right(a, gold)) for a in answers]))
        lines.append(
            Line(method, 100 * raw, ratios, float(point[method.key]), interval(drawn[method.key]), float(np.std(each)),
                 difference, method.ratio(), ece, len(answers))
        )  # fmt: skip
    return lines


def show(lines: list[Line], names: list[str]) -> str:
    """The table as text: raw score of each task, their mean, the normalised mean and the worst task's, bytes."""
    head = ["method", *names, "raw mean", "norm.", "min", "bytes x", "minus ours [95 %]", "ECE"]
    rows = [head]
    for line in lines:
        gap = "" if line.difference is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*line.difference)
        spread = f" ±{line.spread:.2f}" if line.seeds > 1 else ""
        cells = [f"{score:.1f}" for score in line.raw]
        cells += [f"{line.raw.mean():.2f}", f"{line.normalised:.2f}{spread}", f"{np.nanmin(line.ratios):.1f}"]
        mark = " *" if line.method.oracle else ""
        ece = "" if line.ece is None else f"{line.ece:.3f}"
        rows.append([line.method.title + mark, *cells, f"{line.ratio:.3f}", gap, ece])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    justified = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*justified, "* knows the true task (its head, or which expert to use)"])


def write_csv(path: Path, lines: list[Line], names: list[str]) -> None:
    """All figures of the table."""
    head = [
        "key",
        "method",
        "knows_task",
        "seeds",
        *(f"raw_{n}" for n in names),
        "raw_mean",
        *(f"normalised_{n}" for n in names),
    ]
    head += ["normalised", "low", "high", "std_over_seeds", "minimum", "storage_ratio", "minus_ours", "minus_ours_low"]
    head += ["minus_ours_high", "ece"]
    rows = []
    for line in lines:
        method = line.method
        numbers = [*line.raw, line.raw.mean(), *line.ratios, line.normalised, *line.interval, line.spread]
        numbers += [np.nanmin(line.ratios), line.ratio, *(line.difference or ("", "", "")), _or_empty(line.ece)]
        rows.append([method.key, method.title.strip(), method.oracle, line.seeds, *map(shown, numbers)])
    write_rows(path, head, rows)


def write_rows(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(head)
        writer.writerows([[shown(cell) for cell in row] for row in rows])


def shown(value: Any) -> Any:
    """Numbers with four digits behind the point; the rest as it is."""
    return f"{value:.4f}" if isinstance(value, (float, np.floating)) else value


def _or_empty(value: float | None) -> Any:
    return "" if value is None else value


def draw(path: Path, lines: list[Line], title: str) -> None:
    """Normalised scores with their intervals, one bar for each method."""
    figure, axes = new_figure(9, 1.2 + 0.3 * len(lines))
    for place, line in enumerate(lines):
        ours = line.method.key.startswith("ours")
        colour = "tab:orange" if ours else "lightgrey" if line.method.oracle else "tab:blue"
        low, high = line.interval
        error = [[max(0.0, line.normalised - low)], [max(0.0, high - line.normalised)]]
        axes.barh(place, line.normalised, color=colour, xerr=error, error_kw={"lw": 1})
        axes.text(high + 0.5, place, f"{line.normalised:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(lines)), [line.method.title.strip() for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(max(0, min(line.normalised for line in lines) - 10), 108)
    axes.set_xlabel("normalised score, % (grey: knows the true task)")
    axes.set_title(title)
    save(figure, path)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a picture whose bytes follow from its content."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
