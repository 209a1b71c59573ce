"""
Expert deltas on the shared model's parameters, one mixture per row: y_b = W x_b + sum_t w[b,t] up_t (down_t x_b).

A delta module holds all experts' factors of one parameter, side by side, and is reached through its own forward only,
so that offloading and deepcopy work. Hooks add its output to that of the module that owns the parameter.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .mix_twin_merging import CallWeights, ExpertMix


def delta_key(parameter_name: str) -> str:
    """Name of a parameter's delta module (module names cannot contain dots)."""
    return parameter_name.replace(".", "-")


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


class FactoredDelta(nn.Module):
    """
    Low-rank deltas of one parameter seen as a matrix [m, n]: delta_t = up[:, t] @ down[t].

    Args:
        ranks: rank of each expert's delta; column blocks of `up` [m, sum(ranks)], row blocks of `down` [sum(ranks), n].
    """

    def __init__(self, ranks: list, m: int, n: int):
        super().__init__()
        self.ranks = tuple(ranks)
        self.down = nn.Parameter(torch.empty(sum(ranks), n))
        self.up = nn.Parameter(torch.empty(m, sum(ranks)))

    def coefficients(self, call: CallWeights, x: torch.Tensor) -> torch.Tensor:
        columns = call.columns(self.ranks)
        return columns.to(device=self.up.device, dtype=self.up.dtype)


class LinearDelta(FactoredDelta):
    """`nn.Linear` weight [out, in]."""

    def forward(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        h = F.linear(x.to(self.down.dtype), self.down)
        return F.linear(h * rows_like(self.coefficients(call, x), x), self.up)


class Conv1DDelta(FactoredDelta):
    """Transformers' `Conv1D` weight [in, out]."""

    def forward(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        h = x.to(self.up.dtype) @ self.up
        return (h * rows_like(self.coefficients(call, x), x)) @ self.down


class EmbeddingDelta(FactoredDelta):
    """`nn.Embedding` weight [vocabulary, hidden]."""

    def forward(self, ids: torch.Tensor, call: CallWeights) -> torch.Tensor:
        # One-dimensional ids are positions shared by all rows: each row gets its own table entries.
        h = F.embedding(ids if ids.dim() > 1 else ids[None], self.up)
        return (h * rows_like(self.coefficients(call, h), h)) @ self.down


class Conv2dDelta(FactoredDelta):
    """`nn.Conv2d` weight [out, in * kh * kw]: a k x k convolution to rank channels, then a 1 x 1 convolution."""

    def __init__(self, ranks: list, weight_shape: torch.Size, stride, padding, dilation, padding_mode: str):
        super().__init__(ranks, weight_shape[0], weight_shape[1:].numel())
        self.kernel_shape = tuple(weight_shape[1:])
        self.settings = {"stride": stride, "padding": padding, "dilation": dilation}
        if padding_mode != "zeros":
            raise ValueError(f"deltas of a Conv2d with padding_mode={padding_mode!r} are not supported")

    def forward(self, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        kernel = self.down.reshape(-1, *self.kernel_shape)
        h = F.conv2d(x.to(kernel.dtype), kernel, **self.settings)  # [rows, rank, height, width]
        h = h * rows_like(self.coefficients(call, h), h, feature_dims=3)[..., None, None]
        return F.conv2d(h, self.up[..., None, None])


class TableDelta(FactoredDelta):
    """A bare parameter [1, m, n], such as ViT's position embeddings: returns per-row deltas [batch, m, n]."""

    def forward(self, call: CallWeights) -> torch.Tensor:
        coefficients = self.coefficients(call, self.up)  # [batch, rank]
        return (self.up[None] * coefficients[:, None, :]) @ self.down


class ExactDelta(nn.Module):
    """Deltas of a vector (bias, norm, class token), kept exactly: `delta` [expert, *shape] -> [batch, *shape]."""

    def __init__(self, experts: int, shape: tuple):
        super().__init__()
        self.delta = nn.Parameter(torch.empty(experts, *shape))

    def forward(self, call: CallWeights) -> torch.Tensor:
        weights = call.weights.to(device=self.delta.device, dtype=self.delta.dtype)
        return torch.tensordot(weights, self.delta, dims=1)


def is_rms_norm(module: nn.Module) -> bool:
    """True for root-mean-square norms; a build's final probe proves that the rule fits the module at hand."""
    return "RMSNorm" in type(module).__name__ and [name for name, _ in module.named_parameters()] == ["weight"]


def delta_rule(owner: nn.Module, attribute: str, parameter: torch.Tensor) -> str | None:
    """
    Name the rule by which a parameter's delta can act per row, or None if there is none.

    Rules hold for exact types: a subclass may compute something else in its forward.
    """
    kind = type(owner)
    if attribute == "bias" and kind in (nn.Linear, Conv1D, nn.Conv2d, nn.LayerNorm):
        return "bias"
    if attribute == "weight":
        if kind is nn.Linear:
            return "linear"
        if kind is Conv1D:
            return "conv1d"
        if kind is nn.Embedding and owner.max_norm is None:
            return "embedding"
        if kind is nn.Conv2d and owner.groups == 1 and owner.padding_mode == "zeros":
            return "conv2d"
        if kind is nn.LayerNorm:
            return "layer_norm"
        if is_rms_norm(owner):
            return "rms_norm"
        return None
    if not isinstance(owner, (nn.Linear, nn.Conv2d, nn.Embedding)) and parameter.dim() == 3 and parameter.shape[0] == 1:
        return "table"
    return None


def is_vector(shape: torch.Size) -> bool:
    """True for parameters whose delta is stored exactly: one dimension, or a single token [1, 1, n] of a table."""
    return len(shape) == 1 or (len(shape) == 3 and shape[0] == 1 and 1 in shape[1:])


def new_delta(rule: str, owner: Any, parameter: torch.Tensor, experts: int, ranks: list | None) -> nn.Module:
    """Make the (uninitialised) delta module for one parameter."""
    if ranks is None:
        return ExactDelta(experts, tuple(parameter.shape))
    if rule == "conv2d":
        return Conv2dDelta(
            ranks, parameter.shape, owner.stride, owner.padding, owner.dilation, padding_mode=owner.padding_mode
        )
    kinds = {"linear": LinearDelta, "conv1d": Conv1DDelta, "embedding": EmbeddingDelta, "table": TableDelta}
    if rule not in kinds:
        raise ValueError(f"a delta by rule {rule!r} cannot be factored")
    m, n = parameter.shape[-2:]
    return kinds[rule](ranks, m, n)


class DeltaHook:
    """Forward hook of one module: adds the deltas of its parameters. Holds modules, not closures (deepcopy, pickle)."""

    def __init__(self, mix: ExpertMix):
        self.mix = mix
        self.terms: dict = {}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor):
        call = self.mix.current()
        if call is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        for rule, delta in self.terms.items():
            term = _TERMS[rule](module, x, output, delta, call)
            output = output + term.to(device=output.device, dtype=output.dtype)
        return output


def _module_term(module, x, output, delta, call):
    return delta(x, call)


def _bias_term(module, x, output, delta, call):
    bias = delta(call)
    if type(module) is nn.Conv2d:
        return rows_like(bias, output, feature_dims=3)[..., None, None]
    return rows_like(bias, output)


def _layer_norm_term(module, x, output, delta, call):
    # From the input again: dividing the output by the scale would fail where the scale is zero.
    normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return normed * rows_like(delta(call), x).to(x.device)


def _rms_norm_term(module, x, output, delta, call):
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # torch's own RMSNorm leaves it open
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed * rows_like(delta(call), x).to(x.device)


_TERMS = {
    "linear": _module_term,
    "conv1d": _module_term,
    "embedding": _module_term,
    "conv2d": _module_term,
    "bias": _bias_term,
    "layer_norm": _layer_norm_term,
    "rms_norm": _rms_norm_term,
}


class PerRowParameters:
    """
    Stands in for a module's forward where a bare parameter is used inside it (class token, position table).

    Runs the class's own forward on a shallow shell of the module whose parameters carry one row per batch row.
    The module itself is never changed, so threads do not meet.
    """

    def __init__(self, module: nn.Module, mix: ExpertMix):
        self.module, self.mix = module, mix
        self.deltas: dict = {}

    def __call__(self, *args, **kwargs):
        module, call = self.module, self.mix.current()
        if call is None:
            return type(module).forward(module, *args, **kwargs)
        per_row = {}
        for attribute, delta in self.deltas.items():
            parameter: Any = module._parameters[attribute]
            per_row[attribute] = parameter + delta(call).to(device=parameter.device, dtype=parameter.dtype).reshape(
                -1, *parameter.shape[1:]
            )
        return type(module).forward(self._shell(per_row), *args, **kwargs)

    def _shell(self, parameters: dict) -> nn.Module:
        shell = object.__new__(type(self.module))
        shell.__dict__.update(self.module.__dict__)
        shell.__dict__["_parameters"] = {**self.module._parameters, **parameters}
        if hasattr(type(self.module), "interpolate_pos_encoding"):
            shell.__dict__["interpolate_pos_encoding"] = RowByRowInterpolation(self, parameters)
        return shell

    def row_shell(self, parameters: dict, b: int) -> Any:
        """The module with the parameters of one row, and its own interpolation."""
        shell = self._shell({name: value[b : b + 1] for name, value in parameters.items()})
        shell.__dict__.pop("interpolate_pos_encoding", None)
        return shell


class RowByRowInterpolation:
    """Stands in for a module's interpolation of its position table, which knows tables of one row only."""

    def __init__(self, owner: PerRowParameters, parameters: dict):
        self.owner, self.parameters = owner, parameters

    def __call__(self, embeddings: torch.Tensor, *size, **named):
        count = next(iter(self.parameters.values())).shape[0]
        rows = [
            self.owner.row_shell(self.parameters, b).interpolate_pos_encoding(embeddings[:1], *size, **named)
            for b in range(count)
        ]
        return torch.cat(rows, dim=0)


def attach_deltas(model: nn.Module, mix: ExpertMix, ranks: dict, exact: list, experts: int) -> nn.ModuleDict:
    """
    Create the delta modules of `ranks` and `exact` and hook them to the modules of `model` that own the parameters.

    Returns:
        `nn.ModuleDict` of delta modules by `delta_key`. The caller registers it; `model`'s own keys do not change.

    Raises:
        ValueError: a parameter is missing, tied in a way that no rule covers, or of a kind that has no rule.
    """
    deltas = nn.ModuleDict()
    hooks: dict = {}
    owners = parameter_owners(model)
    for name in [*ranks, *exact]:
        if name not in owners:
            raise ValueError(f"the config has a delta for {name!r}, but the shared model has no such parameter")
        holders, parameter = owners[name]
        delta = None
        for owner, attribute in holders:
            rule = delta_rule(owner, attribute, parameter)
            if rule is None:
                raise ValueError(f"no rule lets a delta of {name!r} ({type(owner).__name__}) act per row")
            if delta is None:
                delta = new_delta(rule, owner, parameter, experts, ranks.get(name))
                deltas[delta_key(name)] = delta
            _attach(hooks, owner, attribute, rule, delta, mix)
    return deltas


def _attach(hooks: dict, owner: Any, attribute: str, rule: str, delta: nn.Module, mix: ExpertMix) -> None:
    if rule == "table":
        if not isinstance(owner.__dict__.get("forward"), PerRowParameters):
            owner.forward = PerRowParameters(owner, mix)
        owner.forward.deltas[attribute] = delta
        return
    if id(owner) not in hooks:
        hooks[id(owner)] = DeltaHook(mix)
        owner.register_forward_hook(hooks[id(owner)], with_kwargs=True)
    hooks[id(owner)].terms[rule] = delta


def parameter_owners(model: nn.Module) -> dict:
    """Map each parameter's first name to ([(module, attribute), ...], parameter); tied ones have several holders."""
    first_name: dict = {}
    owners: dict = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = first_name.setdefault(id(parameter), f"{path}.{attribute}" if path else attribute)
            owners.setdefault(name, ([], parameter))[0].append((module, attribute))
    return owners
