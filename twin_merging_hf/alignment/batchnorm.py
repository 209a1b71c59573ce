"""Re-estimation of BatchNorm's running statistics: before matching (each expert on the same inputs) and after a merge."""

from typing import Any

import torch
from torch import nn

from .activations import Batches, evaluating, run


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has statistics that depend on the data."""
    return any(isinstance(module, _NORMS) and module.track_running_stats for module in model.modules())


def reestimate_batch_norm(model: Any, batches: Batches) -> None:
    """
    Replace every BatchNorm's running mean and variance by the average over batches, in place (what train mode would find in
    one pass with a cumulative average). Only these layers see train mode; afterwards all modes are as they were.

    Raises:
        ValueError: there is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _NORMS) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
            norm.train()
        try:
            seen = 0
            for batch in batches:
                run(model, batch)
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen:
        raise ValueError("BatchNorm statistics can only be estimated from at least one batch")
    assert all(bool(torch.isfinite(norm.running_var).all()) for norm in norms if norm.running_var is not None)
