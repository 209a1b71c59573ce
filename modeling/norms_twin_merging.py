"""Norms with experts: scale and shift of each row are shared + sum_t w[b, t] delta_t, in the norm's own computation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .architectures_twin_merging import shell_of
from .call_twin_merging import CallWeights
from .factors_twin_merging import rows_like
from .mix_twin_merging import ExpertMix


class NormForward:
    """
    Stands in for the forward of an `nn.LayerNorm` or a root-mean-square norm whose parameters have deltas.

    Nothing divides by the scale, which may be zero. Holds modules, not closures: copies and pickles survive.
    """

    def __init__(self, module: nn.Module, mix: ExpertMix):
        self.module, self.mix = module, mix
        self.weight: Any = None
        self.bias: Any = None

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        module: Any = self.module
        call = self.mix.current()
        if call is None:
            return type(module).forward(module, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        scale, shift = self._vector("weight", call), self._vector("bias", call)
        if scale is not None and len(scale) > 1 or shift is not None and len(shift) > 1:
            return self._rows(x, scale, shift)
        scale, shift = (None if vector is None else vector[0] for vector in (scale, shift))
        if type(module) is nn.LayerNorm:
            return F.layer_norm(x, module.normalized_shape, scale, shift, module.eps)
        return self._with_scale(x, scale)

    def _vector(self, name: str, call: CallWeights) -> torch.Tensor | None:
        """Scale or shift of each row [batch, n], or of all rows [1, n]; None where the module has none."""
        own: Any = self.module._parameters.get(name)
        delta = getattr(self, name)
        if delta is None:
            return None if own is None else own[None]
        return call.kept_vector((id(self), name), lambda: own + delta(call).to(device=own.device, dtype=own.dtype))

    def _rows(self, x: torch.Tensor, scale: Any, shift: Any) -> torch.Tensor:
        module: Any = self.module
        scale, shift = (None if vector is None else rows_like(vector, x) for vector in (scale, shift))
        if type(module) is nn.RMSNorm:  # torch's own product takes vectors only
            return F.rms_norm(x, module.normalized_shape, None, module.eps) * scale
        if type(module) is not nn.LayerNorm:
            return self._with_scale(x, scale)
        normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if shift is None:
            return normed * scale
        return normed + shift if scale is None else torch.addcmul(shift, normed, scale)

    def _with_scale(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The module's own forward on a shallow shell of it that has another scale; the module itself never changes."""
        module = self.module
        shell = shell_of(module)
        shell.__dict__["_parameters"] = {**module._parameters, "weight": scale}
        return type(module).forward(shell, x)
