"""The expert weights of one call, by which method they act, and what all layers need of them, made once."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch


class Budget:
    """Bytes that may be kept between the forwards of one generation."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0

    def take(self, count: int) -> bool:
        """Reserve `count` bytes if that many are left."""
        if self.used + count > self.limit:
            return False
        self.used += count
        return True


class Part(NamedTuple):
    """Rows of a batch that are computed together: their indices or a slice of them, and their weights."""

    rows: Any
    call: "CallWeights"


class CallWeights:
    """
    Expert weights of one call.

    Args:
        weights: [batch, expert].
        method: how matrices act. `factored`: every row through the factors of `experts`; `gathered`: each row through its
            own experts' factors; `materialised`: the one row of weights is added to the matrix, which then acts on all.
        experts: indices of the experts that act (None: all, and weights of 0 mask them).
        row_experts: for `gathered`, the experts of each row.
        parts: instead, groups of rows with a method each. Everything but matrices acts by `weights` all the same.
        uniform: all rows have the same weights.
        budget: bytes that what is made for this call may take in order to be kept for the next one; None: nothing is kept.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        method: str = "factored",
        *,
        experts: tuple | None = None,
        row_experts: tuple = (),
        parts: tuple = (),
        uniform: bool = False,
        budget: Budget | None = None,
    ):
        self.weights, self.method, self.experts = weights, method, experts
        self.uniform, self.vector_weights = uniform, weights[:1] if uniform else weights
        self.row_experts, self.parts, self.budget = row_experts, parts, budget
        self._memo: dict = {}
        self._kept: dict = {}

    def kept(self, key: Hashable, make: Callable[[], Any], owner: torch.nn.Module | None = None) -> Any:
        """
        What `make` gives: a tensor or a tuple of them, made again in each forward unless the budget lets them stay.

        Args:
            owner: whose parameters and buffers the tensors may be views of, which cost nothing.
        """
        if self.budget is None:
            return make()
        if key in self._kept:
            return self._kept[key]
        value = make()
        tensors = value if isinstance(value, tuple) else (value,)
        if self.budget.take(sum(own_bytes(tensor, owner) for tensor in tensors)):
            self._kept[key] = value
        return value

    def kept_vector(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """As `kept`, for what has one vector for each row: kept only where one vector serves all rows."""
        return self.kept(key, make) if self.uniform else make()

    def columns(self, ranks: tuple, device: torch.device | None = None) -> torch.Tensor:
        """Repeat each acting expert's weight over its ranks: [batch, sum of those ranks]."""
        key = ("columns", ranks, device)
        if key not in self._memo:
            experts = range(len(ranks)) if self.experts is None else self.experts
            spread = [self.weights[:, t : t + 1].expand(-1, ranks[t]) for t in experts if ranks[t]]
            spread = spread or [self.weights[:, :0]]
            self._memo[key] = torch.cat(spread, dim=1).to(device=device)
        return self._memo[key]

    def places(self, ranks: tuple, device: torch.device) -> Any:
        """Where the acting experts' ranks stand among all: a slice where they are neighbours, else indices."""
        key = ("places", ranks, device)
        if key not in self._memo:
            self._memo[key] = _places(self.experts, ranks, device)
        return self._memo[key]

    def gathering(self, ranks: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For `gathered`: each row's own rank columns, as indices and weights [batch, most ranks of a row]."""
        key = ("gathering", ranks, device)
        if key not in self._memo:
            columns = [[c for t in experts for c in _span(ranks, t)] for experts in self.row_experts]
            owners = [[t for t in experts for _ in range(ranks[t])] for experts in self.row_experts]
            width = max(map(len, columns))
            # Rows with fewer ranks are filled up with any column, of which they take nothing.
            mask = torch.tensor([[1.0] * len(c) + [0.0] * (width - len(c)) for c in columns], device=device)
            index, owner = (
                torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
                for rows in (columns, owners)
            )
            weights = self.weights.to(device).gather(1, owner) * mask.to(self.weights.dtype)
            self._memo[key] = index, weights
        return self._memo[key]


def own_bytes(tensor: torch.Tensor, owner: torch.nn.Module | None = None) -> int:
    """Bytes that keeping a tensor costs: none for a view of what `owner` holds anyway."""
    held = (*owner.parameters(), *owner.buffers()) if owner is not None else ()
    place = tensor.untyped_storage().data_ptr()
    return 0 if any(place == other.untyped_storage().data_ptr() for other in held) else tensor.nbytes


def _span(ranks: tuple, t: int) -> range:
    start = sum(ranks[:t])
    return range(start, start + ranks[t])


def _places(experts: tuple | None, ranks: tuple, device: torch.device) -> Any:
    if experts is None:
        return slice(0, sum(ranks))
    columns = [column for t in experts for column in _span(ranks, t)]
    if not columns:
        return slice(0, 0)
    if columns[-1] - columns[0] + 1 == len(columns):
        return slice(columns[0], columns[-1] + 1)
    return torch.tensor(columns, device=device)
