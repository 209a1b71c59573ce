"""Metrics of tasks, how sure a mixture may be, scores relative to the experts', and paired intervals. No models here."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import TwinMergingError, require_extra


OUTSIDE = -1
"""Class id of a prediction outside the row's own task: equal to no label."""

_EXTRA = "evaluate"


# ---- classes: [row] ids of predictions (`OUTSIDE` allowed) and of labels ------------------------------------------


def accuracy(predictions: Any, labels: Any) -> float:
    """Share of rows whose prediction is the label."""
    return float((np.asarray(predictions) == np.asarray(labels)).mean())


def macro_f1(predictions: Any, labels: Any) -> float:
    """Mean F1 over the classes that occur as label or as prediction; `OUTSIDE` is a miss, not a class."""
    found = sorted((set(map(int, predictions)) | set(map(int, labels))) - {OUTSIDE})
    scores = require_extra("sklearn.metrics", _EXTRA)
    return float(scores.f1_score(labels, predictions, labels=found, average="macro", zero_division=0))


def matthews(predictions: Any, labels: Any) -> float:
    """Matthews correlation; for several classes, and with `OUTSIDE` as a class of its own, Gorodkin's (2004) R_K."""
    return float(require_extra("sklearn.metrics", _EXTRA).matthews_corrcoef(labels, predictions))


def accuracy_f1(predictions: Any, labels: Any) -> float:
    """Mean of accuracy and F1 of class 1 (GLUE's MRPC and QQP); two classes only."""
    positive, true = np.asarray(predictions) == 1, np.asarray(labels) == 1
    f1 = require_extra("sklearn.metrics", _EXTRA).f1_score(true, positive, zero_division=0)
    return (accuracy(predictions, labels) + float(f1)) / 2


# ---- regression: [row] numbers --------------------------------------------------------------------------------------


def pearson(predictions: Any, labels: Any) -> float:
    """Pearson correlation; 0 where one side is constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: Any, labels: Any) -> float:
    """Spearman rank correlation; 0 where one side is constant."""
    return _correlation("spearmanr", predictions, labels)


def pearson_spearman(predictions: Any, labels: Any) -> float:
    """Mean of Pearson and Spearman correlation (GLUE's STS-B)."""
    return (pearson(predictions, labels) + spearman(predictions, labels)) / 2


def _correlation(function: str, predictions: Any, labels: Any) -> float:
    a, b = np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float)
    if len(a) < 2:
        raise TwinMergingError(f"a correlation needs at least 2 rows, got {len(a)}")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    value = float(getattr(require_extra("scipy.stats", _EXTRA), function)(a, b).statistic)
    return value if math.isfinite(value) else 0.0


# ---- text: lists of strings -----------------------------------------------------------------------------------------


def exact_match(predictions: Any, references: Any) -> float:
    """Share of rows whose text equals the reference but for white space (for classes: accuracy)."""
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([str(a).split() == str(b).split() for a, b in pairs]))


def rouge_l(predictions: Any, references: Any) -> float:
    """Mean ROUGE-L F-measure, without stemming (package rouge-score)."""
    scorer = require_extra("rouge_score.rouge_scorer", _EXTRA).RougeScorer(["rougeL"])
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]))


@dataclass(frozen=True)
class Metric:
    """
    One metric by name.

    kinds: what it scores: `classes`, `regression`, `text`. needs: the module that it takes from the extra, or None.
    """

    name: str
    kinds: tuple[str, ...]
    function: Callable[[Any, Any], float]
    needs: str | None = None

    def __call__(self, predictions: Any, labels: Any) -> float:
        return self.function(predictions, labels)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("classes",), accuracy),
        Metric("macro_f1", ("classes",), macro_f1, "sklearn.metrics"),
        Metric("matthews", ("classes",), matthews, "sklearn.metrics"),
        Metric("accuracy_f1", ("classes",), accuracy_f1, "sklearn.metrics"),
        Metric("exact_match", ("classes", "text"), exact_match),
        Metric("rouge_l", ("text",), rouge_l, "rouge_score.rouge_scorer"),
        Metric("pearson", ("regression",), pearson, "scipy.stats"),
        Metric("spearman", ("regression",), spearman, "scipy.stats"),
        Metric("pearson_spearman", ("regression",), pearson_spearman, "scipy.stats"),
    )
}
DEFAULT_METRIC = {"classes": "accuracy", "regression": "pearson", "text": "exact_match"}


def metric_for(task: str, kind: str, labels: int, name: str | None = None) -> Metric:
    """
    The metric of a task: `name`, or by default accuracy for classes, Pearson correlation for a regression and exact match
    for texts.

    Args:
        kind: `classes`, `regression` or `text`. labels: how many labels the task has.

    Raises:
        TwinMergingError: no such metric, it does not fit the task, or its package is not installed.
    """
    fitting = [metric.name for metric in METRICS.values() if kind in metric.kinds]
    if name is not None and name not in fitting:
        known = "does not fit" if name in METRICS else "is no metric"
        raise TwinMergingError(f"task {task!r} ({kind}): {name!r} {known}; it can have {', '.join(fitting)}")
    metric = METRICS[name or DEFAULT_METRIC[kind]]
    if metric.name == "accuracy_f1" and labels != 2:
        raise TwinMergingError(
            f"task {task!r}: `accuracy_f1` is for two labels, but it has {labels}; `macro_f1` is for more"
        )
    if metric.needs is not None:
        require_extra(metric.needs, _EXTRA)
    return metric


# ---- how sure -------------------------------------------------------------------------------------------------------


def negative_log_likelihood(log_probabilities: Any, labels: Any) -> float:
    """Mean of -log p(label) in nats. Args: log_probabilities [row, label]; labels [row] ids."""
    rows, columns = np.asarray(log_probabilities, dtype=float), np.asarray(labels, dtype=int)
    return float(-rows[np.arange(len(rows)), columns].mean())


def expected_calibration_error(probabilities: Any, labels: Any, bins: int = 15) -> float:
    """
    Expected calibration error of the top label (Guo et al. 2017): equal-width bins (b/bins, (b+1)/bins] of the largest
    probability; in each, |accuracy - mean confidence|, weighted by its share of rows.

    Args:
        probabilities: [row, label], each row a distribution. labels: [row] ids of columns.
    """
    rows, columns = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=int)
    confidence, right = rows.max(axis=1), rows.argmax(axis=1) == columns
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    # The share of a bin cancels against its means: sums are enough.
    gaps = np.bincount(np.digitize(confidence, edges, right=True), weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(rows))


# ---- raw and normalised ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreTable:
    """
    A method's scores beside those of the experts themselves.

    raw: score by task. experts: score of each task's own expert, or None where it is not known.
    A normalised score is `raw / expert's * 100` (Twin-Merging, section 5). It is None where the expert's own score is
    unknown, 0 or negative: a ratio to it says nothing. Then mean and minimum are None too, never those of the rest.
    """

    raw: Mapping[str, float]
    experts: Mapping[str, float | None]

    @property
    def normalised(self) -> dict[str, float | None]:
        """Per cent of the own expert's score, by task."""
        result: dict[str, float | None] = {}
        for task, score in self.raw.items():
            own = self.experts.get(task)
            result[task] = score / own * 100 if own is not None and own > 0 else None
        return result

    @property
    def undefined(self) -> list[str]:
        """Tasks without a normalised score."""
        return [task for task, value in self.normalised.items() if value is None]

    @property
    def raw_mean(self) -> float:
        """Mean of the raw scores over tasks."""
        return math.fsum(self.raw.values()) / len(self.raw)

    @property
    def normalised_mean(self) -> float | None:
        """Mean of the normalised scores (of the ratios, not the ratio of means), or None if one is undefined."""
        values = [value for value in self.normalised.values() if value is not None]
        return math.fsum(values) / len(values) if len(values) == len(self.raw) else None

    @property
    def minimum(self) -> tuple[str, float] | None:
        """Task with the lowest normalised score, and that score, or None if one is undefined."""
        values = {task: value for task, value in self.normalised.items() if value is not None}
        if len(values) < len(self.raw):
            return None
        task = min(values, key=values.__getitem__)
        return task, values[task]

    def as_dict(self) -> dict:
        """Everything, for JSON."""
        lowest = self.minimum
        return {
            "raw": dict(self.raw),
            "normalised": self.normalised,
            "raw_mean": self.raw_mean,
            "normalised_mean": self.normalised_mean,
            "minimum": None if lowest is None else {"task": lowest[0], "normalised": lowest[1]},
        }


# ---- paired intervals -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A difference of scores and its bootstrap interval [low, high] at `level`."""

    difference: float
    low: float
    high: float
    level: float
    resamples: int


def bootstrap_difference(
    first: Any,
    second: Any,
    labels: Any,
    metric: Callable[[Any, Any], float] = accuracy,
    *,
    resamples: int = 1000,
    seed: int | str = 0,
    level: float = 0.95,
) -> Difference:
    """
    Score of `first` minus that of `second` on the same rows, with a paired percentile interval (Efron 1979).

    Args:
        first, second, labels: [row] predictions of two methods and the truth. Rows are drawn with replacement, the same
            ones for both methods.
        seed: the same seed gives the same interval.
    """
    a, b, truth = np.asarray(first), np.asarray(second), np.asarray(labels)
    digest = hashlib.sha256(str(seed).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    draws = generator.integers(len(truth), size=(resamples, len(truth)))
    if metric in (accuracy, METRICS["accuracy"]):  # one product instead of thousands of calls
        found = ((a == truth).astype(float) - (b == truth))[draws].mean(axis=1)
    else:
        found = np.array([metric(a[i], truth[i]) - metric(b[i], truth[i]) for i in draws])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Difference(metric(a, truth) - metric(b, truth), float(low), float(high), level, resamples)
