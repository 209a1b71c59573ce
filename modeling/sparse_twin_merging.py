"""
Sparse deltas, for ablations: single entries of each expert's delta (the largest, or random ones) with their places.

They cost a dense product for every expert in every call, where factors cost two thin ones for all experts together.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .call_twin_merging import CallWeights
from .factors_twin_merging import rows_like


def _linear(x, dense, settings):
    return F.linear(x, dense)


def _conv1d(x, dense, settings):
    return x @ dense


def _embedding(ids, dense, settings):
    if ids.is_floating_point():  # hidden states: the output layer that is tied to the embedding
        return F.linear(ids, dense)
    return F.embedding(ids if ids.dim() > 1 else ids[None], dense)


def _conv2d(x, dense, settings):
    return F.conv2d(x, dense, **settings)


_APPLY = {"linear": _linear, "conv1d": _conv1d, "embedding": _embedding, "conv2d": _conv2d}


class SparseDelta(nn.Module):
    """
    Deltas of one parameter of any kind, as `values` at `indices` of the flattened parameter, expert after expert.

    Computes sum_t w[b, t] * (dense_t applied to x_b), one expert at a time: one dense delta exists at a time, and no
    mixture of experts. An ablation of Twin-Merging, section 4.2; factors are the way to use it.

    Args:
        counts: number of entries of each expert's delta.
    """

    indices: torch.Tensor

    def __init__(self, rule: str, counts: list, shape: tuple, settings: dict):
        super().__init__()
        if rule not in (*_APPLY, "table"):
            raise ValueError(f"a delta by rule {rule!r} cannot be sparse")
        self.rule, self.counts, self.shape, self.settings = rule, tuple(counts), tuple(shape), settings
        self.values = nn.Parameter(torch.empty(sum(counts)))
        self.register_buffer("indices", torch.zeros(sum(counts), dtype=torch.int32))

    def dense(self, t: int) -> torch.Tensor:
        """Delta of one expert in the parameter's shape."""
        block = slice(sum(self.counts[:t]), sum(self.counts[: t + 1]))
        values = self.values[block]
        flat = values.new_zeros(torch.Size(self.shape).numel())
        return flat.scatter(0, self.indices[block].long(), values).reshape(self.shape)

    def merged(self, call: CallWeights, weight: torch.Tensor) -> torch.Tensor:
        """`weight` with the deltas of the one row of expert weights in `call` added."""
        merged = weight.flatten().float() if weight.dtype != torch.float32 else weight.flatten().clone()
        for t in self._acting(call):
            block = slice(sum(self.counts[:t]), sum(self.counts[: t + 1]))
            share = call.weights[0, t].to(merged.device)
            merged.index_add_(0, self.indices[block].long(), self.values[block].to(merged.dtype) * share)
        return merged.reshape(weight.shape).to(weight.dtype)

    def forward(self, *args) -> torch.Tensor:
        *inputs, call = args  # a table has no input
        terms = [self._term(inputs, call, t) for t in self._acting(call)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _acting(self, call: CallWeights) -> list:
        acting = [t for t, n in enumerate(self.counts) if n and (call.experts is None or t in call.experts)]
        return acting or [self.counts.index(max(self.counts))]  # nothing acts: any expert, whose weights are 0

    def _term(self, inputs: list, call: CallWeights, t: int) -> torch.Tensor:
        weight = call.weights[:, t : t + 1].to(device=self.values.device, dtype=self.values.dtype)
        if self.rule == "table":
            return weight[..., None] * self.dense(t)
        x = inputs[0].to(self.values.dtype) if inputs[0].is_floating_point() else inputs[0]
        h = _APPLY[self.rule](x, self.dense(t), self.settings)
        if self.rule == "conv2d":
            return h * rows_like(weight, h, feature_dims=3)[..., None, None]
        return h * rows_like(weight, h)
