"""Routers: trained on the shared model's states of train rows, or built from the experts' deltas without data."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from twin_merging_hf.modeling.routing_twin_merging import (
    CentroidRouter,
    LexicalRouter,
    LinearRouter,
    MLPRouter,
    NeighbourRouter,
)

from .closed_form import fit_centroid, fit_lexical_weight, fit_lexicon, fit_neighbours
from .compression import truncated_svd
from .errors import TwinMergingError
from .recipe import RouterSettings
from .temperature import fit_temperature


_WEIGHT_DECAY = 1e-3
_LBFGS_STEPS = 200
_MLP_BATCH = 64
_LEAST_OF_CENTRE = 20


@dataclass(frozen=True)
class RouterData:
    """
    Routing features [row, feature] and the expert that each row belongs to [row]; train and held-out.

    train_groups: for `centroid`, the centre that each train row belongs to [row] (see `centre_groups`); None: one centre
    an expert. centres: how many centres each expert has.
    """

    train: torch.Tensor
    train_experts: torch.Tensor
    held_out: torch.Tensor
    held_out_experts: torch.Tensor
    train_groups: torch.Tensor | None = None
    centres: tuple[int, ...] = ()
    train_tokens: list[torch.Tensor] | None = None
    held_out_tokens: list[torch.Tensor] | None = None
    """Token ids of each row, for `lexical`; None where rows are no text."""


@dataclass(frozen=True)
class RouterReport:
    """
    How a router does on rows that its training did not see.

    confusion: [expert, chosen expert] counts over held-out rows. negative_log_likelihood: at the chosen temperature.
    comparison: what `auto` tried: the same figures for each candidate. none_share: of held-out rows, how many the
    `none` route takes.
    """

    type: str
    temperature: float
    held_out_rows: int
    accuracy: float
    negative_log_likelihood: float
    confusion: list[list[int]]
    layers: list[int] = field(default_factory=list)
    none_share: float | None = None
    comparison: list[dict] = field(default_factory=list)


def centre_groups(labels: list[list[Any]]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """
    Split each expert's rows into groups that look alike: by label, by quarters of a regression's numbers.

    Rows of a rare label go with the expert's other rare labels, or, where these are few too, with its commonest.

    Args:
        labels: for each expert, its rows' labels (int), numbers (float), or None for rows without one label.

    Returns:
        The group of every row [row], experts after each other, and how many groups each expert has.
    """
    groups: list[torch.Tensor] = []
    counts: list[int] = []
    for values in labels:
        places = _places(values)
        groups.append(places + sum(counts))
        counts.append(int(places.max()) + 1)
    return torch.cat(groups), tuple(counts)


def _places(values: list[Any]) -> torch.Tensor:
    if any(value is None for value in values):
        return torch.zeros(len(values), dtype=torch.long)
    if isinstance(values[0], float):
        numbers = torch.tensor(values)
        values = torch.bucketize(numbers, torch.quantile(numbers, torch.tensor([0.25, 0.5, 0.75]))).tolist()
    sizes = Counter(values)
    common = sorted(value for value, size in sizes.items() if size >= _LEAST_OF_CENTRE)
    rare = len(values) - sum(sizes[value] for value in common)
    if not common:
        return torch.zeros(len(values), dtype=torch.long)
    other = len(common) if rare >= _LEAST_OF_CENTRE else common.index(max(common, key=lambda value: sizes[value]))
    place = {value: i for i, value in enumerate(common)}
    return torch.tensor([place.get(value, other) for value in values])


def train_router(
    router: nn.Module,
    data: RouterData,
    settings: RouterSettings,
    seed: int,
    tick: Callable[[str], None] = lambda message: None,
) -> None:
    """
    Fit a router in place, in the way of its class.

    The `mlp` keeps the epoch that does best on held-out rows (never on test rows); `centroid` and `knn` are solved.
    """
    if isinstance(router, MLPRouter):
        _train_mlp(router, data, settings.epochs, settings.lr, seed, tick)
    elif isinstance(router, NeighbourRouter):
        fit_neighbours(router, data.train, data.train_experts, seed)
    elif isinstance(router, LexicalRouter):
        _fit_lexical(router, data)
    elif isinstance(router, CentroidRouter):
        groups = data.train_experts if data.train_groups is None else data.train_groups
        fit_centroid(router, data.train, groups)
    else:
        _fit_linear(router, data, tick)  # type: ignore[arg-type]


def with_tokens(router: nn.Module, data: RouterData) -> RouterData:
    """Put the sums over tokens behind the held-out features that a `lexical` router scores; other routers' stay."""
    if not isinstance(router, LexicalRouter):
        return data
    if data.held_out_tokens is None:
        raise TwinMergingError("router `lexical` looks at tokens, and these rows have none; use `centroid`")
    sums = [router.lexical(ids[None], None) for ids in data.held_out_tokens]
    return replace(data, held_out=torch.cat([data.held_out, torch.cat(sums)], dim=1))


def _fit_lexical(router: LexicalRouter, data: RouterData) -> None:
    groups = data.train_experts if data.train_groups is None else data.train_groups
    fit_centroid(router, data.train, groups)
    fit_lexicon(router, data.train_tokens or [], data.train_experts)
    fit_lexical_weight(router, with_tokens(router, data).held_out, data.held_out_experts)


def _fit_linear(router: LinearRouter, data: RouterData, tick: Callable[[str], None]) -> None:
    """Logistic regression on standardised features, to convergence; the scaling is folded into the layer."""
    mean = data.train.mean(dim=0)
    scale = data.train.std(dim=0).clamp(min=1e-6)
    x, y = (data.train - mean) / scale, data.train_experts
    experts = router.classifier.out_features
    weight = torch.zeros(experts, x.shape[1], requires_grad=True)
    bias = torch.zeros(experts, requires_grad=True)
    counts = torch.bincount(y, minlength=experts).clamp(min=1)
    balance = counts.sum() / (experts * counts.float())
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y, weight=balance) + _WEIGHT_DECAY * weight.pow(2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        correct = ((x @ weight.T + bias).argmax(dim=1) == y).float().mean()
        tick(f"linear router: {correct:.1%} of {len(y)} training rows right")
        router.classifier.weight.copy_(weight / scale)
        router.classifier.bias.copy_(bias - (weight / scale) @ mean)


def _train_mlp(
    router: MLPRouter, data: RouterData, epochs: int, lr: float, seed: int, tick: Callable[[str], None]
) -> None:
    """The paper's network: cross-entropy, Adam."""
    # Weights and dropout are drawn from the recipe's seed; the caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _run_epochs(router, data, epochs, lr, seed, tick)


def _run_epochs(
    router: MLPRouter, data: RouterData, epochs: int, lr: float, seed: int, tick: Callable[[str], None]
) -> None:
    for module in router.modules():
        if isinstance(module, (nn.Linear, nn.BatchNorm1d)):
            module.reset_parameters()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=lr)
    best, best_state = float("inf"), None
    for epoch in range(epochs):
        router.train()
        order = torch.randperm(len(data.train), generator=generator)
        with torch.enable_grad():
            for batch in order.split(_MLP_BATCH):
                if len(batch) < 2:
                    continue  # BatchNorm has no variance of one row
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(router.score(data.train[batch]), data.train_experts[batch])
                loss.backward()
                optimizer.step()
        router.eval()
        with torch.no_grad():
            held_out = float(nn.functional.cross_entropy(router.score(data.held_out), data.held_out_experts))
        tick(f"mlp router: epoch {epoch + 1} of {epochs}, held-out loss {held_out:.4f}")
        if held_out < best:
            best, best_state = held_out, {key: value.clone() for key, value in router.state_dict().items()}
    if best_state is None:
        raise TwinMergingError("the mlp router's loss is not finite; lower `router.lr`")
    router.load_state_dict(best_state)


@torch.no_grad()
def router_report(router: nn.Module, data: RouterData, kind: str, temperature: float | None) -> RouterReport:
    """Measure a router on held-out rows; with `temperature=None`, fit it there."""
    logits = router.score(with_tokens(router, data).held_out)  # type: ignore[operator]
    if temperature is None:
        temperature = fit_temperature(logits, data.held_out_experts)
    chosen, experts = logits.argmax(dim=1), data.held_out_experts
    count = logits.shape[1]
    confusion = torch.zeros(count, count, dtype=torch.long)
    for expert, choice in zip(experts.tolist(), chosen.tolist(), strict=True):
        confusion[expert, choice] += 1
    return RouterReport(
        type=kind,
        temperature=temperature,
        held_out_rows=len(experts),
        accuracy=float((chosen == experts).float().mean()),
        negative_log_likelihood=float(nn.functional.cross_entropy(logits / temperature, experts)),
        confusion=confusion.tolist(),
    )


def subspace(matrices: list[torch.Tensor], rank: int, seed_text: str) -> torch.Tensor:
    """
    Leading right singular vectors [rank, n] of deltas [m_i, n] stacked over the projections that read one state.

    Missing directions (a delta of lower rank) are zero rows, in which no state has energy.
    """
    stacked = torch.cat(matrices)
    _, s, vh = truncated_svd(stacked, rank, seed_text)
    basis = torch.zeros(rank, stacked.shape[1])
    kept = s > 1e-6 * s.max().clamp(min=1e-30)
    basis[: int(kept.sum())] = vh[kept]
    return basis
