"""The dense reference: stock task models whose weights are merged by hand. Shares no code with what it judges."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests import tiny


EXPERTS = list(tiny.LABELS)
MIXED = torch.tensor(
    [
        [1.0, 0.0, 0.0],
        [0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0],
        [0.2, 0.3, 0.5],
        [0.1, 0.0, 0.4],
        [0.0, 1.0, 0.0],
    ]
)
"""Expert weights of a batch that mixes everything: one expert, none, sums of one and of less."""


@functools.cache
def stock(kind: str, checkpoint: Path) -> Any:
    """A checkpoint loaded by its own class, as a user without this project would."""
    text = AutoModelForTokenClassification if kind.endswith("-tokens") else AutoModelForSequenceClassification
    auto = AutoModelForImageClassification if kind == "vit" else text
    return auto.from_pretrained(checkpoint).eval()


def dense_state(model: Any, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Backbone tensors `shared + sum_t weights[t] * delta_t`, by their names in the task model."""
    tensors, ranks = dict(model.state_dict()), model.config.ranks
    state = {}
    for key, value in tensors.items():
        name = key.removeprefix("shared.")
        if not key.startswith("shared.") or ".heads." in name:
            continue
        place = f"deltas.{name.replace('.', '-')}"
        if f"{place}.delta" in tensors:
            value = value + sum(w * d for w, d in zip(weights, tensors[f"{place}.delta"], strict=True))
        elif f"{place}.up" in tensors:
            value = value + _product(
                tensors[f"{place}.up"], tensors[f"{place}.down"], ranks[name], weights, value.shape
            )
        state[name] = value
    return state


def _product(up, down, ranks, weights, shape) -> torch.Tensor:
    total, start = torch.zeros(up.shape[0], down.shape[1]), 0
    for weight, rank in zip(weights, ranks, strict=True):
        block = slice(start, start + rank)
        total += weight * (up[:, block] @ down[block])
        start += rank
    return total.reshape(shape)


@torch.no_grad()
def dense_logits(model: Any, kind: str, experts: Path, weights: torch.Tensor, head: str, inputs: dict) -> torch.Tensor:
    """Logits of a stock model with densely merged backbone and one expert's own head."""
    own = stock(kind, experts / head)
    state = {**own.state_dict(), **dense_state(model, weights)}
    return functional_call(own, state, kwargs=inputs).logits


@torch.no_grad()
def dense_hidden(model: Any, kind: str, experts: Path, weights: torch.Tensor, inputs: dict) -> Any:
    """All hidden states of a stock backbone with densely merged weights."""
    own = stock(kind, experts / EXPERTS[0])
    prefix = own.base_model_prefix + "."
    state = {n.removeprefix(prefix): v for n, v in dense_state(model, weights).items() if n.startswith(prefix)}
    return functional_call(own.base_model, state, kwargs={**inputs, "output_hidden_states": True})


def columns(model: Any, expert: str) -> list[int]:
    """Columns of an expert's labels, by their names in the config."""
    return [model.config.label2id[f"{expert}/{label}"] for label in tiny.LABELS[expert]]


def row(inputs: dict, index: int) -> dict[str, torch.Tensor]:
    """One row of a batch, still with its padding."""
    return {name: value[index : index + 1] for name, value in inputs.items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Absolute difference of at most `tolerance` everywhere, shapes equal."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
