"""Scores of given answers: what counts as right, where a row went, and how sure the mixture was."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twin_merging_hf import TwinMergingError, timing
from twin_merging_hf.evaluation import ArtifactOutputs
from twin_merging_hf.metrics import OUTSIDE
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace
from twin_merging_hf.scoring import artifact_predictions, calibration, expert_predictions, router_score, score_rows
from twin_merging_hf.timing import time_ratio


def model_of(*experts: list[str]) -> SimpleNamespace:
    """As much of an artifact as scoring needs; one label is a regression."""
    types = {True: "regression", False: "single_label_classification"}
    entries = [{"name": f"e{t}", "labels": e, "problem_type": types[len(e) == 1]} for t, e in enumerate(experts)]
    return SimpleNamespace(label_space=LabelSpace.of(entries))


def answers(logits: list, expert_logits: list | None = None) -> ArtifactOutputs:
    rows = torch.tensor(logits, dtype=torch.float32)
    return ArtifactOutputs(rows, torch.tensor(expert_logits or logits, dtype=torch.float32), torch.ones(len(rows), 1))


UNION = model_of(["x", "y"], ["p", "q", "r"])
ANSWERS = answers([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]])


def test_predictions_are_the_experts_own_ids_or_outside():
    assert artifact_predictions(UNION, 1, ANSWERS).tolist() == [2, 0, OUTSIDE, 1]
    assert artifact_predictions(UNION, 0, ANSWERS).tolist() == [OUTSIDE, OUTSIDE, 0, OUTSIDE]


def test_an_answer_outside_of_the_task_is_wrong():
    rows = [{"label": label} for label in (2, 0, 0, 0)]
    assert score_rows(UNION, 1, ANSWERS, rows) == 0.5
    # The same answer counts for the task whose label it is.
    assert score_rows(UNION, 0, answers([[1, 0, 0, 0, 0]]), [{"label": 0}]) == 1.0


def test_common_labels_come_back_in_the_experts_own_order():
    model = model_of(["x", "y"], ["y", "x"])
    assert model.label_space.kind == "same"
    assert artifact_predictions(model, 0, answers([[1, 0], [0, 1]])).tolist() == [0, 1]
    assert artifact_predictions(model, 1, answers([[1, 0], [0, 1]])).tolist() == [1, 0]


MIXED = model_of(["x", "y"], ["score"])
ELSEWHERE = answers([[0, 0, 1], [1, 0, 0], [0, 0, 1]], [[9, 9, 0.1], [9, 9, 0.2], [9, 9, 0.3]])


def test_a_regression_row_answered_elsewhere_is_the_train_mean():
    assert artifact_predictions(MIXED, 1, ELSEWHERE, 5.0).tolist() == pytest.approx([0.1, 5.0, 0.3])
    labels = [{"label": value} for value in (1.0, 2.0, 3.0)]
    expected = np.corrcoef([0.1, 5.0, 0.3], [1, 2, 3])[0, 1]
    assert score_rows(MIXED, 1, ELSEWHERE, labels, train_mean=5.0) == pytest.approx(expected)


def test_an_unknown_train_mean_is_refused_only_where_it_is_needed():
    with pytest.raises(TwinMergingError, match="1 rows of regression expert 1 .*`--recipe`"):
        artifact_predictions(MIXED, 1, ELSEWHERE)
    own = answers([[0, 0, 1], [0, 0, 1]], [[9, 9, 0.1], [9, 9, 0.2]])
    assert artifact_predictions(MIXED, 1, own).tolist() == pytest.approx([0.1, 0.2])
    assert artifact_predictions(model_of(["a"], ["b"]), 1, answers([[0.3], [0.6]])).tolist() == pytest.approx(
        [0.3, 0.6]
    )


def test_nan_is_no_answer():
    with pytest.raises(TwinMergingError, match="NaN"):
        artifact_predictions(UNION, 0, answers([[math.nan, 0, 0, 0, 0]]))


def test_experts_themselves():
    outputs = torch.tensor([[0.2, 0.9], [0.7, 0.1]])
    assert expert_predictions(outputs, False).tolist() == [1, 0]
    assert expert_predictions(outputs[:, :1], True).tolist() == pytest.approx([0.2, 0.7])


def test_a_row_of_no_expert_is_counted_apart_and_not_right():
    weights = {"b": torch.tensor([[0.1, 0.9, 0], [0.6, 0.4, 0], [0, 0, 0], [0.2, 0.3, 0.5]]), "a": torch.zeros(2, 3)}
    found = router_score(["a", "b", "c"], weights)
    assert found.confusion == [[0, 0, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert (found.rows, found.none, found.accuracy) == (6, 3, pytest.approx(1 / 6))
    assert found.experts == {"a": 0.0, "b": 0.25}


def test_calibration_is_over_the_union_and_leaves_regressions_out():
    model = model_of(["x", "y"], ["score"])
    shares = [[0.8, 0.1, 0.1], [0.3, 0.1, 0.6]]  # the second row went to the regression: wrong, and 0.6 sure
    found = calibration(model, {0: answers(np.log(shares).tolist()), 1: ELSEWHERE}, {0: [{"label": 0}] * 2, 1: []})
    assert found is not None and found.rows == 2
    assert found.ece == pytest.approx((0.2 + 0.6) / 2) and found.nll == pytest.approx(
        -(math.log(0.8) + math.log(0.3)) / 2
    )
    assert calibration(model, {1: ELSEWHERE}, {1: []}) is None


def test_times_are_paired_interleaved_and_their_median(monkeypatch):
    ran, clock = [], [0.0]
    costs = {"routed": iter([50, 3, 3, 3, 30, 6]), "shared": iter([50, 1, 2, 1, 10, 3])}

    def run(name: str) -> None:
        ran.append(name)
        clock[0] += next(costs[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = time_ratio(lambda: run("routed"), lambda: run("shared"), repeats=1)
    assert ran == ["routed", "shared"] * 6  # warm-up, and never less than 5 pairs
    assert (found.first, found.second, found.repeats) == (3, 2, 5)
    assert (found.ratio, found.smallest, found.largest) == (3, 1.5, 3)  # ratios 3, 1.5, 3, 3, 2
