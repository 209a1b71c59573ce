"""One dense model for one row of expert weights: shared + sum_t w_t up_t down_t, a single product for each tensor."""

from typing import Any

import torch
from torch import nn

from twin_merging_hf.modeling.deltas_twin_merging import delta_key
from twin_merging_hf.modeling.factors_twin_merging import ExactDelta, FactoredDelta


class Materialised:
    """
    Writes merges of an artifact's weights into a stock model, one after the other and always into the same memory.

    All experts' factors of a tensor stand side by side, so their mixture is one product: `shared + (up * columns) @ down`
    with each rank direction's expert weight (and scale) in `columns`. Integer factors are unpacked once. Directions of
    experts without weight are left out.

    Args:
        model: a classification artifact; read, never changed.
        stock: its shared task model, whose parameters are written.
    """

    def __init__(self, model: Any, stock: nn.Module):
        start = dict(model.shared.named_parameters())
        config = model.config
        names = {*config.ranks, *config.exact_deltas, *config.sparse_deltas}
        self._parts = [
            (_term(model.deltas[delta_key(name)]), start[name], parameter)
            for name, parameter in stock.named_parameters()
            if name in names
        ]

    @torch.no_grad()
    def set(self, weights: torch.Tensor) -> None:
        """Make the stock model the merge for `weights` [expert]."""
        for term, start, parameter in self._parts:
            term.write(weights.to(device=start.device, dtype=torch.float32), start, parameter)


def _term(delta: nn.Module):
    if isinstance(delta, FactoredDelta):
        return _Factors(delta)
    return _Vector(delta) if isinstance(delta, ExactDelta) else _Entries(delta)


class _Factors:
    """A factored delta in float32: up [m, rank] with any scale inside, down [rank, n]."""

    @torch.no_grad()
    def __init__(self, delta: FactoredDelta):
        up, self.down = delta.up_matrix(torch.float32), delta.down_matrix(torch.float32)
        self.up = up if delta.bits is None else up * delta.scale.float()
        self.owners = torch.repeat_interleave(
            torch.arange(len(delta.ranks)), torch.tensor(delta.ranks), output_size=sum(delta.ranks)
        ).to(up.device)

    def write(self, weights: torch.Tensor, start: torch.Tensor, parameter: torch.Tensor) -> None:
        columns = weights[self.owners]
        up, down = self.up, self.down
        alive = columns != 0
        if not bool(alive.all()):
            columns, up, down = columns[alive], up[:, alive], down[alive]
        shape = (len(up), down.shape[1])
        base, scaled = start.reshape(shape), up * columns
        if parameter.dtype == torch.float32 and parameter.is_contiguous():
            torch.addmm(base, scaled, down, out=parameter.data.view(shape))
        else:
            parameter.copy_(torch.addmm(base.float(), scaled, down).reshape(parameter.shape))


class _Vector:
    """Exact deltas [expert, *shape]."""

    def __init__(self, delta: ExactDelta):
        self.delta = delta.delta

    def write(self, weights: torch.Tensor, start: torch.Tensor, parameter: torch.Tensor) -> None:
        parameter.copy_(start.float() + torch.tensordot(weights, self.delta.float(), dims=1))


class _Entries:
    """Sparse deltas: values at places of the flattened parameter."""

    def __init__(self, delta: Any):
        self.values, self.places = delta.values, delta.indices.long()
        counts = torch.tensor(delta.counts)
        self.owners = torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.values.device)

    def write(self, weights: torch.Tensor, start: torch.Tensor, parameter: torch.Tensor) -> None:
        flat = start.float().flatten().clone()
        flat.index_add_(0, self.places, self.values.float() * weights[self.owners])
        parameter.copy_(flat.reshape(parameter.shape))
