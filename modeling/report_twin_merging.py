"""What a plan was chosen for, in numbers: the readable object that `model.explain()` gives."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .costs_twin_merging import Costs, synchronise
from .selection_twin_merging import Decision, Limits, copies_bytes


@dataclass(frozen=True)
class PlanReport:
    """
    How a batch is computed, and why. `print(report)` shows it in lines.

    plan: `base` (no expert has weight), `factored`, `gathered`, `materialised`, or `mixed` (long groups of rows merged, the
        others not). requested: what `set_plan` or `use_plan` asked for.
    experts: names of those that have weight in the batch. rank: mean rank of these together (R_U), of each matrix.
    groups, tokens: how many rows of equal weights there are, and the tokens of each, padding not counted.
    crossover: tokens from which merging a group's matrices takes fewer operations than its factors (d*).
    break_even: forwards of one token from which merged copies, kept over a generation, pay (L*); infinity: never.
    kept: whether merged copies stay over the generation.
    predicted: time over the base forward's of every plan that can be used, the chosen one's under its name.
    unusable: plans that cannot be used, and why.
    bytes: `shared`, `factors`, and `copies`, what merged copies kept over a generation take; `budget` for them.
    measured: with `measure=True`, time over the base forward's of the chosen plan.
    """

    plan: str
    requested: str
    experts: tuple
    rank: float
    groups: int
    tokens: tuple
    crossover: float
    break_even: float
    kept: bool
    predicted: dict
    unusable: dict
    bytes: dict
    measured: float | None = None

    def __str__(self) -> str:
        shown = ", ".join(str(count) for count in self.tokens[:6]) + (", ..." if len(self.tokens) > 6 else "")
        lines = [
            f"plan: {self.plan} (asked for: {self.requested})",
            f"experts with weight: {len(self.experts)}, of {self.rank:.0f} ranks together in each matrix",
            f"groups of rows with equal weights: {self.groups}, of {shown} tokens; merging pays above {self.crossover:.0f}",
            f"copies kept over a generation pay from {self.break_even:.0f} new tokens on",
            "predicted, over the base forward: "
            + ", ".join(
                f"{name} {ratio:.2f}" for name, ratio in sorted(self.predicted.items(), key=lambda one: one[1])
            ),
            "bytes: " + ", ".join(f"{name} {count:,}" for name, count in self.bytes.items()),
        ]
        lines += [f"not usable: {name}, {why}" for name, why in self.unusable.items()]
        if self.measured is not None:
            lines.append(f"measured, over the base forward: {self.measured:.2f}")
        return "\n".join(lines)


def new_report(
    decision: Decision, costs: Costs, limits: Limits, names: list, sizes: dict, measured: float | None
) -> PlanReport:
    """Put together what is known of a decision."""
    batch, union = decision.batch, decision.batch.union
    sides = max(1, costs.sizes.sides)
    options = {**decision.options, decision.plan: decision.extra}
    return PlanReport(
        plan=decision.plan,
        requested=limits.plan,
        experts=tuple(names[t] for t in union),
        rank=sum(costs.sizes.thin[t] for t in union) / sides,
        groups=len(batch.groups),
        tokens=tuple(group.tokens for group in batch.groups),
        crossover=costs.sizes.crossover,
        break_even=_break_even(decision, costs),
        kept=decision.kept,
        predicted={name: (costs.base + extra) / costs.base for name, extra in options.items()},
        unusable=dict(limits.unusable),
        bytes={**sizes, "copies": copies_bytes(batch, costs, tuple(range(len(batch.groups)))), "budget": limits.budget},
        measured=measured,
    )


def _break_even(decision: Decision, costs: Costs) -> float:
    """Steps of one token after which writing merged copies has been earned back."""
    batch, step = decision.batch, Costs(costs.sizes, costs.constants, costs.rows, 1)
    writing = sum(step.merging(group.experts) for group in batch.groups if group.experts)
    saved = step.factored(batch.union, batch.rows, False) - step.split([len(group.rows) for group in batch.groups])
    return writing / saved if saved > 0 else float("inf")


def measure(run: Callable[[], object], base: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Time of `run` over that of `base`, in turns: the ratio of medians."""
    times: dict = {run: [], base: []}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for call, found in times.items():
                synchronise(device)
                start = time.perf_counter()
                call()
                synchronise(device)
                found.append(time.perf_counter() - start)
    middle = [sorted(found[1:])[repeats // 2] for found in times.values()]
    return middle[0] / middle[1]
