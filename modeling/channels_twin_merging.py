"""
Deltas of modules on feature maps [row, channel, height, width]: batch and group norms, and standardised convolutions.

These modules get a forward of their own in the place of a hook. What they need besides the input (a norm's statistics, a
kernel) is read in there, where offloading has put it, and what follows inside of the module (BiT's activation) comes after
the deltas.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .call_twin_merging import CallWeights
from .factors_twin_merging import FactoredDelta, rows_like
from .mix_twin_merging import ExpertMix
from .terms_twin_merging import convolution_settings, convolved


def is_channel_norm(module: nn.Module) -> bool:
    """True for norms that end in a scale and a shift of each channel which depend on no other row of the batch."""
    if type(module) is nn.BatchNorm2d:
        return module.running_mean is not None
    return type(module) is nn.GroupNorm or type(module).__name__ == "BitGroupNormActivation"


def is_standardised_convolution(module: nn.Module) -> bool:
    """True for BiT's convolutions, whose kernels are standardised in each call; a build's final probe proves the rule."""
    return type(module).__name__ == "WeightStandardizedConv2d" and isinstance(module, nn.Conv2d) and module.groups == 1


def channel_rule(owner: nn.Module, attribute: str) -> str | None:
    """The rule of this file for a parameter's delta, or None."""
    if is_channel_norm(owner):
        return "channel_norm"
    if is_standardised_convolution(owner):
        return "standardised_conv2d" if attribute == "weight" else "bias"
    return None


def channel_values(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape per-row values [batch, channel] so that they multiply `x` [rows, channel, ...], as `rows_like` does."""
    values = rows_like(values.to(x.device), x, feature_dims=x.dim() - 1)
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


def refuse_batch_statistics(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of batch norms: none may normalise by the batch, which is no function of the single row."""
    if module.training:
        raise ValueError(
            "a BatchNorm of the shared model is in training mode: it would normalise by the whole batch, so that rows "
            "depend on each other and experts' deltas do not fit. Call `eval()` on the model, or after `train()` on its "
            "BatchNorm modules alone"
        )


class ChannelNormForward:
    """
    Stands in for the forward of a batch norm in eval mode or a group norm: y_b = (g + sum_t w[b,t] dg_t) x^_b + bias alike.

    x^ depends on no parameter of the experts: they all use the statistics of the shared model (a build restates theirs),
    or those of the row itself. So each row's norm is exactly that of its dense model.
    """

    def __init__(self, module: nn.Module, mix: ExpertMix):
        self.module, self.mix = module, mix
        self.weight: Any = None
        self.bias: Any = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module, call = self.module, self.mix.current()
        if call is None:
            return type(module).forward(module, x)
        normed = self._normed(x)
        weight, bias = self._row_values("weight", normed, call), self._row_values("bias", normed, call)
        output = torch.addcmul(bias, normed, weight)
        activation: Any = getattr(module, "activation", None)
        return output if activation is None else activation(output)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        if isinstance(module, nn.BatchNorm2d):
            return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        return F.group_norm(x, module.num_groups, eps=module.eps)

    def _row_values(self, attribute: str, x: torch.Tensor, call: CallWeights) -> torch.Tensor:
        own, delta = getattr(self.module, attribute), getattr(self, attribute)
        if delta is None:
            return channel_values(own[None], x).to(x.dtype)
        rows = call.kept((id(self), attribute), lambda: own + delta(call).to(own))
        return channel_values(rows, x).to(x.dtype)


class StandardisedForward:
    """
    Stands in for the forward of a convolution that standardises its kernel: V = (W - mean(W)) / std(W), channel by channel.

    V is not linear in W, but convolution with V is: conv(x, V) = (conv(x, W) - mean conv(x, 1)) / std. So each row's
    mixture W_b = W + sum_t w[b,t] dW_t acts through its factors as anywhere else, and its mean and standard deviation are
    numbers [row, channel] that follow from inner products of W and the deltas. Exactly the dense model of each row.
    """

    def __init__(self, module: nn.Module, mix: ExpertMix):
        self.module, self.mix = module, mix
        self.weight: Any = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module, call = self.module, self.mix.current()
        if call is None:
            return type(module).forward(module, x)
        pad: Any = module.pad
        x = x if pad is None else pad(x)
        weight: Any = module.weight
        output = F.conv2d(x, weight, None, **convolution_settings(module))
        output = output + convolved(module, x, self.weight, call).to(output)
        sums = F.conv2d(x, torch.ones_like(weight[:1]), None, **convolution_settings(module))
        mean, variance = call.kept((id(self), "statistics"), lambda: self._statistics(weight, call))
        scale = (variance + module.eps).rsqrt()
        output = (output - channel_values(mean, output).to(x.dtype) * sums) * channel_values(scale, output).to(x.dtype)
        bias: Any = module.bias
        return output if bias is None else output + bias[:, None, None]

    def _statistics(self, weight: torch.Tensor, call: CallWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of each row's kernels, [batch, channel] each, float32."""
        deltas = _dense_deltas(self.weight, call.weights.shape[1])
        kernels = torch.stack([weight.float().flatten(1), *(delta.to(weight.device) for delta in deltas)])
        means = kernels.mean(dim=-1)  # of [1 + expert, channel, entry]
        centred = kernels - means[..., None]
        products = torch.einsum("tcn,ucn->tuc", centred, centred) / kernels.shape[-1]
        rows = torch.cat([torch.ones_like(call.weights[:, :1]), call.weights], dim=1).to(weight.device).float()
        return rows @ means, torch.einsum("bt,bu,tuc->bc", rows, rows, products).clamp(min=0)


def _dense_deltas(delta: Any, experts: int) -> list[torch.Tensor]:
    """Each expert's delta as a float32 matrix [channel, entry]."""
    if not isinstance(delta, FactoredDelta):
        return [delta.dense(t).float().flatten(1) for t in range(experts)]
    up, down, scale = delta(torch.float32)
    up = up if scale is None else up * scale
    blocks = zip(up.split(delta.ranks, dim=1), down.split(delta.ranks, dim=0), strict=True)
    return [left @ right for left, right in blocks]
