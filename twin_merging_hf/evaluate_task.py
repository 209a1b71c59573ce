"""One task of an evaluation: its rows, how they are scored, and what an artifact answers to them, in classes or in texts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .evaluation import ArtifactOutputs, artifact_outputs
from .language_evaluation import longest_completion, references, written_texts
from .metrics import Metric
from .processing import Processing
from .scoring import artifact_predictions, labels_of


@dataclass(frozen=True)
class Task:
    """One expert's task: its rows, and how they are scored."""

    name: str
    expert: int
    path: Path
    rows: list[dict]
    regression: bool
    metric: Metric
    train_mean: float | None = None
    writes: bool = False
    """Rows are prompts, and the answers texts."""

    @property
    def truth(self) -> Any:
        """What the answers are compared with: label ids, numbers or texts."""
        return references(self.rows) if self.writes else labels_of(self.rows)


@dataclass(frozen=True)
class WrittenAnswers:
    """An artifact's texts to rows of prompts, and the weights that acted [row, expert]."""

    texts: list[str]
    expert_weights: torch.Tensor


Answers = ArtifactOutputs | WrittenAnswers


def task_answers(
    model: Any, task: Task, processing: Processing, expert: str | None, tick: Callable[[int], Any]
) -> Answers:
    """What an artifact says to a task's rows, routed by itself (`expert` None) or with the expert given."""
    if not task.writes:
        return artifact_outputs(model, task.rows, processing, expert, tick)
    tokens = longest_completion(task.rows, processing)
    texts, weights = written_texts(
        model, task.rows, processing, tokens, routed=expert is None, experts=expert, tick=tick
    )
    assert weights is not None
    return WrittenAnswers(texts, weights)


def as_scored(model: Any, task: Task, answers: Answers) -> Any:
    """Answers as the task's metric takes them: label ids, numbers or texts."""
    if isinstance(answers, WrittenAnswers):
        return answers.texts
    return artifact_predictions(model, task.expert, answers, task.train_mean)
