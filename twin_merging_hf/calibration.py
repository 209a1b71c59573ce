"""Experts that are too sure of themselves: one temperature for each head, fitted on held-out rows."""

from typing import Any

import torch

from twin_merging_hf.modeling.heads_twin_merging import LabelSpace

from .evaluation import artifact_outputs
from .preflight import Inputs
from .temperature import fit_temperature


# Fewer rows say too little about probabilities, more than this cost time and change nothing.
_LEAST_ROWS, _MOST_ROWS = 100, 300


def calibrate(model: Any, inputs: Inputs, tick: Any = lambda count: None) -> dict[str, float]:
    """
    Fit the temperature of every classifying expert's head, the expert given, on its held-out rows, in place.

    A fine-tuned classifier is surer than it is right (Guo et al. 2017), and a union of experts inherits that. The
    temperature acts in `logits` alone: `expert_logits` and the order of an expert's own labels stay as they are.

    Returns:
        Temperatures by expert; experts with fewer than 100 held-out rows keep 1, as do regressions and taggers.
    """
    config, space = model.config, model.label_space
    fitted = {}
    for index, rows in enumerate(inputs.rows or []):
        entry, chosen = config.experts[index], rows.held_out[:_MOST_ROWS]
        if entry["problem_type"] != "single_label_classification" or len(chosen) < _LEAST_ROWS:
            continue
        assert inputs.processing is not None
        outputs = artifact_outputs(model, chosen, inputs.processing, entry["name"], tick)
        labels = torch.tensor([row["label"] for row in chosen])
        temperature = round(fit_temperature(outputs.expert_logits[:, space.columns(index)], labels), 4)
        fitted[entry["name"]] = temperature
        if temperature != 1.0:
            entry["temperature"] = temperature
    model.label_space = LabelSpace.of(config.experts)
    return fitted


def calibration_rows(inputs: Inputs) -> int:
    """How many rows `calibrate` will run, at most."""
    return sum(min(_MOST_ROWS, len(rows.held_out)) for rows in inputs.rows or [])
