"""
Batch norms of several models, restated in common statistics.

In eval mode a batch norm is an affine map of each channel, a x + b with a = g / sqrt(v + eps) and b = beta - m a. What
differs between experts may stand in the scale g and shift beta or in the running mean m and variance v, and the map is not
linear in v. So every model's batch norms are read as if they had one and the same m and v, with g and beta changed so that
a and b stay what they are. Then a and b are linear in g and beta: shared models, deltas and mixtures of these are exactly
those of the affine maps, and the running statistics are tensors that all models agree in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
Read = Callable[[str], torch.Tensor]
"""Gives a model's tensor by its name, as stored."""
Statistics = dict[str, torch.Tensor]


def batch_norms(skeleton: nn.Module) -> dict[str, Any]:
    """Batch norms, by name, that have a scale and shift to take up what their statistics lose."""
    return {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None
    }


def common_statistics(
    skeleton: nn.Module, experts: Sequence[Read], others: Sequence[Read] = (), dtype: torch.dtype | None = None
) -> Statistics:
    """
    The statistics in which models are restated, by tensor name; only of the batch norms whose statistics are not these.

    They are those of all experts' inputs together: the mean of the means, the mean of the variances plus the variance of
    the means. So a shared model that is trained on from there, or read by other tools, has statistics that make sense.

    Args:
        others: models that are to be restated too, such as a base, but have no say.
        dtype: type in which the shared model will keep them, so that rounding is no difference either.
    """
    common: Statistics = {}
    for name in batch_norms(skeleton):
        found = [[read(f"{name}.{key}") for key in STATISTICS] for read in (*experts, *others)]
        means, variances, counts = (torch.stack(values) for values in zip(*found[: len(experts)], strict=True))
        pooled = variances.double().mean(dim=0) + means.double().var(dim=0, unbiased=False)
        kept = (value.to(dtype or means.dtype).to(means.dtype) for value in (means.double().mean(dim=0), pooled))
        values = (*kept, counts.amax(dim=0))
        if any(not torch.equal(a, b) for own in found for a, b in zip(own, values, strict=True)):
            common |= {f"{name}.{key}": value for key, value in zip(STATISTICS, values, strict=True)}
    return common


def restated(read: Read, name: str, norm: nn.BatchNorm2d, common: Statistics) -> torch.Tensor:
    """
    A tensor of a batch norm, as it is with the `common` statistics in the place of its own: the same map in eval mode.

    Args:
        name: the tensor's, such as "resnet.embedder.embedder.normalization.weight".
    """
    if name in common:
        return common[name]
    module, _, attribute = name.rpartition(".")
    mean, variance = (read(f"{module}.{key}") for key in STATISTICS[:2])
    new_mean, new_variance = (common[f"{module}.{key}"] for key in STATISTICS[:2])
    own = read(name)
    if torch.equal(mean, new_mean) and torch.equal(variance, new_variance):
        return own
    ratio = ((new_variance.double() + norm.eps) / (variance.double() + norm.eps)).sqrt()
    if attribute == "weight":
        return (own.double() * ratio).to(own.dtype)
    scale = read(f"{module}.weight").double() / (variance.double() + norm.eps).sqrt()
    return (own.double() + (new_mean.double() - mean.double()) * scale).to(own.dtype)
