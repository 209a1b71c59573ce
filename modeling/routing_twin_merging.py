"""Routers: from a row's hidden states [batch, token, hidden] to expert logits [batch, expert] and weights."""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the valid tokens of each row: [batch, token, hidden] -> [batch, hidden]. No mask: all are valid."""
    if mask is None:
        return hidden.mean(dim=1)
    mask = mask.to(device=hidden.device, dtype=hidden.dtype)[..., None]
    # Padding may hold anything, so it is selected away rather than multiplied by zero.
    return torch.where(mask > 0, hidden, torch.zeros_like(hidden)).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class LinearRouter(nn.Module):
    """One linear layer on the masked mean of the routing states."""

    def __init__(self, hidden_size: int, experts: int):
        super().__init__()
        self.classifier = nn.Linear(hidden_size, experts)

    def features(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return masked_mean(hidden.float(), mask)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(features.to(self.classifier.weight.dtype))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.score(self.features(hidden, mask))


class MLPRouter(LinearRouter):
    """The paper's network d -> 2d -> 2d -> experts, with BatchNorm, LeakyReLU and dropout (section 4 and its code)."""

    def __init__(self, hidden_size: int, experts: int, dropout: float = 0.5):
        nn.Module.__init__(self)
        wide = 2 * hidden_size
        self.network = nn.Sequential(
            nn.Linear(hidden_size, wide),
            nn.BatchNorm1d(wide),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(wide, wide),
            nn.BatchNorm1d(wide),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(wide, experts),
        )

    def score(self, features: torch.Tensor) -> torch.Tensor:
        return self.network(features.to(next(self.network.parameters()).dtype))


class CentroidRouter(LinearRouter):
    """
    Nearest centre under one common covariance, several centres for each expert: their probabilities add up.

    Differences of squared Mahalanobis distances are linear in the row, so each centre is one row of a linear layer.
    """

    def __init__(self, hidden_size: int, centres: list):
        super().__init__(hidden_size, sum(centres))
        self.centres = tuple(centres)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        blocks = super().score(features).split(self.centres, dim=-1)
        return torch.stack([block.logsumexp(dim=-1) for block in blocks], dim=-1)


class LexicalRouter(CentroidRouter):
    """
    A `CentroidRouter` that also looks at which tokens a row has: naive Bayes over the vocabulary, in the same logits.

    `table` [vocabulary, expert] holds, as integers times `scale`, how much more likely a token is with an expert than with
    the others (log, centred over experts; 0 for tokens that no training row had). Each different token of a row counts
    once. Features are the masked mean of the states and, behind it, the sums over tokens.
    """

    table: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor

    def __init__(self, hidden_size: int, centres: list, vocabulary: int):
        super().__init__(hidden_size, centres)
        self.register_buffer("table", torch.zeros(vocabulary, len(centres), dtype=torch.int8))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("weight", torch.zeros(1))

    def lexical(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sums over the different valid tokens of each row: [batch, token] -> [batch, expert]."""
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        ids = torch.where(mask > 0, ids, torch.full_like(ids, -1)).sort(dim=1).values
        first = torch.cat([ids[:, :1] >= 0, (ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] >= 0)], dim=1)
        rows = self.table[ids.clamp(min=0)].float() * first[..., None]
        return rows.sum(dim=1) * self.scale

    def features(self, hidden, mask, ids=None) -> torch.Tensor:
        """[batch, feature + expert]; without token ids (rows given as embeddings) the tokens say nothing."""
        pooled = masked_mean(hidden.float(), mask)
        if ids is None:
            return torch.cat([pooled, pooled.new_zeros(len(pooled), len(self.centres))], dim=-1)
        return torch.cat([pooled, self.lexical(ids, mask).to(pooled)], dim=-1)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        pooled, lexical = features.split([features.shape[-1] - len(self.centres), len(self.centres)], dim=-1)
        return super().score(pooled) + self.weight * lexical


class NeighbourRouter(nn.Module):
    """
    k nearest neighbours among exemplar rows of every expert, in a whitened subspace of the features.

    `projection` [dimension, feature] and `shift` [dimension] map features there; `exemplars` [expert, exemplar, dimension].
    """

    def __init__(self, input_size: int, experts: int, dimension: int, exemplars: int, neighbours: int):
        super().__init__()
        self.neighbours = neighbours
        self.projection = nn.Parameter(torch.empty(dimension, input_size))
        self.shift = nn.Parameter(torch.empty(dimension))
        self.exemplars = nn.Parameter(torch.empty(experts, exemplars, dimension))

    def features(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return masked_mean(hidden.float(), mask)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Log of each expert's share of the nearest exemplars [batch, expert]; near ones count more (Gaussian)."""
        experts, count, dimension = self.exemplars.shape
        points = features.to(self.projection.dtype) @ self.projection.T + self.shift
        distances = torch.cdist(points, self.exemplars.reshape(-1, dimension)).pow(2)
        nearest = distances.topk(min(self.neighbours, experts * count), dim=1, largest=False)
        width = nearest.values.mean(dim=1, keepdim=True).clamp(min=1e-12)
        votes = (-nearest.values / width).softmax(dim=1)
        owners = nearest.indices // count
        shares = torch.zeros(len(points), experts, dtype=votes.dtype, device=votes.device)
        return (shares.scatter_add(1, owners, votes) + 1.0 / (experts * self.neighbours)).log()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.score(self.features(hidden, mask))


class ProjectionRouter(nn.Module):
    """
    Data-free: the share of each token's energy inside an expert's right singular subspace, mean over valid tokens.

    `basis` [expert, rank, hidden] has orthonormal rows: the leading right singular vectors of what the expert changed
    in the projections that read the routing state.
    """

    def __init__(self, hidden_size: int, experts: int, rank: int):
        super().__init__()
        self.basis = nn.Parameter(torch.empty(experts, rank, hidden_size))

    def features(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Energy shares [batch, expert], each in [0, 1]."""
        hidden = hidden.to(self.basis.dtype)
        inside = torch.einsum("bsd,erd->bser", hidden, self.basis).pow(2).sum(-1)
        total = hidden.pow(2).sum(-1, keepdim=True).clamp(min=1e-12)
        return masked_mean(inside / total, mask)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.score(self.features(hidden, mask))


class Novelty(nn.Module):
    """
    How unlike every expert's rows a row is: squared distance to the nearest expert's centre, less that to all rows
    together (relative Mahalanobis distance, Ren et al. 2021), in the space that tells experts apart.

    `projection` [dimension, feature]: there, rows of one expert scatter evenly. `centres` [expert, dimension]. `whole`
    [dimension, dimension + 1]: maps a point to where all rows scatter evenly around 0. Used by the `none` route: a row
    beyond the config's `router_none_distance` gets no expert, which is the shared model.
    """

    def __init__(self, input_size: int, experts: int, dimension: int):
        super().__init__()
        self.projection = nn.Parameter(torch.empty(dimension, input_size))
        self.centres = nn.Parameter(torch.empty(experts, dimension))
        self.whole = nn.Parameter(torch.empty(dimension, dimension + 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[batch, feature] -> [batch]."""
        points = features.to(self.projection.dtype) @ self.projection.T
        nearest = torch.cdist(points, self.centres).pow(2).amin(dim=1)
        return nearest - (points @ self.whole[:, :-1].T + self.whole[:, -1]).pow(2).sum(dim=1)


def new_router(config) -> nn.Module:
    """Make the router a config describes."""
    experts, size = len(config.experts), config.router_input_size
    if config.router_type == "projection":
        router: nn.Module = ProjectionRouter(size, experts, config.router_rank)
        size = experts
    elif config.router_type == "knn":
        router = NeighbourRouter(size, experts, config.router_rank, config.router_exemplars, config.router_neighbours)
    elif config.router_type == "centroid":
        router = CentroidRouter(size, config.router_centres)
    elif config.router_type == "lexical":
        router = LexicalRouter(size, config.router_centres, config.vocab_size)
    else:
        router = (MLPRouter if config.router_type == "mlp" else LinearRouter)(size, experts)
    if config.router_none_distance is not None:
        router.novelty = Novelty(size, experts, config.router_none_dimension or max(1, experts - 1))
    return router


def weights_from_logits(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Softmax over experts at `temperature`; with `top_k`, the others are zero and the rest is renormalised."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
    return logits.softmax(dim=-1)


class PrefixReachedError(Exception):
    """Ends a shared pass whose routing states have all been read. No error of the user's."""


# States that the running pass has read so far, for the reader whose pass it is.
_READING: ContextVar = ContextVar("twin_merging_reading", default=None)


class StateReader:
    """
    Reads the states that route: the inputs of some layers, and, where no layer ends the pass, its last state.

    One for each model. While a pass that was started to route runs, the taps on those layers collect into a context
    variable (threads do not meet); compiled frames use an attribute instead, because dynamo refuses context variables.
    """

    def __init__(self, stops: bool):
        self.stops = stops
        self.states: list | None = None
        self.finish: Any = None

    def __getstate__(self):
        return {"stops": self.stops}

    def __setstate__(self, state):
        self.stops, self.states, self.finish = state["stops"], None, None

    def collected(self) -> tuple | None:
        """States of the pass that runs now and what comes after the last, or None if it is none of this reader's."""
        if torch.compiler.is_compiling():
            return None if self.states is None else (self.states, self.finish)
        reading = _READING.get()
        return reading[1:] if reading is not None and reading[0] is self else None

    @contextmanager
    def reading(self, finish: Any = None):
        """
        Let the taps collect until the block ends; gives the list of states.

        Args:
            finish: called with all states side by side as soon as the last is read; None: the pass ends there.
        """
        states: list = []
        # Attributes for compiled frames, which may lie within this eager one where a graph breaks.
        self.states, self.finish = states, finish
        token = None if torch.compiler.is_compiling() else _READING.set((self, states, finish))
        try:
            yield states
        finally:
            self.states = self.finish = None
            if token is not None:
                _READING.reset(token)

    def read(self, run) -> torch.Tensor:
        """
        Run the shared pass by calling `run` and return the routing states `side_by_side`: [batch, token, sum of widths].
        """
        with self.reading() as states:
            last = self._run(run)
        if self.stops and last is not None:
            raise RuntimeError("the shared pass ended before the routing layer was reached")
        return side_by_side([*states, *([last] if last is not None else [])])

    @staticmethod
    def _run(run):
        try:
            return run().last_hidden_state
        except PrefixReachedError:
            return None


def side_by_side(states: list) -> torch.Tensor:
    """
    Routing states [batch, token, width] as one, [batch, token, sum of widths].

    Of a feature map [batch, width, rows, columns], pixels are the tokens; several maps, whose sizes differ, are each one
    token: their mean.
    """
    maps = [state.flatten(2).transpose(1, 2) if state.dim() == 4 else state for state in states]
    if len(states) > 1 and states[0].dim() == 4:
        maps = [pixels.mean(dim=1, keepdim=True) for pixels in maps]
    return torch.cat(maps, dim=-1)


class StateTap:
    """Forward pre-hook of a module whose input is a routing state; the last of a prefix ends the pass, or goes on with it."""

    def __init__(self, reader: StateReader, ends: bool):
        self.reader, self.ends = reader, ends

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        reading = self.reader.collected()
        if reading is None:
            return
        states, finish = reading
        states.append(args[0] if args else next(iter(kwargs.values())))
        if not self.ends:
            return
        if finish is None:
            raise PrefixReachedError
        finish(side_by_side(states))
