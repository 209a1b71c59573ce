"""Stock models over rows: one pass through the backbone, all experts' heads at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench, Part, as_array, store
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from twin_merging_hf.inference import run_over
from twin_merging_hf.processing import Processing


WEIGHTS = "a row's own expert weights"


def load(checkpoint: Path, kind: str = "text", **options: Any) -> Any:
    """A checkpoint as its own stock class, float32."""
    auto: Any = AutoModelForImageClassification if kind == "image" else AutoModelForSequenceClassification
    return auto.from_pretrained(checkpoint, dtype=torch.float32, **options).eval()


class AllHeads(nn.Module):
    """Heads of all experts side by side: the raw outputs of each in its columns [row, width]."""

    def __init__(self, heads: list[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(features) for head in self.heads], dim=1)


def with_all_heads(bench: Bench, state: dict[str, torch.Tensor] | None = None) -> Any:
    """
    A stock model whose `classifier` is all experts' heads.

    Args:
        state: backbone tensors by their names in the task model; None: the first expert's own.
    """
    models = [load(path, bench.kind) for path in bench.experts]
    model = models[0]
    if state is not None:
        own = model.state_dict()
        for name, tensor in state.items():
            own[name].copy_(tensor)
    model.classifier = AllHeads([each.classifier for each in models])
    return model


def backbone(bench: Bench, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Float tensors of a checkpoint outside its head, by their names in the task model."""
    like = load(bench.experts[0], bench.kind)
    if checkpoint != bench.experts[0]:
        # A base checkpoint may lack the task model's head, and its names their prefix.
        like = type(like).from_pretrained(checkpoint, dtype=torch.float32)
    return {n: v for n, v in like.state_dict().items() if not n.startswith("classifier.") and v.is_floating_point()}


def run(
    bench: Bench, rows: list[dict], model: nn.Module, step: Callable[[dict], torch.Tensor], title: str
) -> np.ndarray:
    """`step` over the model inputs of all rows, rows of like length together."""
    with tqdm(total=len(rows), desc=title, unit="row", mininterval=10, leave=False, disable=None) as bar:
        carrying: Any = Carrying(bench.processing)
        return as_array(run_over(model, rows, carrying, step, bar.update))


class Carrying:
    """A processing that takes what a row carries besides its content into the batch."""

    def __init__(self, processing: Processing):
        self.processing, self.kind = processing, processing.kind

    def inputs(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Model inputs, and `WEIGHTS` [row, expert] where rows carry them."""
        plain = [{key: value for key, value in row.items() if key != WEIGHTS} for row in rows]
        inputs = self.processing.inputs(plain)
        if rows and WEIGHTS in rows[0]:
            inputs[WEIGHTS] = torch.tensor(np.stack([row[WEIGHTS] for row in rows]), dtype=torch.float32)
        return inputs


def outputs(bench: Bench, model: Any, rows: list[dict], title: str) -> np.ndarray:
    """Raw outputs [row, width] of a stock model."""
    return run(bench, rows, model, lambda inputs: model(**inputs).logits, title)


class OnDemand:
    """
    Raw outputs [row, width] where each row is answered by one expert of its own; every (row, expert) runs only once.

    Args:
        run: `(expert, rows) -> [row, width]`.
    """

    def __init__(self, bench: Bench, part: Part, name: str, key: object, run: Callable[[int, list[dict]], np.ndarray]):
        self.part, self.run = part, run
        self.file = bench.file(name, [key, part.digest], "npz")
        shape = (len(part.rows), len(bench.tasks))
        self.known, self.values = np.zeros(shape, bool), np.zeros((*shape, bench.width), np.float32)
        if self.file.is_file():
            with np.load(self.file) as arrays:
                self.known, self.values = arrays["known"], arrays["values"]

    def get(self, chosen: np.ndarray) -> np.ndarray:
        """Outputs of the rows answered by expert `chosen` [row]."""
        positions = np.arange(len(chosen))
        missing = ~self.known[positions, chosen]
        for expert in np.unique(chosen[missing]):
            rows = np.flatnonzero(missing & (chosen == expert))
            self.values[rows, expert] = self.run(int(expert), [self.part.rows[i] for i in rows])
            self.known[rows, expert] = True
            store(self.file, {"known": self.known, "values": self.values})
        return self.values[positions, chosen]


def expert_runner(bench: Bench, part: Part) -> OnDemand:
    """The original checkpoints, each answering the rows given to it."""

    def answer(expert: int, rows: list[dict]) -> np.ndarray:
        raw = np.full((len(rows), bench.width), -np.inf, np.float32)
        raw[:, bench.spans[expert]] = outputs(
            bench, load(bench.experts[expert], bench.kind), rows, f"expert {bench.names[expert]}"
        )
        return raw

    return OnDemand(bench, part, "experts", "", answer)
