"""The inference benchmark's tables, CSV files and picture."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference_goals import GOALS, Outcome
from inference_measure import Row
from inference_sections import PLANS
from table import new_figure, save, write_rows


_SETTINGS = ("rows", "tokens", "experts", "rank", "dtype", "factors", "device")
_WIDEST = 4.0  # bars end here


def show(rows: Sequence[Row]) -> str:
    """One cell as text: ratio of medians, quartiles of the rounds, milliseconds, and how far from the reference."""
    lines = [["variant", "x base", "quartiles", "ms", "cost model", "goal", "difference"]]
    for row in rows:
        goal = next((f"{g.bound:.3f}" for g in GOALS if (g.section, g.cell, g.variant) == _key(row)), "")
        predicted = "" if row.predicted is None else f"{row.predicted:.3f}"
        lines.append([row.variant, f"{row.ratio:.3f}", f"{row.low:.3f}-{row.high:.3f}", f"{1000 * row.seconds:.1f}", predicted,
                      goal, f"{row.difference:.0e}"])  # fmt: skip
    first = rows[0]
    settings = ", ".join(f"{name} {value}" for name, value in first.settings.items())
    return f"\n{first.section}: {first.cell} ({settings}; {first.repeats} rounds)\n{aligned(lines)}"


def show_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Goals, what was measured, and whether they are met."""
    lines = [["item", "what", "goal", "measured", "met"]]
    lines += [[o.item, o.what, o.goal, o.measured, "yes" if o.met else "NO"] for o in outcomes]
    return f"\nGoals (of the project; met or not on this machine)\n{aligned(lines)}"


def aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _key(row: Row) -> tuple[str, str, str]:
    return row.section, row.cell, row.variant


def write(folder: Path, rows: Sequence[Row], outcomes: Sequence[Outcome], name: str = "inference") -> None:
    """`{name}.csv` and `{name}_goals.csv`."""
    head = [
        "section",
        "cell",
        "variant",
        "ratio",
        "low",
        "high",
        "seconds",
        "repeats",
        "difference",
        "allowed",
        "predicted",
    ]
    table = [
        [*map(_cell, (getattr(row, field) for field in head)), *(row.settings.get(s, "") for s in _SETTINGS)]
        for row in rows
    ]
    write_rows(folder / f"{name}.csv", [*head, *_SETTINGS], table)
    write_outcomes(folder / f"{name}_goals.csv", outcomes)


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A CSV file of goals."""
    lines = [list(asdict(outcome).values()) for outcome in outcomes]
    write_rows(path, ["item", "what", "goal", "measured", "met"], lines)


def _cell(value: Any) -> Any:
    """Small numbers keep their digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """Rows of a CSV file that `write` wrote."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [_row(line) for line in csv.DictReader(stream)]


def _row(line: dict[str, Any]) -> Row:
    numbers = {field: float(line[field]) for field in ("ratio", "low", "high", "seconds", "difference", "allowed")}
    predicted = float(line["predicted"]) if line["predicted"] else None
    settings = {name: line[name] for name in _SETTINGS if line[name]}
    return Row(line["section"], line["cell"], line["variant"], repeats=int(line["repeats"]), predicted=predicted,
               settings=settings, **numbers)  # fmt: skip


def draw(path: Path, rows: Sequence[Row]) -> None:
    """One bar for each variant of the cells that have rivals or a goal; growth has its numbers in the CSV file."""
    shown = [row for row in rows if row.section not in ("growth", "threads")]
    figure, axes = new_figure(9, 1.5 + 0.17 * len(shown))
    place, ticks, labels, previous = 0.0, [], [], None
    for row in shown:
        if (row.section, row.cell) != previous:
            previous = (row.section, row.cell)
            place += 1.6
            axes.text(0.02, place - 0.75, f"{row.section}: {row.cell}", fontsize=7, weight="bold", va="center")
        ours = row.variant in PLANS or " + auto" in row.variant or " + factored" in row.variant
        colour = "lightgrey" if row.variant.startswith("base") else "tab:orange" if ours else "tab:blue"
        axes.barh(place, min(row.ratio, _WIDEST), color=colour)
        axes.plot([min(row.low, _WIDEST), min(row.high, _WIDEST)], [place, place], color="black", lw=1)
        axes.text(min(row.ratio, _WIDEST) + 0.03, place, f"{row.ratio:.2f}", va="center", fontsize=6)
        for goal in GOALS:
            if (goal.section, goal.cell, goal.variant) == _key(row):
                axes.plot([goal.bound] * 2, [place - 0.45, place + 0.45], color="tab:red", lw=1.5)
        ticks.append(place)
        labels.append(row.variant)
        place += 1
    axes.set_yticks(ticks, labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, _WIDEST + 0.4)
    axes.axvline(1, color="grey", lw=0.5)
    axes.set_xlabel("times the base forward (orange: ours; black: quartiles; red: goal)")
    save(figure, path)
