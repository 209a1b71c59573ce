"""
The walk through a model: layers are fitted in the order in which they run, each on what the layers before, fitted already,
hand to it. So a layer also makes up for what those before it lost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .layers import is_fitted, new_fit


RIDGES = (1e-4, 1e-2, 1.0)
"""What is tried in each layer, as shares of the mean squared input; and infinity, which is the mean of the experts."""
_MOST_SAMPLES = 4096
Batches = Sequence[Mapping[str, torch.Tensor]]


@dataclass
class FitReport:
    """
    What a fit did.

    ridges: of each module, the ridge that did best on rows left out of the fit; None: it kept the mean of the experts.
    loss, mean_loss: mean squared difference of the last hidden state to each expert's on those rows, of the fit and of the
        mean, as a share of the experts' own mean square.
    kept_mean: the fit as a whole did not do better, and the model is the mean of the experts.
    """

    ridges: dict[str, float | None] = field(default_factory=dict)
    loss: float = 0.0
    mean_loss: float = 0.0
    kept_mean: bool = False


@torch.no_grad()
def fit_layers(
    merged: Any,
    experts: Sequence[Any],
    batches: Sequence[Batches],
    left_out: Sequence[Batches],
    weights: Sequence[float] | None = None,
    tick: Callable[[str], Any] = lambda name: None,
) -> FitReport:
    """
    Fit the layers of a merged model's backbone to what the experts compute on their own rows, in place.

    For a layer with weight W, input z of the merged model and z_t of expert t on the same row, W is what minimises
    sum_t a_t mean |W z - W_t z_t|^2 with a ridge toward the W that is there (PLeaS, section 3.2; its inputs are means of
    the experts' features, here they are the merged model's own). Norms get the scale and shift of each channel alike.

    Args:
        merged: a task model that holds the mean of the (aligned) experts.
        experts: task models of the same class.
        batches: for each expert, model inputs without labels.
        left_out: the same, to choose each layer's ridge on; nothing is fitted to them.
        weights: a_t; default: all equal.
        tick: called with the name of each module that is fitted.

    Raises:
        ValueError: an expert has no rows to fit to, or to choose on.
    """
    batches, left_out = _without_empty(batches, "batches"), _without_empty(left_out, "left_out")
    weights = [1.0] * len(experts) if weights is None else weights
    models = [merged, *experts]
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    mean = {name: value.clone() for name, value in merged.base_model.state_dict().items()}
    report = FitReport(mean_loss=state_loss(merged, experts, left_out, weights))
    for names in _groups(merged.base_model, next(iter(batches[0]))):
        for name, ridge in _fit_group(merged, experts, names, batches, left_out, weights).items():
            report.ridges[name] = ridge
            tick(name)
    report.loss = state_loss(merged, experts, left_out, weights)
    if not report.loss <= report.mean_loss:
        merged.base_model.load_state_dict(mean)
        report.loss, report.kept_mean = report.mean_loss, True
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return report


def _fit_group(merged, experts, names, batches, left_out, weights) -> dict[str, float | None]:
    """Fit modules that read one and the same state; returns their ridges."""
    fits = {name: new_fit(merged.base_model.get_submodule(name)) for name in names}
    fitted = {name: fit.equations() for name, fit in fits.items()}
    judged = {name: fit.equations() for name, fit in fits.items()}
    for part, equations in ((batches, fitted), (left_out, judged)):
        for expert, own, weight in zip(experts, part, weights, strict=True):
            targets = {name: new_fit(expert.base_model.get_submodule(name)) for name in names}
            rows = sum(_rows(batch) for batch in own)
            for number, batch in enumerate(own):
                state, theirs = (_state_before(model.base_model, names, batch) for model in (merged, expert))
                keep = _valid(state, batch)
                for name, fit in fits.items():
                    x, y = fit.samples(state[keep]), targets[name].samples(theirs[keep])
                    if not len(x):
                        continue  # a batch of nothing but padding says nothing
                    chosen = _chosen(len(x), number)
                    equations[name].add(
                        x[chosen], targets[name].outputs(y[chosen]), weight / rows * len(x) / len(chosen)
                    )
    ridges: dict[str, float | None] = {}
    for name, fit in fits.items():
        candidates: dict[float | None, torch.Tensor] = {None: fitted[name].start}
        candidates |= {ridge: fitted[name].solve(ridge) for ridge in RIDGES}
        losses = {ridge: judged[name].loss(solution) for ridge, solution in candidates.items()}
        ridges[name] = min(losses, key=lambda ridge: losses[ridge])
        fit.write(candidates[ridges[name]])
    return ridges


def state_loss(merged: Any, experts: Sequence[Any], batches: Sequence[Batches], weights: Sequence[float]) -> float:
    """Weighted mean, over experts, of |merged - expert|^2 / |expert|^2 of the last hidden state on each one's rows."""
    total = 0.0
    for expert, own, weight in zip(experts, batches, weights, strict=True):
        difference = energy = 0.0
        for batch in own:
            state, target = (model.base_model(**batch).last_hidden_state for model in (merged, expert))
            keep = _valid(state, batch)
            difference += float((state[keep] - target[keep]).double().pow(2).sum())
            energy += float(target[keep].double().pow(2).sum())
        total += weight * difference / max(energy, 1e-300)
    return total / sum(weights)


def _groups(body: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of the modules to fit, in the order in which they run; those that read one and the same tensor together."""
    calls: list[tuple[str, torch.Tensor]] = []
    shared = _shared_parameters(body)
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append((name, args[0])))
        for name, module in body.named_modules()
        if is_fitted(module) and not any(id(p) in shared for p in module.parameters())
    ]
    body(**{name: value[:1] for name, value in batch.items()})
    for hook in hooks:
        hook.remove()
    names = [name for name, _ in calls]
    groups: list[list[str]] = []
    before: torch.Tensor | None = None
    for name, state in calls:
        if names.count(name) > 1:
            continue  # a module that runs twice has two inputs: it keeps the mean
        if state is before:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = state
    return groups


def _shared_parameters(body: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds."""
    holders: dict[int, int] = {}
    for module in body.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


class _ReachedError(Exception):
    """Ends a pass whose state has been read. No error of the user's."""


def _state_before(body: nn.Module, names: list[str], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that the modules `names` read."""
    with _reading(body.get_submodule(names[0])) as states:
        with suppress(_ReachedError):
            body(**batch)
    return states[0]


@contextmanager
def _reading(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    states: list[torch.Tensor] = []

    def read(module: nn.Module, args: tuple) -> None:
        states.append(args[0])
        raise _ReachedError

    hook = module.register_forward_pre_hook(read)
    try:
        yield states
    finally:
        hook.remove()


def _rows(batch: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))


def _without_empty(part: Sequence[Batches], argument: str) -> list[Batches]:
    """The batches that have rows; ValueError if an expert has none."""
    full: list[Batches] = [[batch for batch in own if _rows(batch)] for own in part]
    for t, own in enumerate(full):
        if not own:
            raise ValueError(f"`{argument}` holds no rows for expert {t}; give at least one")
    return full


def _valid(state: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> Any:
    """What counts of a state [row, token, ...]: no padding; of other states, all."""
    mask = batch.get("attention_mask")
    if mask is not None and state.dim() == 3 and state.shape[:2] == mask.shape:
        return mask > 0
    return slice(None)


def _chosen(count: int, number: int) -> Any:
    """At most so many samples of a batch, evenly drawn; the same in every model."""
    if count <= _MOST_SAMPLES:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(number))[:_MOST_SAMPLES]
