"""
Expert deltas on the shared model's parameters, one mixture per row: y_b = W x_b + sum_t w[b,t] up_t (down_t x_b).

A delta module holds all experts' deltas of one parameter, side by side, and is reached through its own forward only,
so that offloading and deepcopy work. Linear layers and norms get a forward that takes the deltas in; hooks add them to the
outputs of other modules.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .architectures_twin_merging import (
    CHILD_RULES,
    RMS_NORMS,
    LookedUpRows,
    PerRowRelativeBias,
    architecture_rule,
    shell_of,
)
from .channels_twin_merging import ChannelNormForward, StandardisedForward, channel_rule
from .factors_twin_merging import ExactDelta, FactoredDelta, rows_like
from .matrices_twin_merging import MatrixForward
from .mix_twin_merging import ExpertMix
from .norms_twin_merging import NormForward
from .sparse_twin_merging import SparseDelta
from .terms_twin_merging import convolution_settings, convolved, looked_up, tables


def delta_key(parameter_name: str) -> str:
    """Name of a parameter's delta module (module names cannot contain dots)."""
    return parameter_name.replace(".", "-")


def is_rms_norm(module: nn.Module) -> bool:
    """True for root-mean-square norms; a build's final probe proves that the rule fits the module at hand."""
    name = type(module).__name__
    known = "RMSNorm" in name or name in RMS_NORMS
    return known and [name for name, _ in module.named_parameters()] == ["weight"]


def delta_rule(owner: nn.Module, attribute: str, parameter: torch.Tensor) -> str | None:
    """
    Name the rule by which a parameter's delta can act per row, or None if there is none.

    Rules hold for exact types: a subclass may compute something else in its forward.
    """
    special = architecture_rule(owner, attribute) or channel_rule(owner, attribute)
    if special is not None:
        return special
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


_CONVOLUTIONS = ("conv2d", "standardised_conv2d")
_FACTORED = (
    *_CONVOLUTIONS, "linear", "conv1d", "embedding", "scaled_embedding", "looked_up_embedding", "table", "relative_bias",
)  # fmt: skip
_SPARSE = {
    "standardised_conv2d": "conv2d", "scaled_embedding": "embedding", "looked_up_embedding": "embedding",
    "relative_bias": "table",
}  # fmt: skip


def new_factored(rule: str, parameter: torch.Tensor, ranks: list, storage: str) -> nn.Module:
    """Make the (uninitialised) module of one parameter's factors; `storage` as in `FactoredDelta`."""
    if rule not in _FACTORED:
        raise ValueError(f"a delta by rule {rule!r} cannot be factored")
    m, n = (parameter.shape[0], parameter.shape[1:].numel()) if rule in _CONVOLUTIONS else parameter.shape[-2:]
    return FactoredDelta(ranks, m, n, storage)


def new_sparse(rule: str, owner: Any, parameter: torch.Tensor, counts: list) -> nn.Module:
    """Make the (uninitialised) module of one parameter's sparse deltas."""
    settings = convolution_settings(owner) if rule in _CONVOLUTIONS else {}
    return SparseDelta(_SPARSE.get(rule, rule), counts, tuple(parameter.shape), settings)


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


def _bias_term(module, x, output, delta, call):
    bias = delta(call)
    if isinstance(module, nn.Conv2d):
        return rows_like(bias, output, feature_dims=3)[..., None, None]
    return rows_like(bias, output)


def _embedding_term(module, ids, output, delta, call):
    return looked_up(delta, ids, call)


def _scaled_term(module, ids, output, delta, call):
    scale = module.embed_scale
    if isinstance(scale, torch.Tensor):  # Gemma rounds it to the type of its weights
        scale = scale.to(module.weight.dtype)
    return looked_up(delta, ids, call) * scale


def _conv2d_term(module, x, output, delta, call):
    return convolved(module, x, delta, call)


_TERMS = {
    "embedding": _embedding_term,
    "scaled_embedding": _scaled_term,
    "conv2d": _conv2d_term,
    "bias": _bias_term,
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
            delta_rows = tables(delta, call).to(device=parameter.device, dtype=parameter.dtype)
            per_row[attribute] = (parameter + delta_rows.reshape(-1, *parameter.shape[1:])).expand(
                call.weights.shape[0], *parameter.shape[1:]
            )
        return type(module).forward(self._shell(per_row), *args, **kwargs)

    def _shell(self, parameters: dict) -> nn.Module:
        shell = shell_of(self.module)
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


def attach_deltas(
    model: nn.Module,
    mix: ExpertMix,
    ranks: dict,
    exact: list,
    experts: int,
    storage: str = "float32",
    sparse: dict | None = None,
) -> nn.ModuleDict:
    """
    Create the delta modules of `ranks`, `exact` and `sparse` (entries of each expert, by parameter) and hook them to the
    modules of `model` that own the parameters; `storage` is that of the factors.

    Returns:
        `nn.ModuleDict` of delta modules by `delta_key`. The caller registers it; `model`'s own keys do not change.

    Raises:
        ValueError: a parameter is missing, tied in a way that no rule covers, or of a kind that has no rule.
    """
    sparse = sparse or {}
    deltas = nn.ModuleDict()
    hooks: dict = {}
    owners = parameter_owners(model)
    for name in [*ranks, *exact, *sparse]:
        if name not in owners:
            raise ValueError(f"the config has a delta for {name!r}, but the shared model has no such parameter")
        holders, parameter = owners[name]
        rules: list = [delta_rule(owner, attribute, parameter) for owner, attribute in holders]
        if None in rules:
            owner = holders[rules.index(None)][0]
            raise ValueError(f"no rule lets a delta of {name!r} ({type(owner).__name__}) act per row")
        # One delta for all holders of a tied parameter; that of an embedding serves an output layer too.
        first = next((place for place, rule in enumerate(rules) if str(rule).endswith("embedding")), 0)
        rule, owner = rules[first], holders[first][0]
        if name in ranks:
            delta = new_factored(rule, parameter, ranks[name], storage)
        elif name in sparse:
            delta = new_sparse(rule, owner, parameter, sparse[name])
        else:
            delta = ExactDelta(experts, tuple(parameter.shape))
        deltas[delta_key(name)] = delta
        for (owner, attribute), rule in zip(holders, rules, strict=True):
            _attach(hooks, owner, attribute, rule, delta, mix)
    return deltas


def stand_ins(model: nn.Module) -> dict:
    """What `attach_deltas` put in the place of linear layers' forwards, by the layer's path."""
    found = {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    return {path: forward for path, forward in found.items() if isinstance(forward, MatrixForward)}


def follow_replacements(model: nn.Module, attached: dict) -> None:
    """
    Attach the `stand_ins` again where a quantiser has put a module of its own in a linear layer's place.

    A wrapper that was put around the new module's forward since then (accelerate's, for offloading) stays around it.
    """
    for path, stand_in in attached.items():
        module: Any = model.get_submodule(path)
        if module is stand_in.module:
            continue
        stand_in.take(module)
        if "_old_forward" in module.__dict__:
            module._old_forward = stand_in
        else:
            module.forward = stand_in


_FORWARDS = {
    "linear": MatrixForward, "conv1d": MatrixForward, "layer_norm": NormForward, "rms_norm": NormForward,
    "channel_norm": ChannelNormForward, "standardised_conv2d": StandardisedForward,
}  # fmt: skip


def _attach(hooks: dict, owner: Any, attribute: str, rule: str, delta: nn.Module, mix: ExpertMix) -> None:
    if rule == "unread":
        return
    if rule == "looked_up_embedding":
        owner.forward = LookedUpRows(owner, mix, delta)
        return
    if rule == "relative_bias":
        owner.compute_bias = PerRowRelativeBias(owner, mix, delta)
        return
    if rule == "table":
        if not isinstance(owner.__dict__.get("forward"), PerRowParameters):
            owner.forward = PerRowParameters(owner, mix)
        owner.forward.deltas[attribute] = delta
        return
    if "forward" not in owner.__dict__ and (rule in _FORWARDS or type(owner) is nn.LayerNorm):
        owner.forward = _FORWARDS.get(rule, NormForward)(owner, mix)
    if rule in _FORWARDS or isinstance(owner.__dict__.get("forward"), (MatrixForward, NormForward)):
        setattr(owner.forward, attribute, delta)
        return
    if id(owner) not in hooks:
        hooks[id(owner)] = DeltaHook(mix)
        owner.register_forward_hook(hooks[id(owner)], with_kwargs=True)
    hooks[id(owner)].terms[rule] = delta


def parameter_owners(model: nn.Module) -> dict:
    """
    Map each parameter's first name to ([(module, attribute), ...], parameter); tied ones have several holders.

    Where a parent uses its child's weight in a way of its own (`CHILD_RULES`), (parent, child's name) is the holder.
    """
    parents = {
        id(getattr(module, child)): (module, child)
        for module in model.modules()
        for child in CHILD_RULES.get(type(module).__name__, {})
        if child in module._modules
    }
    # While a checkpoint is being loaded, parameters that will be tied are not yet the same object.
    tied: dict = getattr(model, "all_tied_weights_keys", None) or {}
    first_name: dict = {}
    owners: dict = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            own_name = f"{path}.{attribute}" if path else attribute
            name = first_name.setdefault(id(parameter), tied.get(own_name, own_name))
            holder = parents.get(id(module), (module, attribute))
            owners.setdefault(name, ([], parameter))[0].append(holder)
    return owners
