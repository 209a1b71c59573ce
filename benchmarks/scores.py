"""How answers are scored, the same for every method: score rules, paired bootstrap, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 1000
BINS = 15


@dataclass(frozen=True)
class Gold:
    """
    What is right, for the rows of all tasks in one list.

    task, label: [row] the row's task and label id (0 in a regression). value: [row] a regression row's number, else 0.
    regression, train_means: for each task, whether it is a regression, and the mean number of its train rows.
    one_space: all tasks have the same labels, so an answer by another task's head can be right.
    """

    task: np.ndarray
    label: np.ndarray
    value: np.ndarray
    regression: tuple[bool, ...]
    train_means: tuple[float, ...]
    one_space: bool = False


@dataclass(frozen=True)
class Answers:
    """
    What a method answered: by which task's head [row], which label of that task [row], a regression's number [row], and
    the probability it gave that label [row] (NaN where a method has none).
    """

    task: np.ndarray
    label: np.ndarray
    value: np.ndarray
    confidence: np.ndarray


def right(answers: Answers, gold: Gold) -> np.ndarray:
    """Whether each row's top label is right [row]; a regression row is right if its own task answered."""
    own = (answers.task == gold.task) | gold.one_space
    return own & ((answers.label == gold.label) | np.array(gold.regression)[gold.task])


def numbers(answers: Answers, gold: Gold) -> np.ndarray:
    """Regression values [row]; a row answered by another task counts as the train mean."""
    own = (answers.task == gold.task) | gold.one_space
    return np.where(own, answers.value, np.array(gold.train_means)[gold.task])


def task_scores(answers: Answers, gold: Gold, counts: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """
    Score of each task: accuracy, or Pearson's correlation of a regression.

    Args:
        counts: for each task [resample, row of the task], how often each row is drawn; None: once each.

    Returns:
        [resample, task], one resample without `counts`.
    """
    hits, values = right(answers, gold), numbers(answers, gold)
    columns = []
    for task, regression in enumerate(gold.regression):
        rows = np.flatnonzero(gold.task == task)
        drawn = np.ones((1, len(rows))) if counts is None else counts[task]
        if regression:
            columns.append(weighted_pearson(values[rows], gold.value[rows], drawn))
        else:
            columns.append(drawn @ hits[rows].astype(float) / drawn.sum(1))
    return np.stack(columns, axis=1)


def weighted_pearson(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of rows drawn `counts` [resample, row] times: [resample]; 0 where a side is constant."""
    total = counts.sum(1)
    x, y = x - x.mean(), y - y.mean()
    mean_x, mean_y = counts @ x / total, counts @ y / total
    covariance = counts @ (x * y) / total - mean_x * mean_y
    spread = (counts @ x**2 / total - mean_x**2) * (counts @ y**2 / total - mean_y**2)
    # What rounding leaves of a constant is no spread.
    flat = spread <= 1e-20
    return np.where(flat, 0.0, covariance / np.sqrt(np.where(flat, 1.0, spread)))


def resamples(gold: Gold, seed: int = 0, times: int = RESAMPLES) -> list[np.ndarray]:
    """Bootstrap draws: for each task [resample, row of the task]; the same for every method, so differences are paired."""
    draw = np.random.default_rng(seed)
    sizes = np.bincount(gold.task, minlength=len(gold.regression))
    return [draw.multinomial(size, np.full(size, 1 / size), times).astype(float) for size in sizes]


def normalised(scores: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """
    Mean over tasks of score / own expert's score, in percent: [resample, task] twice -> [resample].

    An expert at or below 0 has no ratio; its task is left out.
    """
    usable = np.where(experts > 0, experts, np.nan)
    return 100 * np.nanmean(scores / usable, axis=1)


def mean_over_seeds(answers: Sequence[Answers], gold: Gold, counts: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Scores [resample, task], averaged over the seeds of a method."""
    return np.mean([task_scores(each, gold, counts) for each in answers], axis=0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values [resample]."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def calibration_error(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of top labels: bins of equal width, gaps weighted by their share of rows."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    error = 0.0
    for index in range(bins):
        inside = place == index
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - hits[inside].mean())
    return float(error)
