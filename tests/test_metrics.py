"""Metrics, calibration, normalised scores and intervals, against naive recomputations."""

import math
import random
import sys

import numpy as np
import pytest

from twin_merging_hf import TwinMergingError, metrics
from twin_merging_hf.metrics import (
    METRICS,
    OUTSIDE,
    ScoreTable,
    bootstrap_difference,
    expected_calibration_error,
    metric_for,
    negative_log_likelihood,
)


def drawn(seed: int, classes: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, labels): two thirds right, a tenth outside."""
    rng = random.Random(seed)
    labels = [rng.randrange(classes) for _ in range(rows)]
    wrong = lambda: rng.choice([OUTSIDE, *range(classes)])  # noqa: E731
    return np.array([y if rng.random() < 0.66 else wrong() for y in labels]), np.array(labels)


def naive_f1(predictions, labels, positive) -> float:
    pairs = list(zip(predictions, labels, strict=True))
    hits = sum(p == y == positive for p, y in pairs)
    false_alarms = sum(p == positive != y for p, y in pairs)
    missed = sum(y == positive != p for p, y in pairs)
    return 2 * hits / (2 * hits + false_alarms + missed) if hits else 0.0


def naive_correlation(a, b) -> float:
    n, mean_a, mean_b = len(a), sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / n
    deviations = [math.sqrt(sum((x - m) ** 2 for x in v) / n) for v, m in ((a, mean_a), (b, mean_b))]
    return covariance / (deviations[0] * deviations[1])


def naive_matthews(predictions, labels) -> float:
    """R_K as the correlation of one-hot rows (Gorodkin 2004)."""
    classes = sorted({*map(int, predictions), *map(int, labels)})
    n = len(labels)

    def covariance(u, v) -> float:
        total = 0.0
        for c in classes:
            x, y = [float(i == c) for i in u], [float(i == c) for i in v]
            total += sum(p * q for p, q in zip(x, y, strict=True)) / n - sum(x) / n * sum(y) / n
        return total

    return covariance(predictions, labels) / math.sqrt(
        covariance(predictions, predictions) * covariance(labels, labels)
    )


# ---- metrics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_class_metrics(seed, classes):
    predictions, labels = drawn(seed, classes)
    right = sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)
    assert metrics.accuracy(predictions, labels) == pytest.approx(right)
    assert metrics.exact_match(predictions, labels) == pytest.approx(right)
    f1 = [naive_f1(predictions, labels, c) for c in range(classes)]
    assert metrics.macro_f1(predictions, labels) == pytest.approx(sum(f1) / classes)
    assert metrics.matthews(predictions, labels) == pytest.approx(naive_matthews(predictions, labels))
    if classes == 2:
        assert metrics.accuracy_f1(predictions, labels) == pytest.approx((right + f1[1]) / 2)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "matthews", "accuracy_f1", "exact_match"])
def test_a_prediction_outside_of_the_task_costs_and_perfection_is_one(name):
    labels = np.array([0, 1, 1, 0, 1, 0])
    assert METRICS[name](labels, labels) == 1.0
    outside = labels.copy()
    outside[:2] = OUTSIDE
    assert METRICS[name](outside, labels) < 1.0
    assert METRICS[name](np.full(6, OUTSIDE), labels) <= 0.0


@pytest.mark.parametrize("seed", range(5))
def test_correlations(seed):
    rng = random.Random(seed)
    a = [rng.gauss(0, 1) for _ in range(40)]
    b = [math.exp(x) + rng.gauss(0, 0.3) for x in a]  # monotone but curved: the two correlations differ
    ranks = [[sorted(v).index(x) for x in v] for v in (a, b)]
    linear, monotone = naive_correlation(a, b), naive_correlation(*ranks)
    assert metrics.pearson(a, b) == pytest.approx(linear) and metrics.spearman(a, b) == pytest.approx(monotone)
    assert metrics.pearson_spearman(a, b) == pytest.approx((linear + monotone) / 2)
    assert abs(linear - monotone) > 1e-3


def test_ties_share_their_rank():
    assert metrics.spearman([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(
        naive_correlation([0.5, 0.5, 2, 3], [0, 1, 2.5, 2.5])
    )


def test_a_constant_has_no_correlation_and_one_row_is_refused():
    assert metrics.pearson([1, 1, 1], [1, 2, 3]) == metrics.spearman([1, 2, 3], [4, 4, 4]) == 0.0
    with pytest.raises(TwinMergingError, match="at least 2 rows, got 1"):
        metrics.pearson([1], [2])


def test_text_metrics():
    assert metrics.exact_match([" a  b", "A b", "c"], ["a b", "a b", "c "]) == pytest.approx(2 / 3)
    # Longest common subsequences of 2 and of 0 words: recall 2/3 and precision 2/4, F = 4/7.
    assert metrics.rouge_l(["the cat sat down", "x"], ["the dog sat", "y"]) == pytest.approx((4 / 7 + 0) / 2)
    with pytest.raises(ValueError):
        metrics.exact_match(["a"], ["a", "b"])


# ---- which metric -----------------------------------------------------------------------------------------------


def test_the_default_metric_follows_the_task():
    assert metric_for("a", "classes", 3).name == "accuracy" and metric_for("a", "regression", 1).name == "pearson"
    assert metric_for("a", "classes", 2, "matthews").name == "matthews"


@pytest.mark.parametrize(
    ("kind", "labels", "name", "says"),
    [
        ("classes", 2, "pearson", "does not fit.*accuracy, macro_f1, matthews"),
        ("regression", 1, "accuracy", "does not fit.*pearson"),
        ("classes", 2, "rouge_l", "does not fit"),
        ("classes", 2, "acuracy", "is no metric"),
        ("classes", 3, "accuracy_f1", "two labels, but it has 3"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(kind, labels, name, says):
    with pytest.raises(TwinMergingError, match=rf"task 'mrpc'.*{says}"):
        metric_for("mrpc", kind, labels, name)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("matthews", "sklearn", "scikit-learn"), ("pearson", "scipy", "scipy")],
)
def test_a_missing_package_is_named_before_any_work(monkeypatch, name, module, package):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    kind = "regression" if name == "pearson" else "classes"
    with pytest.raises(TwinMergingError, match=rf"needs {package}.*pip install 'twin-merging-hf\[evaluate\]'"):
        metric_for("a", kind, 2, name)
    assert metric_for("a", "classes", 2).name == "accuracy"  # needs no package


# ---- how sure ---------------------------------------------------------------------------------------------------


def naive_ece(probabilities, labels, bins) -> float:
    total = 0.0
    for b in range(bins):
        inside = [i for i, row in enumerate(probabilities) if b / bins < max(row) <= (b + 1) / bins]
        if inside:
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            right = sum(list(probabilities[i]).index(max(probabilities[i])) == labels[i] for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(right - confidence)
    return total


@pytest.mark.parametrize("bins", [15, 10, 1])
@pytest.mark.parametrize("seed", range(4))
def test_calibration_error(seed, bins):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([0.3, 0.5, 0.4, 0.2], size=200)
    labels = rng.integers(4, size=200)
    expected = naive_ece(probabilities.tolist(), labels.tolist(), bins)
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected)


def test_a_calibrated_mixture_has_no_error_and_an_overconfident_one_has():
    probabilities = [[0.75, 0.25]] * 4
    assert expected_calibration_error(probabilities, [0, 0, 0, 1]) == pytest.approx(0)
    assert expected_calibration_error([[1.0, 0.0]] * 4, [0, 0, 0, 1]) == pytest.approx(0.25)
    # In one bin, 0.9 right and 0.1 wrong cancel; in bins of their own they do not.
    mixed = [[0.9, 0.1], [0.6, 0.4]]
    assert expected_calibration_error(mixed, [0, 1], bins=1) == pytest.approx(0.25)
    assert expected_calibration_error(mixed, [0, 1], bins=15) == pytest.approx((0.1 + 0.6) / 2)
    # An edge belongs to the bin below it: 0.5 and 0.9 share no bin of two.
    assert expected_calibration_error([[0.5, 0.5], [0.9, 0.1]], [0, 1], bins=2) == pytest.approx((0.5 + 0.9) / 2)


def test_negative_log_likelihood():
    rows = np.log([[0.5, 0.5], [0.2, 0.8]])
    assert negative_log_likelihood(rows, [0, 1]) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)


# ---- raw and normalised -----------------------------------------------------------------------------------------

# The authors' README: raw scores of the experts, and Twin-Merging's as per cent of them.
EXPERTS = {"CoLA": 56.52, "SST-2": 94.72, "MRPC": 87.99, "STS-B": 86.36, "QQP": 89.71, "MNLI": 87.01, "QNLI": 91.71,
           "RTE": 66.43}  # fmt: skip
TWIN = {"CoLA": 101.06, "SST-2": 99.64, "MRPC": 97.51, "STS-B": 82.67, "QQP": 98.06, "MNLI": 94.35, "QNLI": 98.78,
        "RTE": 94.56}  # fmt: skip


def test_the_authors_row_gives_the_authors_mean():
    raw = {task: TWIN[task] * EXPERTS[task] / 100 for task in TWIN}
    table = ScoreTable(raw, EXPERTS)
    assert round(table.normalised_mean, 2) == 95.83
    assert table.normalised == pytest.approx(TWIN) and table.minimum == ("STS-B", pytest.approx(82.67))
    assert round(sum(EXPERTS.values()) / 8, 2) == 82.56 and round(table.raw_mean, 1) == 79.0
    # The ratio of means is another number, so the test can tell the two apart.
    assert abs(100 * sum(raw.values()) / sum(EXPERTS.values()) - 95.83) > 0.02


@pytest.mark.parametrize("own", [0.0, -0.1, None])
def test_a_ratio_to_nothing_is_undefined_and_never_left_out(own):
    table = ScoreTable({"a": 0.5, "b": 0.4}, {"a": 0.5, "b": own})
    assert table.normalised == {"a": 100.0, "b": None} and table.undefined == ["b"]
    assert table.normalised_mean is None and table.minimum is None and table.raw_mean == pytest.approx(0.45)
    assert table.as_dict()["minimum"] is None


def test_a_negative_score_of_the_method_is_a_negative_per_cent():
    assert ScoreTable({"a": -0.1}, {"a": 0.5}).normalised == {"a": pytest.approx(-20)}


# ---- intervals --------------------------------------------------------------------------------------------------


def test_the_interval_is_paired_seeded_and_holds_the_difference():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    better = np.where(rng.random(400) < 0.9, labels, 1 - labels)
    worse = np.where(rng.random(400) < 0.8, better, 1 - better)
    found = bootstrap_difference(worse, better, labels)
    assert found.difference == pytest.approx((worse == labels).mean() - (better == labels).mean())
    assert found.low < found.difference < found.high < 0
    assert bootstrap_difference(worse, better, labels) == found
    assert bootstrap_difference(worse, better, labels, seed=1) != found
    # The normal approximation of a paired difference, from the rows' own differences.
    spread = 1.96 * np.std((worse == labels).astype(float) - (better == labels)) / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.15)


def test_the_quick_way_of_accuracy_is_the_slow_way():
    predictions, labels = drawn(0, 3)
    other, _ = drawn(1, 3)
    slow = bootstrap_difference(predictions, other, labels, lambda p, y: metrics.accuracy(p, y), resamples=200)
    quick = bootstrap_difference(predictions, other, labels, METRICS["accuracy"], resamples=200)
    assert (quick.difference, quick.low, quick.high) == pytest.approx((slow.difference, slow.low, slow.high), abs=1e-12)


def test_equal_methods_differ_by_nothing():
    values, labels = np.linspace(0, 1, 30), np.linspace(0, 1, 30) ** 2
    found = bootstrap_difference(values, values, labels, METRICS["pearson"], resamples=50)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
