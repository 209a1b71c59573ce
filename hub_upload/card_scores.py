"""Scores for a card: from an evaluation that lies in the artifact, else from the held-out rows of the build."""

from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index


@dataclass(frozen=True)
class TaskScores:
    """
    Scores of one task. routed, given: the artifact's, left to itself and with the expert given; own: the expert's own;
    merges: of static merges, by method. None where unknown.
    """

    name: str
    metric: str
    rows: int
    routed: float
    given: float | None
    own: float | None
    merges: dict[str, float] = field(default_factory=dict)

    def normalised(self, score: float | None) -> float | None:
        """A score in percent of the expert's own, or None where there is none."""
        return None if score is None or self.own is None or self.own <= 0 else 100 * score / self.own


@dataclass(frozen=True)
class CardScores:
    """Scores of all tasks that have some, and on which rows (`split`, for metadata; `rows`, for people)."""

    tasks: list[TaskScores]
    split: str
    rows: str


def card_scores(report: dict, evaluation: dict | None) -> CardScores | None:
    """
    Read scores; None where nothing was measured.

    Args:
        report: content of report.json. evaluation: what `twin-merging evaluate` wrote.
    """
    if evaluation is not None:
        tasks = [_evaluated(name, evaluation) for name in evaluation["data"]]
        return CardScores(tasks, "test", "rows that nothing of this model has seen (`twin-merging evaluate`)")
    verdict = report["verdict"]
    own = verdict.get("expert_scores") or {}
    tasks = [
        TaskScores(name, entry["metric"], own[name]["rows"], entry["routed"], entry["given"], own[name]["score"])
        for name, entry in (verdict.get("scores") or {}).items()
        if name in own
    ]
    if not tasks:
        return None
    return CardScores(tasks, "validation", "the build's held-out rows (at most 200 a task)")


def _evaluated(name: str, evaluation: dict) -> TaskScores:
    data = evaluation["data"][name]
    return TaskScores(
        name,
        data["metric"],
        data["rows"],
        evaluation["routed"]["raw"][name],
        evaluation["given"]["raw"][name],
        evaluation["experts"]["scores"].get(name),
        {method: table["raw"][name] for method, table in evaluation["merges"].items()},
    )


def model_index(model_name: str, pipeline_tag: str, scores: CardScores) -> list[dict[str, Any]]:
    """Metadata `model-index`: raw and normalised scores of the routed artifact, by task."""
    results = []
    for task in scores.tasks:
        values = [(task.metric, f"{task.metric}, routed", task.routed)]
        normalised = task.normalised(task.routed)
        if normalised is not None:
            values.append((f"normalised_{task.metric}", f"{task.metric}, routed, % of the expert's own", normalised))
        results += [
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=task.name,
                dataset_name=task.name,
                dataset_split=scores.split,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for kind, name, value in values
        ]
    return eval_results_to_model_index(model_name, results)
