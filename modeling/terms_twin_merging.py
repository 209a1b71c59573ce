"""What the deltas of tables and convolutions add, one mixture per row. (Linear layers and norms: modules of their own.)"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .call_twin_merging import CallWeights
from .factors_twin_merging import FactoredDelta, rows_like


def looked_up(delta: nn.Module, ids: torch.Tensor, call: CallWeights) -> torch.Tensor:
    """What a table's deltas add to rows looked up in it: [batch, token] -> [batch, token, hidden]."""
    if not isinstance(delta, FactoredDelta):
        return delta(ids, call)
    # One-dimensional ids are positions shared by all rows: each row gets its own table entries.
    ids = ids if ids.dim() > 1 else ids[None]
    factors = delta(delta.factor_dtype(), call.places(delta.ranks, ids.device), ids)
    h = factors.up * rows_like(factors.scaled(call.columns(delta.ranks, ids.device)), factors.up)
    return h @ factors.down


def tables(delta: nn.Module, call: CallWeights) -> torch.Tensor:
    """Per-row deltas [batch, m, n] of a whole table, such as the position embeddings [1, m, n] of a ViT."""
    if not isinstance(delta, FactoredDelta):
        return delta(call)
    device = call.weights.device
    factors = delta(delta.factor_dtype(), call.places(delta.ranks, device))
    return (factors.up[None] * factors.scaled(call.columns(delta.ranks, device))[:, None, :]) @ factors.down


def convolved(module: Any, x: torch.Tensor, delta: nn.Module, call: CallWeights) -> torch.Tensor:
    """What a `Conv2d` weight's deltas add: a convolution to rank channels, then a 1 x 1 convolution."""
    if not isinstance(delta, FactoredDelta):
        return delta(x, call)
    dtype = delta.factor_dtype(x)
    factors = delta(dtype, call.places(delta.ranks, x.device))
    kernel = factors.down.reshape(-1, *module.weight.shape[1:])
    h = F.conv2d(x.to(factors.down.device, dtype), kernel, **convolution_settings(module))
    h = h * rows_like(factors.scaled(call.columns(delta.ranks, x.device)), h, feature_dims=3)[..., None, None]
    return F.conv2d(h, factors.up[..., None, None])


def convolution_settings(owner: Any) -> dict:
    """Arguments of a convolution. Raises `ValueError` where it pads with anything but zeros."""
    if owner.padding_mode != "zeros":
        raise ValueError(f"deltas of a Conv2d with padding_mode={owner.padding_mode!r} are not supported")
    return {"stride": owner.stride, "padding": owner.padding, "dilation": owner.dilation}
