"""What is fitted in a layer: its parameters as a matrix, and its input as samples for that matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from twin_merging_hf.modeling.channels_twin_merging import is_channel_norm

from .normal_equations import ChannelEquations, NormalEquations


def is_fitted(module: nn.Module) -> bool:
    """
    Whether a module is linear in its parameters, given its (normalised) input: Linear, Conv1D, Conv2d, norms with scale and
    shift. Everything else keeps the mean of the experts: embeddings, RMSNorm, kernels that are standardised in each call.
    """
    kind = type(module)
    if kind is nn.Conv2d:
        return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    if _is_norm(module):
        return all(getattr(module, name) is not None for name in ("weight", "bias"))
    return kind in (nn.Linear, Conv1D)


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm or is_channel_norm(module)


def new_fit(module: nn.Module) -> "MatrixFit | NormFit":
    """The fit of a module for which `is_fitted` holds."""
    return NormFit(module) if _is_norm(module) else MatrixFit(module)


class MatrixFit:
    """Weight and bias of a linear layer or convolution, as one matrix [out, in] or [out, in + 1]."""

    def __init__(self, module: Any):
        self.module = module
        self.transposed = type(module) is Conv1D

    def equations(self) -> NormalEquations:
        return NormalEquations(self.parameters())

    def parameters(self) -> torch.Tensor:
        weight = self.module.weight.detach()
        weight = weight.T if self.transposed else weight.flatten(1)
        return weight if self.module.bias is None else torch.cat([weight, self.module.bias.detach()[:, None]], dim=1)

    def samples(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [sample, in] of an input: its tokens, or the patches that a kernel sees."""
        if type(self.module) is nn.Conv2d:
            x = F.pad(x, self.module._reversed_padding_repeated_twice)
            settings = {"dilation": self.module.dilation, "stride": self.module.stride}
            rows = F.unfold(x, self.module.kernel_size, **settings).transpose(1, 2).flatten(0, 1)
        else:
            rows = x.reshape(-1, x.shape[-1])
        return rows if self.module.bias is None else F.pad(rows, (0, 1), value=1.0)

    def outputs(self, samples: torch.Tensor) -> torch.Tensor:
        """What the module makes of samples, [sample, out]."""
        return samples @ self.parameters().T

    @torch.no_grad()
    def write(self, solution: torch.Tensor) -> None:
        """Make a solution the module's parameters."""
        weight = solution if self.module.bias is None else solution[:, :-1]
        self.module.weight.copy_((weight.T if self.transposed else weight).reshape(self.module.weight.shape))
        if self.module.bias is not None:
            self.module.bias.copy_(solution[:, -1])


class NormFit:
    """Scale and shift of a norm, [channel, 2]; its samples are normalised inputs."""

    def __init__(self, module: Any):
        self.module = module

    def equations(self) -> ChannelEquations:
        return ChannelEquations(self.parameters())

    def parameters(self) -> torch.Tensor:
        values = [self.module.weight.detach().flatten(), self.module.bias.detach().flatten()]
        return torch.stack(values, dim=1)

    def samples(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised inputs [sample, channel]."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
            return normed.reshape(-1, module.weight.numel())
        if isinstance(module, nn.BatchNorm2d):
            normed = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        else:
            normed = F.group_norm(x, module.num_groups, eps=module.eps)
        return normed.movedim(1, -1).flatten(0, -2)

    def outputs(self, samples: torch.Tensor) -> torch.Tensor:
        """What the module makes of samples, [sample, channel] (BiT's norms: before their activation)."""
        return samples * self.module.weight.flatten() + self.module.bias.flatten()

    @torch.no_grad()
    def write(self, solution: torch.Tensor) -> None:
        """Make a solution the module's parameters."""
        self.module.weight.copy_(solution[:, 0].reshape(self.module.weight.shape))
        self.module.bias.copy_(solution[:, 1].reshape(self.module.bias.shape))
