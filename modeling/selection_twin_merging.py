"""
Which plan a batch gets: decided once for a forward from its expert weights, its tokens and what plans cost.

Nothing here touches the model; weights are numbers on the host. Research notes call these the selector's rules:
experts without weight are left out; rows with equal weights are one group; a long group may be merged, few experts of many
be gathered; copies are kept over a generation if it is long enough to earn them.
"""

from dataclasses import dataclass, field, replace

import torch

from .call_twin_merging import Budget, CallWeights, Part
from .costs_twin_merging import Costs


PLANS = ("auto", "factored", "gathered", "materialised")
SHORTEST_GATHERED = 16
"""Tokens of a row from which gathering may pay: below, the union of the batch's experts is read as fast."""


@dataclass(frozen=True)
class Group:
    """Rows with equal weights: their indices, the experts that have weight, and tokens (padding not counted)."""

    rows: tuple
    experts: tuple
    tokens: int


@dataclass
class Batch:
    """
    What the selector looks at.

    groups: rows by equal weights, in the order of their first rows. width: computed tokens of a row. expected: forwards of
    this kind still to come in this generation (0: none). unknown: nobody said how many will come.
    """

    groups: list
    rows: int
    width: int
    expected: int = 0

    @classmethod
    def of(cls, weights: list, tokens: list, width: int, expected: int = 0) -> "Batch":
        """Group rows of weights [batch, expert] (numbers on the host) with so many tokens each."""
        rows: dict = {}
        for index, row in enumerate(weights):
            rows.setdefault(tuple(row), []).append(index)
        groups = [
            Group(tuple(members), tuple(t for t, w in enumerate(row) if w), sum(tokens[i] for i in members))
            for row, members in rows.items()
        ]
        return cls(groups, len(weights), width, expected)

    @property
    def union(self) -> tuple:
        """Experts with weight in any row."""
        return tuple(sorted({t for group in self.groups for t in group.experts}))

    def row_experts(self, rows: tuple) -> list:
        """The experts of each of these rows."""
        owner = {row: group.experts for group in self.groups for row in group.rows}
        return [owner[row] for row in rows]


@dataclass
class Decision:
    """
    A plan for a batch: `plain` (no expert has weight), or a method for the groups `merged` and one for all other rows.

    kept: copies stay over the generation. extra: predicted seconds beyond the base's.
    options: predicted seconds beyond the base's of every plan that could be used.
    """

    batch: Batch
    method: str
    merged: tuple = ()
    kept: bool = False
    extra: float = 0.0
    options: dict = field(default_factory=dict)

    @property
    def plan(self) -> str:
        """Its name: that of a plan, `base`, or `mixed` where rows get different ones."""
        if self.method == "plain":
            return "base"
        if not self.merged:
            return self.method
        return "materialised" if len(self.merged) == len(self.batch.groups) else "mixed"

    def call(self, weights: torch.Tensor, budget: Budget | None) -> CallWeights | None:
        """The weights [batch, expert] with this plan; `budget` for what may be kept."""
        batch = self.batch
        if self.method == "plain":
            return None
        groups = [batch.groups[index] for index in self.merged]
        if len(batch.groups) == 1:
            method = "materialised" if self.merged else self.method
            return self._one(weights, method, batch.groups[0].experts, tuple(range(batch.rows)), budget, uniform=True)
        if not groups:
            return self._one(weights, self.method, batch.union, tuple(range(batch.rows)), budget)
        parts = [self._part(weights, group.rows, "materialised", group.experts, budget) for group in groups]
        rest = tuple(row for i, g in enumerate(batch.groups) if i not in self.merged for row in g.rows)
        if rest:
            rest = tuple(sorted(rest))
            union = tuple(sorted({t for experts in batch.row_experts(rest) for t in experts}))
            parts.append(self._part(weights, rest, self.method, union, budget))
        return CallWeights(weights, experts=batch.union, parts=tuple(parts), budget=budget)

    def _one(self, weights, method, experts, rows, budget, uniform=False) -> CallWeights:
        gathered = tuple(self.batch.row_experts(rows)) if method == "gathered" else ()
        return CallWeights(
            weights,
            method if experts else "plain",
            experts=experts,
            row_experts=gathered,
            uniform=uniform,
            budget=budget,
        )

    def _part(self, weights, rows: tuple, method: str, experts: tuple, budget) -> Part:
        place: slice | torch.Tensor = slice(rows[0], rows[-1] + 1)
        if len(rows) != rows[-1] + 1 - rows[0]:
            place = torch.tensor(rows, device=weights.device)
        return Part(place, self._one(weights[place], method, experts, rows, budget, uniform=method == "materialised"))


@dataclass(frozen=True)
class Limits:
    """
    What may be used, and with what.

    plan: one of `PLANS`. budget: bytes that plans may take. unusable: for each plan that cannot be used, why.
    """

    plan: str = "auto"
    budget: int = 0
    unusable: dict = field(default_factory=dict)

    def allows(self, plan: str) -> bool:
        return plan not in self.unusable


def decide(batch: Batch, costs: Costs, limits: Limits) -> Decision:
    """Choose by `limits.plan`; `auto` takes the cheapest of what can be used."""
    union = batch.union
    if not union:
        return Decision(batch, "plain")
    found = _candidates(batch, costs, limits)
    options = {name: decision.extra for name, decision in found.items()}
    best = min(found.values(), key=lambda one: one.extra) if limits.plan == "auto" else found[limits.plan]
    return replace(best, options=options)


def _candidates(batch: Batch, costs: Costs, limits: Limits) -> dict:
    everyone = tuple(range(batch.rows))
    found = {"factored": _factored(batch, costs)}
    if limits.allows("gathered") and (batch.width >= SHORTEST_GATHERED or limits.plan == "gathered"):
        time = costs.gathered(batch.row_experts(everyone))
        found["gathered"] = Decision(batch, "gathered", extra=time)
    if not limits.allows("materialised"):
        return found
    rest = min(found.values(), key=lambda decision: decision.extra).method
    every = tuple(range(len(batch.groups)))
    found["materialised"] = _merged(batch, costs, limits, every, rest)
    long = tuple(i for i, g in enumerate(batch.groups) if g.experts and g.tokens > costs.sizes.crossover)
    if long and len(long) < len(every):
        found["mixed"] = _merged(batch, costs, limits, long, rest)
    return found


def _factored(batch: Batch, costs: Costs) -> Decision:
    union = batch.union
    copied = bool(union) and union[-1] - union[0] + 1 != len(union) and not batch.expected
    return Decision(batch, "factored", extra=costs.factored(union, batch.rows, copied))


def _merged(batch: Batch, costs: Costs, limits: Limits, merged: tuple, rest: str) -> Decision:
    """Merged copies for these groups, factors or gathering for the others."""
    groups = [batch.groups[i] for i in merged]
    others = tuple(row for i, g in enumerate(batch.groups) if i not in merged for row in g.rows)
    writing = sum(costs.merging(group.experts) for group in groups if group.experts)
    kept = batch.expected > 0 and copies_bytes(batch, costs, merged) <= limits.budget
    if kept:
        writing /= batch.expected
    time = writing + costs.split([len(g.rows) for g in groups] + ([len(others)] if others else []))
    if others:
        experts = batch.row_experts(others)
        union = tuple(sorted({t for one in experts for t in one}))
        time += costs.gathered(experts) if rest == "gathered" else costs.factored(union, len(others), False)
    return Decision(batch, rest, merged, kept, time)


def copies_bytes(batch: Batch, costs: Costs, merged: tuple) -> int:
    """Bytes of one copy of all matrices for each of these groups."""
    copies = sum(1 for index in merged if batch.groups[index].experts)
    return copies * costs.sizes.owned * costs.sizes.entry
