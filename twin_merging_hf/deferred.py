"""
Models whose weights are made when a module reads them: float32 arithmetic on a model that would not fit in float32.

Used where a build compares a large model with others: at any moment one matrix is in memory in float32, the rest lies in
files in its own type. It computes the same numbers as the model in float32, only later.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights


_SMALL = 1 << 14
"""Tensors of fewer entries are made at once."""


class Deferred(torch.Tensor):
    """
    A tensor of float32 that `make` gives anew for every operation that reads it. Nothing can be written into it.

    Args:
        shape: of what `make` gives.
        make: gives the tensor, float32.
    """

    make: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, shape: torch.Size, make: Callable[[], torch.Tensor]) -> "Deferred":
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.make = make
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):  # type: ignore[override]
        if operation in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].shape, args[0].make)
        made_args, made_kwargs = tree_map_only(Deferred, lambda tensor: tensor.make(), (args, kwargs or {}))
        return operation(*made_args, **made_kwargs)


def deferred(shape: torch.Size, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gives: a `Deferred`, or of small tensors the tensor itself."""
    return make() if shape.numel() < _SMALL else Deferred(shape, make)


def empty_model(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose weights have room and no values, so that they cost no memory until something is put there."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with no_init_weights():
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def put(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[str]:
    """
    Let tensors take the place of a model's, themselves and not copies; tied ones follow.

    Returns:
        Names of the model's tensors that got none (those that are tied to others left out).

    Raises:
        RuntimeError: a name that the model does not have.
    """
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected:
        raise RuntimeError(f"{type(model).__name__} has no {unexpected[:3]}")
    model.tie_weights()
    return [name for name in missing if name not in model.all_tied_weights_keys]


def widened(model: nn.Module) -> nn.Module:
    """The same model, in place, with all floating-point tensors as float32 that is made when it is read."""
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float32:
                    continue
                if id(tensor) not in known:
                    narrow = tensor.detach()
                    wide = deferred(narrow.shape, narrow.float)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = nn.Parameter(wide, requires_grad=False) if is_parameter else wide
                tensors[name] = known[id(tensor)]  # type: ignore[assignment]
    return model
