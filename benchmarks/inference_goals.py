"""What the inference engine should reach, and how far it is. Goals are not results."""

from collections.abc import Iterable
from dataclasses import dataclass

from inference_measure import Row
from inference_sections import DENSE, OFF, PEFT, PLANS


@dataclass(frozen=True)
class Goal:
    """A variant's ratio to the base must be at most `bound`, times 1 + `slack` for what a measurement may be off."""

    item: str
    section: str
    cell: str
    variant: str
    bound: float

    @property
    def slack(self) -> float:
        return 0.03 if self.bound <= 1.10 else 0.10


@dataclass(frozen=True)
class Outcome:
    """A goal beside what was measured."""

    item: str
    what: str
    goal: str
    measured: str
    met: bool


GOALS = [
    Goal("A1", "encoder", "T=8 r=16 dense", OFF, 1.01),
    Goal("A1", "encoder", "T=32 r=16 dense", OFF, 1.01),
    Goal("A1", "decode", "B=8 T=8 dense", OFF, 1.01),
    Goal("A2", "encoder", "T=8 r=16 dense", "auto", 1.28),
    Goal("A2", "encoder", "T=32 r=16 dense", "auto", 2.05),
    Goal("A2", "encoder", "T=8 r=76 dense", "auto", 2.15),
    Goal("A2", "encoder", "T=8 r=16 top-1", "auto", 1.10),
    Goal("A2", "encoder", "T=32 r=16 top-1", "auto", 1.12),
    Goal("A3", "groups", "2 of n=1024 tokens", "auto", 1 + 1.1 * 128 / 1024),
    Goal("A3", "groups", "1 of n=2048 tokens", "auto", 1 + 1.1 * 128 / 2048),
    Goal("A4", "decode", "B=8 T=8 dense", "auto", 1.33),
    Goal("A4", "decode", "B=8 T=32 dense", "auto", 2.05),
    Goal("A4", "decode", "B=8 T=32 one-hot", "auto", 1.35),
    Goal("A4", "decode", "B=8 T=8 one row", "auto", 1.02),
    Goal("A4", "decode", "B=1 T=8 dense", "auto", 1.02),
    Goal("A4", "generate", "B=1 T=8 64+128", "router + auto", 1.10),
    Goal("A5", "routed", "T=8 r=16 dense", "full + auto", 2.3),
    Goal("A5", "routed", "T=8 r=16 dense", "prefix + auto", 1.6),
    Goal("A5", "routed", "T=8 r=16 dense", "late + auto", 1.3),
]
_TIMES_FASTER = 5.5  # than the published code
_AUTO_SLACK = 1.10
_MODEL_SLACK = 0.15


def outcomes(rows: Iterable[Row]) -> list[Outcome]:
    """Every goal that the rows at hand can judge."""
    found = {(row.section, row.cell, row.variant): row for row in rows}
    judged = [_judge(goal, found[key]) for goal in GOALS if (key := (goal.section, goal.cell, goal.variant)) in found]
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for (section, cell, variant), row in found.items():
        cells.setdefault((section, cell), {})[variant] = row
    for rule in (_faster_than_rivals, _auto_is_best, _model_holds):
        for (section, cell), variants in cells.items():
            judged += rule(f"{section}, {cell}", variants)
    return sorted(judged, key=lambda outcome: outcome.item)


def _judge(goal: Goal, row: Row) -> Outcome:
    measured = f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]"
    what = f"{goal.section}, {goal.cell}: {goal.variant}"
    return Outcome(
        goal.item, what, f"{goal.bound:.3f} + {goal.slack:.0%}", measured, row.ratio <= goal.bound * (1 + goal.slack)
    )


def _faster_than_rivals(where: str, rows: dict[str, Row]) -> Iterable[Outcome]:
    if "auto" not in rows or not where.startswith("encoder"):
        return
    ours = rows["auto"].ratio
    if PEFT in rows:
        peft = rows[PEFT].ratio
        yield Outcome("A2", f"{where}: auto", f"below PEFT's {peft:.3f}", f"{ours:.3f}", ours < peft)
    if DENSE in rows and "top-1" not in where:
        faster = rows[DENSE].ratio / ours
        yield Outcome(
            "A2", f"{where}: published / auto", f"{_TIMES_FASTER}x", f"{faster:.2f}x", faster >= _TIMES_FASTER
        )


def _auto_is_best(where: str, rows: dict[str, Row]) -> Iterable[Outcome]:
    single = {plan: rows[plan].ratio for plan in PLANS if plan in rows and plan != "auto"}
    if "auto" in rows and len(single) > 1:
        best = min(single, key=single.__getitem__)
        ratio = rows["auto"].ratio / single[best]
        yield Outcome("A6", f"{where}: auto / {best}", f"{_AUTO_SLACK:.2f}", f"{ratio:.3f}", ratio <= _AUTO_SLACK)


def _model_holds(where: str, rows: dict[str, Row]) -> Iterable[Outcome]:
    row = rows.get("factored")
    if row is None or row.predicted is None or not where.startswith("growth"):
        return
    off = row.ratio / row.predicted - 1
    goal = f"{row.predicted:.3f} ± {_MODEL_SLACK:.0%}"
    yield Outcome("A7", f"{where}: factored", goal, f"{row.ratio:.3f} ({off:+.0%})", abs(off) <= _MODEL_SLACK)
