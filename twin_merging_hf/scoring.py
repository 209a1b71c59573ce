"""From an artifact's answers to scores: pure functions of given outputs, the same for a command and for a benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import TwinMergingError
from .evaluation import ArtifactOutputs, regression_values
from .metrics import OUTSIDE, Metric, expected_calibration_error, metric_for, negative_log_likelihood


def artifact_predictions(
    model: Any, expert: int, outputs: ArtifactOutputs, train_mean: float | None = None
) -> np.ndarray:
    """
    What an artifact says to rows of one expert's task, [row]: the expert's own label ids, `OUTSIDE` where the answer is
    another task's label; for a regression numbers, the train mean where another expert answered.

    Args:
        model: an artifact, or anything with its `label_space`.
        train_mean: mean label of the expert's train rows.

    Raises:
        TwinMergingError: a regression row was answered by another expert and no train mean is given, or an output is
            not finite.
    """
    space = model.label_space
    if not torch.isfinite(outputs.logits).all():
        raise TwinMergingError(
            f"the artifact's answers to rows of expert {expert} hold NaN or infinity; build it again"
        )
    columns = space.columns(expert)
    if not space.regression[expert]:
        own_id = torch.full((outputs.logits.shape[1],), OUTSIDE)
        own_id[columns] = torch.arange(len(columns))
        return own_id[outputs.logits.argmax(dim=1)].numpy()
    if train_mean is None:
        elsewhere = 0 if space.kind == "value" else int((outputs.logits.argmax(dim=1) != columns[0]).sum())
        if elsewhere:
            raise TwinMergingError(
                f"{elsewhere} rows of regression expert {expert} were answered by other experts, which counts as the mean "
                "label of its train rows, but that is not known; give `--recipe` with `data`, or build the artifact again"
            )
        train_mean = 0.0
    return regression_values(model, expert, outputs, train_mean).numpy()


def expert_predictions(outputs: torch.Tensor, regression: bool) -> np.ndarray:
    """What an expert itself says: [row, label] raw outputs -> [row] label ids, or numbers for a regression."""
    return (outputs[:, 0] if regression else outputs.argmax(dim=1)).numpy()


def labels_of(rows: Sequence[dict]) -> np.ndarray:
    """The labels of rows, [row]: the expert's own ids, or numbers."""
    return np.array([row["label"] for row in rows])


def score_rows(
    model: Any,
    expert: int,
    outputs: ArtifactOutputs,
    rows: Sequence[dict],
    metric: Metric | str | None = None,
    train_mean: float | None = None,
) -> float:
    """
    Score of an artifact's given answers to rows of one expert's task, as `artifact_predictions` reads them.

    Args:
        metric: default: accuracy for classes, Pearson correlation for a regression.
    """
    if not isinstance(metric, Metric):
        kind = "regression" if model.label_space.regression[expert] else "classes"
        metric = metric_for(str(expert), kind, len(model.label_space.columns(expert)), metric)
    return metric(artifact_predictions(model, expert, outputs, train_mean), labels_of(rows))


@dataclass(frozen=True)
class RouterScore:
    """
    How rows were routed: the expert of the largest weight was chosen, or none where a row's weights sum to 0.

    accuracy: share of all rows that their own expert got; a row of no expert is not right. none: how many there were.
    experts: accuracy by expert. confusion: [expert, chosen expert or none last] counts; experts without rows are zeros.
    """

    rows: int
    accuracy: float
    none: int
    experts: dict[str, float]
    confusion: list[list[int]]


def router_score(names: Sequence[str], weights: dict[str, torch.Tensor]) -> RouterScore:
    """
    Args:
        names: the experts, in the order of the columns. weights: expert weights [row, expert] by the expert whose rows
            they are.
    """
    count = len(names)
    confusion = np.zeros((count, count + 1), dtype=int)
    for name, rows in weights.items():
        chosen = torch.where(rows.sum(dim=1) == 0, count, rows.argmax(dim=1))
        confusion[names.index(name)] = np.bincount(chosen.numpy(), minlength=count + 1)
    sums = confusion.sum(axis=1)
    experts = {name: float(confusion[t, t] / sums[t]) for t, name in enumerate(names) if sums[t]}
    total = int(sums.sum())
    right = float(np.trace(confusion[:, :count]) / total)
    return RouterScore(total, right, int(confusion[:, count].sum()), experts, confusion.tolist())


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error (15 bins, top label) and mean negative log-likelihood in nats, over `rows` rows."""

    rows: int
    ece: float
    nll: float


def calibration(
    model: Any, answers: Mapping[int, ArtifactOutputs], rows: Mapping[int, Sequence[dict]]
) -> Calibration | None:
    """
    How sure an artifact may be of the labels that it gives: over the union label space, rows that were routed wrongly
    included, rows of all tasks together. None without rows of classes (a regression has no distribution).

    Args:
        answers, rows: by expert. Those of regression experts are left out.
    """
    chosen = [t for t in answers if not model.label_space.regression[t]]
    if not chosen:
        return None
    logits = torch.cat([answers[t].logits for t in chosen]).double()
    labels = [model.label_space.columns(t)[row["label"]] for t in chosen for row in rows[t]]
    return Calibration(
        len(labels),
        expected_calibration_error(logits.exp().numpy(), labels),
        negative_log_likelihood(logits.numpy(), labels),
    )
