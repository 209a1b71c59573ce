"""
Linear layers with experts: y_b = (W + sum_t w[b, t] up_t down_t) x_b, by factors, by gathered factors, or by a merged W.

This is where a model spends its time. Bias and expert term are added inside the products wherever that can be done: a pass
over the output costs as much as a product of thirty ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .call_twin_merging import CallWeights
from .mix_twin_merging import ExpertMix
from .sparse_twin_merging import SparseDelta


class MatrixForward:
    """
    Stands in for the forward of an `nn.Linear` or `Conv1D` whose weight has a delta (its bias may have one too).

    Holds modules, not closures: copies and pickles survive, and whatever wraps a module's forward (offloading) still does.
    """

    def __init__(self, module: nn.Module, mix: ExpertMix):
        self.module, self.mix = module, mix
        self.transposed = type(module) is not nn.Linear  # Conv1D keeps its weight as [in, out]
        self.opaque = False
        self.weight: Any = None
        self.bias: Any = None

    def take(self, module: nn.Module) -> None:
        """Stand in for another module that computes the same; how it keeps its weight is its own affair."""
        self.module, self.opaque = module, True

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        module, call = self.module, self.mix.current()
        if call is None:
            return type(module).forward(module, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if call.method == "materialised" and not call.parts:
            return self._materialised(x, call)  # one matrix for all rows, however they are folded
        rows = as_rows(x, call.weights.shape[0])
        output = self._parts(rows, call)
        return output.view(max(x.shape[0], rows.shape[0]) if x.dim() > 1 else -1, *x.shape[1:-1], output.shape[-1])

    def _parts(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        """[batch, token, in] -> [batch, token, out], each group of rows by its own method."""
        if not call.parts:
            return getattr(self, f"_{call.method}")(x, call)
        output: Any = None
        for part in call.parts:
            mine = self._parts(x[part.rows], part.call)
            output = mine.new_empty(*x.shape[:2], mine.shape[-1]) if output is None else output
            output[part.rows] = mine
        return output

    # ---- methods: [rows, token, in] -> [rows, token, out] -----------------------------------------------------

    def _plain(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        module: Any = self.module
        return type(module).forward(module, x)

    def _factored(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        if isinstance(self.weight, SparseDelta):
            return self._base(x, self._row_bias(call)) + self.weight(x, call)
        shrink, expand, columns = self._factors(x, call)
        h = x.to(shrink.dtype).flatten(0, 1) @ shrink
        h = times(h.view(*x.shape[:2], -1), columns[:, None]).flatten(0, 1)
        output = self._base(x, self._row_bias(call))
        return add_product(output.flatten(0, 1), h, expand).view(output.shape)

    def _gathered(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        dtype, device = self._dtype(x), x.device
        index, columns = call.gathering(self.weight.ranks, device)
        up, down, scale = self.weight(dtype, index.flatten())
        up, down = up.to(device), down.to(device)
        up = up.view(up.shape[0], *index.shape).permute(1, 2, 0)  # [rows, rank, m]
        down = down.view(*index.shape, -1)  # [rows, rank, n]
        columns = columns if scale is None else columns * scale.to(device).view(index.shape)
        shrink, expand = (up, down) if self.transposed else (down, up)
        h = times(torch.bmm(x.to(dtype), shrink.transpose(1, 2)), columns.to(dtype)[:, None])
        return add_product(self._base(x, self._row_bias(call)), h, expand)

    def _materialised(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        weight, bias = call.kept((id(self), "merged"), lambda: self._merged(call))
        bias = bias if bias.numel() else None
        if self.transposed:
            weight = weight.T
        return F.linear(x, weight, bias)

    # ---- what they are made of --------------------------------------------------------------------------------

    def _dtype(self, x: torch.Tensor) -> torch.dtype:
        return self.weight.factor_dtype(x)

    def _factors(self, x: torch.Tensor, call: CallWeights) -> tuple:
        """`shrink` [in, rank], `expand` [rank, out] and what multiplies each row between them [rows, rank]."""
        dtype, delta, device = self._dtype(x), self.weight, x.device

        def make():
            factors = delta(dtype, call.places(delta.ranks, device))
            shrink, expand = (factors.up, factors.down) if self.transposed else (factors.down.T, factors.up.T)
            return shrink.to(device), expand.to(device), factors.scaled(call.columns(delta.ranks, device)).to(device)

        return call.kept((id(self), "factors", dtype), make, delta)

    def _row_bias(self, call: CallWeights) -> torch.Tensor | None:
        """What the experts add to the bias, [rows, out] or, the same for all, [1, out]."""
        if self.bias is None:
            return None
        return call.kept_vector((id(self), "bias"), lambda: self.bias(call))

    def _base(self, x: torch.Tensor, row_bias: torch.Tensor | None) -> torch.Tensor:
        """What the module computes without its weight's delta."""
        module: Any = self.module
        if row_bias is None:
            return type(module).forward(module, x)
        if self.opaque:
            plain = type(module).forward(module, x)
            return plain + row_bias[:, None].to(plain)
        weight = module.weight if self.transposed else module.weight.T
        row_bias = row_bias.to(x.device)
        bias = row_bias if module.bias is None else module.bias + row_bias
        if len(bias) == 1:
            return F.linear(x, weight.T, bias[0].to(x.dtype))
        if not fusible(x, weight, bias):
            plain = x @ weight
            return plain + bias[:, None].to(plain.dtype)
        if x.shape[1] == 1:
            return torch.addmm(bias, x[:, 0], weight)[:, None]
        if not overwritable():
            return torch.baddbmm(bias[:, None], x, weight.expand(len(x), -1, -1))
        output = bias[:, None].expand(*x.shape[:2], -1).contiguous()
        add_product(output.view(-1, output.shape[-1]), x.flatten(0, 1), weight)
        return output

    def _merged(self, call: CallWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias (empty: none) of the one row of weights in `call`, in the module's own layout and type."""
        module, delta = self.module, self.weight
        own: Any = module.weight
        if isinstance(delta, SparseDelta):
            weight = delta.merged(call, own)
        else:
            device = own.device
            up, down, scale = delta(torch.promote_types(own.dtype, self._dtype(own)), call.places(delta.ranks, device))
            columns = call.columns(delta.ranks, device)[0]
            columns = columns if scale is None else columns * scale.to(device)
            weight = torch.addmm(own.to(up.dtype), up.to(device) * columns.to(up.dtype), down.to(device)).to(own.dtype)
        bias: Any = module.bias
        if self.bias is not None:
            added = self.bias(call)[0].to(own.device)
            bias = added if bias is None else bias + added
        return weight, own.new_empty(0) if bias is None else bias


def as_rows(x: torch.Tensor, batch: int) -> torch.Tensor:
    """
    [batch, token, feature] of an input whose first dimension is 1 (broadcast), `batch`, or `batch * k` (row by row).

    Raises:
        ValueError: its rows cannot be matched with expert weights.
    """
    if x.shape[0] == 1 and x.dim() > 1:
        x = x.expand(batch, *x.shape[1:])
    if x.dim() < 2 or x.shape[0] % batch:
        raise ValueError(
            f"a module got {x.shape[0]} rows where the batch has {batch}; its rows cannot be matched with expert weights"
        )
    return x.reshape(batch, -1, x.shape[-1])


def fusible(*tensors: torch.Tensor) -> bool:
    """Whether the tensors can meet in one product: of one type, which no autocast changes."""
    kind = tensors[0].dtype
    return all(tensor.dtype == kind for tensor in tensors) and not torch.is_autocast_enabled(tensors[0].device.type)


def overwritable() -> bool:
    """Whether intermediate results may be written over: nobody records a graph or gradients."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def times(h: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`h * columns`, over `h` where that may be done."""
    return h.mul_(columns) if overwritable() and fusible(h, columns) else h * columns


def add_product(output: torch.Tensor, h: torch.Tensor, expand: torch.Tensor) -> torch.Tensor:
    """
    `output + h @ expand`, of matrices or batches of them, over `output` where that may be done.

    The sum over experts and the addition happen in one product, which accumulates in float32 in narrower types too.
    """
    if not fusible(output, h, expand):
        return output + (h @ expand).to(output.dtype)
    if overwritable():
        # Not `addmm_`: counters of operations know the names below only.
        product = torch.addmm if h.dim() == 2 else torch.baddbmm
        return product(output, h, expand, out=output)
    return torch.addmm(output, h, expand) if h.dim() == 2 else torch.baddbmm(output, h, expand)
