"""
Similarity of units by what they do: streaming Pearson correlation of activations on the same inputs (MuDSC, ZipIt).

Every token that is no padding, and every pixel, is a sample. Sums are taken of values shifted by those of the first batch,
so that a unit with a large mean and hardly any variance does not drown in rounding.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .spec import Layout, Path


_DEAD = 1e-10
"""A variance below this share of the largest one is that of a dead unit."""
_EXACT = 512 * 512
Batches = Iterable[Mapping[str, Any]]


@dataclass
class Moments:
    """Running moments of two sets of features over the same samples; `correlation` is [feature of a, feature of b]."""

    count: int = 0
    shifts: list[torch.Tensor] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    squares: list[torch.Tensor] = field(default_factory=list)
    cross: torch.Tensor | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add samples: [sample, feature of a], [sample, feature of b]."""
        if len(a) == 0:
            return
        pair = [a.double(), b.double()]
        if self.cross is None:
            self.shifts = [x.mean(0) for x in pair]
            self.sums = [torch.zeros_like(shift) for shift in self.shifts]
            self.squares = [torch.zeros_like(shift) for shift in self.shifts]
            # Single precision is enough for choosing among many, and twice as fast.
            exact = a.shape[1] * b.shape[1] <= _EXACT
            self.cross = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64 if exact else torch.float32)
        pair = [x - shift for x, shift in zip(pair, self.shifts, strict=True)]
        self.count += len(a)
        for x, total, square in zip(pair, self.sums, self.squares, strict=True):
            total += x.sum(0)
            square += x.pow(2).sum(0)
        self.cross += pair[0].to(self.cross.dtype).T @ pair[1].to(self.cross.dtype)

    def correlation(self) -> torch.Tensor:
        """Pearson correlation in float32; 0 where a unit is dead or constant."""
        assert self.cross is not None
        means = [total / self.count for total in self.sums]
        spreads = []
        for square, mean, shift in zip(self.squares, means, self.shifts, strict=True):
            variance = (square / self.count - mean.pow(2)).clamp(min=0)
            # What is left of a constant is rounding of its own size.
            floor = torch.maximum(variance.max() * _DEAD, shift.pow(2) * 1e-12)
            spreads.append(torch.where(variance > floor, variance, torch.inf).sqrt())
        found = (self.cross / self.count - means[0].outer(means[1])) / spreads[0].outer(spreads[1])
        return found.clamp(-1, 1).float().cpu()


@contextmanager
def captured(
    model: nn.Module, layout: Layout, store: dict[str, list[torch.Tensor]], wanted: Collection[str] | None = None
) -> Iterator[None]:
    """While in here, the (wanted) hooked modules' features go into `store`, by the hook's path, as they come."""
    handles = []
    try:
        for hook in layout.hooks:
            if wanted is not None and hook.path not in wanted:
                continue
            module = model.get_submodule(hook.module)

            def keep(module: nn.Module, args: Any, output: Any = None, path: str = hook.path) -> None:
                value = args[0] if output is None else output
                # A clone: some models add to their activations in place.
                store.setdefault(path, []).append((value[0] if isinstance(value, tuple) else value).detach().clone())

            register = module.register_forward_pre_hook if hook.side == "in" else module.register_forward_hook
            handles.append(register(keep))
        yield
    finally:
        for handle in handles:
            handle.remove()


def samples(value: torch.Tensor, features: int, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Samples [sample, feature] in an activation: [row, feature], [row, token, feature] or [row, feature, height, width].

    Args:
        mask: [row, token], positive where a token is no padding.
    """
    if value.dim() == 4 and value.shape[1] == features:
        value = value.movedim(1, -1)
    if mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape:
        return value[mask.to(value.device) > 0]
    return value.reshape(-1, features)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode and without gradients; afterwards each module is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: Any, batch: Mapping[str, Any]) -> Any:
    """One forward of a batch of model inputs, without its labels, on the model's device."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    if getattr(model.config, "use_cache", False) and not getattr(model.config, "is_encoder_decoder", False):
        inputs["use_cache"] = False  # else every layer's keys and values are kept for nothing
    return model(**inputs)


def activation_similarities(
    reference: Any, expert: Any, layout: Layout, batches: Batches, tick: Callable[[int], Any] = lambda rows: None
) -> dict[Path, torch.Tensor]:
    """
    Correlations of the units along each hooked path, [reference's unit, expert's unit], by path.

    Both models see every batch in eval mode; hooks of one path are pooled as further samples. The cost in memory is one
    matrix for each path.

    Raises:
        ValueError: there is no batch.
    """
    moments: dict[Path, Moments] = {}
    with evaluating(reference, expert):
        for batch in batches:
            kept: list[dict[str, list[torch.Tensor]]] = [{}, {}]
            for model, store in zip((reference, expert), kept, strict=True):
                with captured(model, layout, store):
                    run(model, batch)
            for text, values in kept[0].items():
                for pair in zip(values, kept[1].pop(text), strict=True):
                    _add(moments, layout, layout.slabs[text], pair, batch.get("attention_mask"))
            tick(len(next(iter(batch.values()))))
    if not moments:
        raise ValueError("no calibration batch reached a hooked module: give at least one batch, or none at all")
    return {path: each.correlation() for path, each in moments.items()}


def _add(
    moments: dict[Path, Moments],
    layout: Layout,
    slabs: tuple[Path, ...],
    pair: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
) -> None:
    """Add one module's activations in both models, slab by slab."""
    sizes = [torch.Size(layout.shape(path)).numel() for path in slabs]
    a, b = (samples(value, sum(sizes), mask).split(sizes, dim=1) for value in pair)
    for path, *features in zip(slabs, a, b, strict=True):
        moments.setdefault(path, Moments()).add(*features)
