"""`merge_method: least_squares`: the shared model of a recipe's experts, fitted on inputs of their train rows."""

from collections.abc import Callable
from typing import Any

import torch

from .checkpoints import Checkpoint
from .errors import TwinMergingError
from .inference import batches
from .least_squares import fit_layers
from .preflight import Inputs


# A layer's equations settle after a few hundred rows: each has many tokens or pixels.
_ROWS, _LEFT_OUT = 192, 64
LEAST_SQUARES = "least_squares"


def fitted_tensor(inputs: Inputs, name: str, weights: tuple[float, ...], mean: Callable[[str], Any]) -> torch.Tensor:
    """
    One backbone tensor of the fitted shared model; the first call fits all of them.

    Args:
        weights: of the experts. mean: gives the weighted mean of the experts' tensors, by name.

    Raises:
        TwinMergingError: experts without rows, or language models.
    """
    key = (LEAST_SQUARES, weights)
    if key not in inputs.fitted:
        inputs.fitted[key] = _fit(inputs, weights, mean)
    return inputs.fitted[key][name]


def _fit(inputs: Inputs, weights: tuple[float, ...], mean: Callable[[str], Any]) -> dict[str, torch.Tensor]:
    first = inputs.experts[0]
    if inputs.rows is None or inputs.processing is None:
        raise TwinMergingError(f"`merge_method: {LEAST_SQUARES}` is fitted on rows: give `data` for every expert")
    if first.is_language_model:
        raise TwinMergingError(
            f"`merge_method: {LEAST_SQUARES}` is for classifiers, not for {first.task_class.__name__}"
        )
    fitted, left_out = [], []
    for rows in inputs.rows:
        chosen = rows.train[: _ROWS + _LEFT_OUT]
        cut = max(1, len(chosen) * _ROWS // (_ROWS + _LEFT_OUT))
        fitted.append(_model_inputs(inputs, chosen[:cut]))
        left_out.append(_model_inputs(inputs, chosen[cut:] or chosen))
    experts = [stock_model(checkpoint) for checkpoint in inputs.experts]
    merged = stock_model(first)
    state, names = merged.state_dict(), list(first.backbone)
    for name in names:
        if state[name].is_floating_point():
            state[name].copy_(mean(name))
    report = fit_layers(merged, experts, fitted, left_out, weights, inputs.on_fit)
    inputs.notes.append(
        f"least_squares: squared error of the last state on rows left out of the fit {report.loss:.3f}, of the experts' mean "
        f"{report.mean_loss:.3f}" + (": the mean is kept" if report.kept_mean else "")
    )
    return {name: state[name] for name in names}


def _model_inputs(inputs: Inputs, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
    assert inputs.processing is not None
    return [
        {key: value for key, value in batch.items() if key != "labels"} for _, batch in batches(rows, inputs.processing)
    ]


def stock_model(checkpoint: Checkpoint) -> Any:
    """An expert in float32 as the build reads it: batch norms in common statistics, aligned units in their places."""
    model = checkpoint.task_class(checkpoint.config).float().eval()
    state = model.state_dict()
    with torch.no_grad():
        for name in checkpoint.places:
            state[name].copy_(checkpoint.tensor(name))
    return model
