"""
Modules that hold all experts' deltas of one parameter: low-rank factors in floats or packed integers, or exact vectors.

Each applies its deltas to an input, one mixture per row: sum_t w[b, t] * up_t (down_t x_b). No mixture is ever formed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mix_twin_merging import CallWeights


INTEGER_BITS = {"int8": 8, "int4": 4}


def rows_like(columns: torch.Tensor, x: torch.Tensor, feature_dims: int = 1) -> torch.Tensor:
    """
    Shape per-row values [batch, n] so that they multiply an [rows, ..., n] tensor computed from `x`.

    `x` has one row (broadcast), `batch` rows, or `batch * k` rows that follow each other row by row.
    """
    batch, rows = columns.shape[0], x.shape[0]
    if rows not in (1, batch):
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

    def up_matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """`up` [m, rank] in a float type; for integers without the scale."""
        if self.bits is None:
            return self.up.to(dtype)
        return (self.up if self.bits == 8 else unpack_nibbles(self.up, 0, self.m)).to(dtype) * self.unit

    def down_matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """`down` [rank, n] in a float type; for integers without the scale."""
        if self.bits is None:
            return self.down.to(dtype)
        return (self.down if self.bits == 8 else unpack_nibbles(self.down, 1, self.n)).to(dtype) * self.unit

    def up_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of `up` [*ids, rank], unpacked after the look-up: a vocabulary's table is never unpacked as a whole."""
        if self.bits is None:
            return F.embedding(ids, self.up)
        if self.bits == 8:
            return self.up[ids].to(self.factor_dtype()) * self.unit
        pairs = self.up[ids // 2]
        nibbles = torch.where((ids % 2 == 1)[..., None], pairs >> 4, pairs & 15)
        return (nibbles.to(torch.int8) - 8).to(self.factor_dtype()) * self.unit

    def coefficients(self, call: CallWeights, dtype: torch.dtype) -> torch.Tensor:
        """What multiplies each rank direction of each row [batch, sum(ranks)]: expert weight, times scale if any."""
        columns = call.columns(self.ranks).to(device=self.up.device)
        if self.bits is not None:
            columns = columns.float() * self.scale.float()
        return columns.to(dtype)

    def as_linear(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        """What the deltas add to x W^T, for a weight W [m, n]."""
        dtype = self.factor_dtype(x)
        h = F.linear(x.to(dtype), self.down_matrix(dtype))
        return F.linear(h * rows_like(self.coefficients(call, dtype), x), self.up_matrix(dtype))


class LinearDelta(FactoredDelta):
    """`nn.Linear` weight [out, in]."""

    def forward(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        return self.as_linear(x, call)


class Conv1DDelta(FactoredDelta):
    """Transformers' `Conv1D` weight [in, out]."""

    def forward(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        dtype = self.factor_dtype(x)
        h = x.to(dtype) @ self.up_matrix(dtype)
        return (h * rows_like(self.coefficients(call, dtype), x)) @ self.down_matrix(dtype)


class EmbeddingDelta(FactoredDelta):
    """`nn.Embedding` weight [vocabulary, hidden]; also as the weight of the output layer that is tied to it."""

    def forward(self, ids: torch.Tensor, call: CallWeights) -> torch.Tensor:
        if ids.is_floating_point():  # hidden states: the output layer
            return self.as_linear(ids, call)
        # One-dimensional ids are positions shared by all rows: each row gets its own table entries.
        h = self.up_rows(ids if ids.dim() > 1 else ids[None])
        dtype = self.factor_dtype()
        return (h * rows_like(self.coefficients(call, dtype), h)) @ self.down_matrix(dtype)


class Conv2dDelta(FactoredDelta):
    """`nn.Conv2d` weight [out, in * kh * kw]: a k x k convolution to rank channels, then a 1 x 1 convolution."""

    def __init__(self, ranks: list, weight_shape: torch.Size, settings: dict, storage: str = "float32"):
        super().__init__(ranks, weight_shape[0], weight_shape[1:].numel(), storage)
        self.kernel_shape = tuple(weight_shape[1:])
        self.settings = settings

    def forward(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        dtype = self.factor_dtype(x)
        kernel = self.down_matrix(dtype).reshape(-1, *self.kernel_shape)
        h = F.conv2d(x.to(dtype), kernel, **self.settings)  # [rows, rank, height, width]
        h = h * rows_like(self.coefficients(call, dtype), h, feature_dims=3)[..., None, None]
        return F.conv2d(h, self.up_matrix(dtype)[..., None, None])


class TableDelta(FactoredDelta):
    """A bare parameter [1, m, n], such as ViT's position embeddings: returns per-row deltas [batch, m, n]."""

    def forward(self, call: CallWeights) -> torch.Tensor:
        dtype = self.factor_dtype()
        coefficients = self.coefficients(call, dtype)  # [batch, rank]
        return (self.up_matrix(dtype)[None] * coefficients[:, None, :]) @ self.down_matrix(dtype)


class ExactDelta(nn.Module):
    """Deltas of a vector (bias, norm, class token), kept exactly: `delta` [expert, *shape] -> [batch, *shape]."""

    def __init__(self, experts: int, shape: tuple):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(experts, *shape))

    def forward(self, call: CallWeights) -> torch.Tensor:
        weights = call.weights.to(device=self.delta.device, dtype=self.delta.dtype)
        return torch.tensordot(weights, self.delta, dims=1)
