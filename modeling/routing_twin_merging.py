"""Routers: from a row's hidden states [batch, token, hidden] to expert logits [batch, expert] and weights."""

from contextlib import contextmanager
from contextvars import ContextVar

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


def new_router(config) -> nn.Module:
    """Make the router a config describes."""
    experts = len(config.experts)
    if config.router_type == "projection":
        return ProjectionRouter(config.router_input_size, experts, config.router_rank)
    kind = MLPRouter if config.router_type == "mlp" else LinearRouter
    return kind(config.router_input_size, experts)


def weights_from_logits(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Softmax over experts at `temperature`; with `top_k`, the others are zero and the rest is renormalised."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
    return logits.softmax(dim=-1)


class PrefixReachedError(Exception):
    """Carries the routing states, its one argument, out of a shared pass that stops early. No error of the user's."""


_STOPPING: ContextVar = ContextVar("twin_merging_stopping", default=None)


class PrefixStop:
    """Forward pre-hook of the module whose input is the routing state: ends a pass that was started to get it."""

    def __init__(self):
        self.active = False

    def __getstate__(self):
        return {"active": False}

    @contextmanager
    def stopping(self):
        """Let the hook stop passes until the block ends."""
        token = _STOPPING.set(self)
        self.active = True  # for compiled frames within this eager one, where a graph breaks
        try:
            yield
        finally:
            self.active = False
            _STOPPING.reset(token)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        stopping = self.active if torch.compiler.is_compiling() else _STOPPING.get() is self
        if stopping:
            raise PrefixReachedError(args[0] if args else next(iter(kwargs.values())))


def routing_state(run, stop: PrefixStop | None) -> torch.Tensor:
    """
    Run the shared pass by calling `run` and return the routing states [batch, token, hidden].

    With `stop`, the pass ends at the hooked module and returns that module's input; else it is the pass's last state.
    """
    if stop is None:
        return run().last_hidden_state
    try:
        if torch.compiler.is_compiling():
            stop.active = True
            run()
        else:
            with stop.stopping():
                run()
    except PrefixReachedError as reached:
        return reached.args[0]
    finally:
        stop.active = False
    raise RuntimeError("the shared pass ended before the routing layer was reached")
