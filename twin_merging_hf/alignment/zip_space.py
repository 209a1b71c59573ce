"""Similarities of the units of several aligned models, within and across, for zipping."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .activations import Batches, captured, evaluating, run, samples
from .permutation import Permutation
from .spec import Axis, Layout, Path


Matrices = dict[str, list[torch.Tensor]]
"""By zipped site: of each model, memberships [unit, cluster], or [parent's unit, unit, cluster]."""


class _Correlation:
    """Running Pearson correlation of features [group, sample, feature] within each group."""

    def __init__(self) -> None:
        self.count, self.sums, self.cross = 0, torch.zeros(()), torch.zeros(())
        self.shift: torch.Tensor | None = None

    def add(self, values: torch.Tensor, centre: bool = True) -> None:
        # As for alignment: single precision is enough for choosing among many, and takes half the memory.
        values = values.double() if values.shape[2] <= 1024 else values.float()
        if self.shift is None:
            self.shift = values.mean(1, keepdim=True) if centre else torch.zeros_like(values[:, :1])
        values = values - self.shift
        self.count += values.shape[1]
        self.sums = self.sums + values.sum(1)
        self.cross = self.cross + values.mT @ values

    def matrix(self) -> torch.Tensor:
        """[group, feature, feature]; 0 where a feature is constant."""
        mean = self.sums / self.count
        covariance = self.cross / self.count - mean[:, :, None] * mean[:, None]
        variance = covariance.diagonal(dim1=1, dim2=2).clamp(min=0)
        spread = torch.where(variance > variance.max() * 1e-10, variance, torch.inf).sqrt()
        return (covariance / (spread[:, :, None] * spread[:, None])).clamp(-1, 1)


class ZipSpace:
    """
    Several models' units, each model seen through its alignment with the reference.

    Args:
        states: tensors of each model, by name.
        permutations: of each model towards the reference (the identity for the reference itself).
        sites: those that are zipped.
    """

    def __init__(
        self, layout: Layout, states: Sequence[Mapping[str, torch.Tensor]], permutations: Sequence[Permutation],
        sites: Sequence[str], weight_share: float,
    ):  # fmt: skip
        self.layout, self.states, self.permutations, self.sites = layout, states, permutations, list(sites)
        self.share = weight_share
        self.activations: dict[str, torch.Tensor] = {}

    def see(self, models: Sequence[Any], batches: Batches) -> None:
        """Collect the activations of all models on the same batches."""
        found: dict[str, _Correlation] = {}
        wanted = {text for text, slabs in self.layout.slabs.items() if any(path[-1] in self.sites for path in slabs)}
        with evaluating(*models):
            for batch in batches:
                kept: list[dict[str, list[torch.Tensor]]] = []
                for model in models:
                    kept.append({})
                    with captured(model, self.layout, kept[-1], wanted):
                        run(model, batch)
                for text in kept[0]:
                    for values in zip(*(store[text] for store in kept), strict=True):
                        self._add(found, text, values, batch.get("attention_mask"))
        self.activations = {site: each.matrix().float() for site, each in found.items()}

    def _add(self, found: dict, text: str, values: Sequence[torch.Tensor], mask: torch.Tensor | None) -> None:
        slabs = self.layout.slabs[text]
        sizes = [torch.Size(self.layout.shape(path)).numel() for path in slabs]
        for number, path in enumerate(slabs):
            if path[-1] not in self.sites:
                continue
            parts = []
            for value, permutation in zip(values, self.permutations, strict=True):
                features = samples(value, sum(sizes), mask).split(sizes, dim=1)[number].float().cpu()
                index, sign = permutation.flat(path)
                features = features[:, index] if sign is None else features[:, index] * sign
                parts.append(self._by_group(features.T, path))
            found.setdefault(path[-1], _Correlation()).add(torch.cat(parts, 1).mT)

    def _by_group(self, units: torch.Tensor, path: Path) -> torch.Tensor:
        """[composite unit, entry] as [group, leaf unit, entries of all units between]; one group for a site without parent."""
        shape = self.layout.shape(path)
        if len(shape) == 1:
            return units[None]
        return units.reshape(shape[0], -1, shape[-1], units.shape[1]).movedim(1, 2).flatten(2)

    def similarity(self, site: str, matrices: Matrices) -> torch.Tensor:
        """[group, models * unit, models * unit] in both spaces, with neighbours as aligned, or as zipped so far."""
        seen = self.activations.get(site)
        share = 1.0 if seen is None else self.share
        if share == 0 and seen is not None:
            return seen
        weights = self._weights(site, matrices)
        return weights if seen is None else share * weights + (1 - share) * seen

    def _weights(self, site: str, matrices: Matrices) -> torch.Tensor:
        found = _Correlation()
        root = self.layout.sites[site].parent or site
        for entry in self.layout.entries.get(root, []):
            if entry.path[-1] != site or len({state[entry.tensor].shape for state in self.states}) > 1:
                continue
            parts = []
            for model in range(len(self.states)):
                tensor = self.seen(entry.tensor, model, matrices, skip=entry.dim)
                units = tensor.narrow(entry.dim, entry.start, entry.length).movedim(entry.dim, 0)
                parts.append(self._by_group(units.reshape(entry.length, -1), entry.path))
            found.add(torch.cat(parts, 1).mT, centre=False)
        return found.matrix().float()

    def seen(self, name: str, model: int, matrices: Matrices, skip: int | None = None) -> torch.Tensor:
        """A model's tensor aligned with the reference, and on zipped axes (but one) as it goes into the merge."""
        tensor = self.permutations[model].align(name, self.states[model][name].float().cpu())
        for dim, axis in enumerate(self.layout.axes[name]):
            if axis is not None and dim != skip:
                tensor = self._zipped(tensor, dim, axis, model, matrices)
        return tensor

    def _zipped(self, tensor: torch.Tensor, dim: int, axis: Axis, model: int, matrices: Matrices) -> torch.Tensor:
        parts, start = [], 0
        for path in axis.slabs:
            shape = self.layout.shape(path)
            length = torch.Size(shape).numel()
            part = tensor.narrow(dim, start, length)
            start += length
            if path[-1] in matrices:
                rest = part.movedim(dim, 0)
                units = self._by_group(rest.reshape(length, -1), path)
                merged = self.side(path[-1], axis.role, model, matrices).mT @ units
                part = self._from_groups(merged, path).reshape(rest.shape).movedim(0, dim)
            parts.append(part)
        return torch.cat(parts, dim)

    def _from_groups(self, units: torch.Tensor, path: Path) -> torch.Tensor:
        shape = self.layout.shape(path)
        if len(shape) == 1:
            return units[0]
        middle = torch.Size(shape[1:-1]).numel()
        return units.unflatten(2, (middle, -1)).movedim(2, 1).reshape(torch.Size(shape).numel(), -1)

    def side(self, site: str, role: str, model: int, matrices: Matrices) -> torch.Tensor:
        """
        [group, unit, cluster] by which an axis goes into the merge: sums for what consumes (`unmerge`), shares of the mean for
        what produces (`merge`, over all models' units in a cluster).
        """
        own = matrices[site][model]
        own = own[None] if own.dim() == 2 else own
        if role == "-":
            return own
        counts = torch.stack([m.sum(-2) for m in matrices[site]]).sum(0)
        return own / counts.reshape(own.shape[0], 1, -1)

    def merged(self, name: str, matrices: Matrices) -> torch.Tensor:
        """One tensor of the merge, in float32: the sum of what each model gives, or the mean where nothing is zipped."""
        total = torch.stack([self.seen(name, model, matrices) for model in range(len(self.states))]).sum(0)
        produced = {path[-1] for axis in self.layout.axes[name] if axis and axis.role in "+*" for path in axis.slabs}
        if len(produced) > 1 and produced & matrices.keys():
            return self._fused(name, total, matrices)
        return total if produced & matrices.keys() else total / len(self.states)

    def _fused(self, name: str, total: torch.Tensor, matrices: Matrices) -> torch.Tensor:
        """Slabs side by side, of which only some are zipped: each is a sum or a mean by itself."""
        dim, axis = next((d, a) for d, a in enumerate(self.layout.axes[name]) if a is not None and a.role in "+*")
        lengths = [torch.Size(self.layout.shape(path)).numel() for path in axis.slabs]
        parts = total.split(lengths, dim)
        zipped = [path[-1] in matrices for path in axis.slabs]
        return torch.cat([p if z else p / len(self.states) for p, z in zip(parts, zipped, strict=True)], dim)
