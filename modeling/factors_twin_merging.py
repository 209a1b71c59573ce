"""
Modules that hold all experts' deltas of one parameter: low-rank factors in floats or packed integers, or exact vectors.

They say what the deltas are; `matrices_twin_merging` and `deltas_twin_merging` let them act. Whoever needs a delta calls
the module, and reads no tensor of it: under offloading the tensors are there only while the module is called.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .call_twin_merging import CallWeights


INTEGER_BITS = {"int8": 8, "int4": 4}


def rows_like(columns: torch.Tensor, x: torch.Tensor, feature_dims: int = 1) -> torch.Tensor:
    """
    Shape per-row values [batch, n] so that they multiply an [rows, ..., n] tensor computed from `x`.

    `x` has one row (broadcast), `batch` rows, or `batch * k` rows that follow each other row by row. One row of values
    is for all rows of `x`.
    """
    batch, rows = columns.shape[0], x.shape[0]
    if batch > 1 and rows not in (1, batch):
        if rows % batch:
            raise ValueError(
                f"a module got {rows} rows where the batch has {batch}; its rows cannot be matched with expert weights"
            )
        columns = columns.repeat_interleave(rows // batch, dim=0)
    return columns.reshape(columns.shape[0], *([1] * (x.dim() - 1 - feature_dims)), *columns.shape[1:])


def pack_nibbles(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Pack integers in -8..7 two to a byte along `dim`: the even place low, each plus 8; an odd length ends in 0."""
    nibbles = (values.to(torch.int16) + 8).transpose(0, dim)
    if nibbles.shape[0] % 2:
        nibbles = torch.cat([nibbles, torch.full_like(nibbles[:1], 8)])
    return (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8).transpose(0, dim).contiguous()


def unpack_nibbles(packed: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Undo `pack_nibbles`: int8 values in -8..7, `length` of them along `dim`."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=dim + 1).flatten(dim, dim + 1)
    return pairs.narrow(dim, 0, length).to(torch.int8) - 8


def take(tensor: torch.Tensor, dim: int, places: Any) -> torch.Tensor:
    """Entries of a tensor along `dim`: all (None; the tensor itself), a slice (a view) or indices (a copy)."""
    if not torch.is_grad_enabled():
        tensor = tensor.detach()  # tools that watch modules take a parameter among outputs for one with gradients
    if places is None or (isinstance(places, slice) and places == slice(0, tensor.shape[dim])):
        return tensor
    if isinstance(places, slice):
        return tensor.narrow(dim, places.start, places.stop - places.start)
    return tensor.index_select(dim, places.to(tensor.device))


class Factors(NamedTuple):
    """Factors as floats: `up` [m, rank] (or its rows [*ids, rank]), `down` [rank, n], `scale` [rank] of integers, or None."""

    up: torch.Tensor
    down: torch.Tensor
    scale: torch.Tensor | None

    def scaled(self, columns: torch.Tensor) -> torch.Tensor:
        """What multiplies each rank direction of each row [batch, rank]: expert weight, times scale if any."""
        columns = columns.to(self.down.device)
        return (columns if self.scale is None else columns.float() * self.scale).to(self.down.dtype)


class FactoredDelta(nn.Module):
    """
    Low-rank deltas of one parameter seen as a matrix [m, n]: delta_t = up[:, t] @ down[t].

    Integer storage keeps `up` and `down` as fixed-point fractions, q / 2**(bits - 1), with one scale for each rank
    direction: delta_t = (up[:, t] * scale[t]) @ down[t]. Powers of two divide exactly in every float type, and the
    fractions stay below 1, so that half precision does not overflow. They are buffers: nothing about them can be trained.

    Args:
        ranks: rank of each expert's delta; column blocks of `up` [m, sum(ranks)], row blocks of `down` [sum(ranks), n].
        storage: a float type (then the factors are parameters of the model's dtype), `int8`, or `int4` (two values a
            byte along m of `up` and along n of `down`).
    """

    scale: torch.Tensor

    def __init__(self, ranks: list, m: int, n: int, storage: str = "float32"):
        super().__init__()
        self.ranks, self.m, self.n = tuple(ranks), m, n
        self.bits = INTEGER_BITS.get(storage)
        total = sum(ranks)
        if self.bits is None:
            self.down = nn.Parameter(torch.empty(total, n))
            self.up = nn.Parameter(torch.empty(m, total))
            return
        self.unit = 2.0 ** (1 - self.bits)
        kind, each = (torch.int8, 1) if self.bits == 8 else (torch.uint8, 2)
        self.register_buffer("down", torch.zeros(total, -(-n // each), dtype=kind))
        self.register_buffer("up", torch.zeros(-(-m // each), total, dtype=kind))
        self.register_buffer("scale", torch.zeros(total))

    def factor_dtype(self, x: torch.Tensor | None = None) -> torch.dtype:
        """Type in which the factors act on `x`: their own, or for integers that of `x`, else of the scale."""
        if self.bits is None:
            return self.up.dtype
        return x.dtype if x is not None and x.is_floating_point() else self.scale.dtype

    def up_matrix(self, dtype: torch.dtype, places: Any = None) -> torch.Tensor:
        """`up` [m, rank] in a float type, of all rank columns or those of `places`; for integers without the scale."""
        up = take(self.up, 1, places)
        if self.bits is None:
            return up.to(dtype)
        return (up if self.bits == 8 else unpack_nibbles(up, 0, self.m)).to(dtype) * self.unit

    def down_matrix(self, dtype: torch.dtype, places: Any = None) -> torch.Tensor:
        """`down` [rank, n] in a float type, of all rank rows or those of `places`; for integers without the scale."""
        down = take(self.down, 0, places)
        if self.bits is None:
            return down.to(dtype)
        return (down if self.bits == 8 else unpack_nibbles(down, 1, self.n)).to(dtype) * self.unit

    def up_rows(self, ids: torch.Tensor, places: Any = None) -> torch.Tensor:
        """Rows of `up` [*ids, rank], unpacked after the look-up: a vocabulary's table is never unpacked as a whole."""
        if self.bits is None:
            return take(F.embedding(ids, self.up), -1, places)
        if self.bits == 8:
            return take(self.up[ids], -1, places).to(self.factor_dtype()) * self.unit
        pairs = take(self.up[ids // 2], -1, places)
        nibbles = torch.where((ids % 2 == 1)[..., None], pairs >> 4, pairs & 15)
        return (nibbles.to(torch.int8) - 8).to(self.factor_dtype()) * self.unit

    def forward(self, dtype: torch.dtype, places: Any = None, ids: torch.Tensor | None = None) -> Factors:
        """
        The factors as floats of type `dtype`.

        Args:
            places: which rank columns (a slice or indices); None: all.
            ids: rows of `up` to look up, in the place of the whole matrix.
        """
        up = self.up_matrix(dtype, places) if ids is None else self.up_rows(ids, places).to(dtype)
        scale = None if self.bits is None else take(self.scale, 0, places).float()
        return Factors(up, self.down_matrix(dtype, places), scale)


class ExactDelta(nn.Module):
    """
    Deltas of a vector (bias, norm, class token), kept exactly: `delta` [expert, *shape] -> [batch, *shape].

    Where a call's rows have the same weights: [1, *shape].
    """

    def __init__(self, experts: int, shape: tuple):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(experts, *shape))

    def forward(self, call: CallWeights) -> torch.Tensor:
        delta: torch.Tensor = self.delta
        weights = call.vector_weights.to(device=delta.device, dtype=delta.dtype)
        if call.experts is not None:
            places = call.places((1,) * len(delta), delta.device)
            weights, delta = take(weights, 1, places), take(delta, 0, places)
        return (weights @ delta.flatten(1)).view(-1, *delta.shape[1:])
