"""The alignment benchmark: tasks, modes and summary do what the table says; nothing is trained here."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
data, models, merges, summary = (
    importlib.import_module(f"alignment_{name}") for name in ("data", "models", "merges", "summary")
)


def source(rows: int = 400):
    """Rows whose pixels tell their digit, a quarter of them test rows."""
    labels = torch.arange(rows) % 10
    pixels = torch.randn(rows, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + labels[:, None, None, None]
    return data.Source({"pixel_values": pixels}, labels, [str(d) for d in range(10)], torch.arange(rows) % 40 < 10)


def test_halves_have_their_own_labels_counted_from_zero():
    rows = source()
    low, high, odd = (data.make_task(rows, name) for name in ("low", "high", "odd"))
    assert low.names == ["0", "1", "2", "3", "4"] and high.names == ["5", "6", "7", "8", "9"]
    assert set(high.train_labels.tolist()) == set(range(5)) and len(low.train_labels) + len(high.train_labels) == 300
    digits = high.test["pixel_values"].mean(dim=(1, 2, 3)).round().long()
    assert torch.equal(digits - 5, high.test_labels)
    digits = odd.test["pixel_values"].mean(dim=(1, 2, 3)).round().long()
    assert torch.equal(digits % 2, odd.test_labels)


@pytest.mark.parametrize("family", ["mlp", "resnet-bn"])
def test_an_expert_in_another_order_of_units_is_brought_back(family):
    models.register_perceptron()
    tasks = [data.make_task(source(), "all")] * 2
    expert = models.new_model(family, tasks[0].names, 0).eval()
    batches = merges.calibration(tasks)
    other = copy.deepcopy(expert)
    layout = importlib.import_module("twin_merging_hf.alignment").layout_of(expert)
    permutation = importlib.import_module("twin_merging_hf.alignment.permutation").Permutation
    permutation.random(layout, 3).apply(other)
    inputs = tasks[0].test
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, expert(**inputs).logits, atol=1e-4, rtol=1e-4)
        moved = merges.aligned([expert, other], batches, 0.5, 0)
        for name, value in moved[1].state_dict().items():
            torch.testing.assert_close(value, expert.state_dict()[name], atol=1e-6, rtol=0)


def test_a_merge_of_one_expert_with_itself_scores_as_that_expert():
    tasks = [data.make_task(source(1200), name) for name in ("low", "high")]
    experts = [models.new_model("mlp", task.names, 7).eval() for task in tasks]
    experts[1].perceptron.load_state_dict(experts[0].perceptron.state_dict())
    merge = merges.average(experts, merges.calibration(tasks), same_task=False)
    assert merges.scores(merge.models, tasks) == merges.scores(experts, tasks)
    fit, report = merges.fitted(merge, experts, tasks)
    assert report.loss < 1e-6 and merges.scores(fit.models, tasks)["joint"] == merges.scores(experts, tasks)["joint"]


def test_the_joint_score_takes_the_largest_logit_of_both_heads():
    tasks = [data.make_task(source(), name) for name in ("low", "high")]
    experts = [models.new_model("mlp", task.names, seed).eval() for seed, task in enumerate(tasks)]
    with torch.no_grad():
        experts[1].classifier.bias.fill_(1e6)  # always surer, and so right nowhere but on its own rows
    found = merges.scores(experts, tasks)
    second = float(len(tasks[1].test_labels)) / (len(tasks[0].test_labels) + len(tasks[1].test_labels))
    assert found["joint"] == pytest.approx(found["second"] * second)


def test_the_summary_pairs_seeds():
    def cell(seed, mode, joint):
        return {
            "family": "f",
            "pairing": "p",
            "seed": seed,
            "mode": mode,
            "weight_share": "",
            "mean": 1,
            "joint": joint,
        }

    rows = [cell(0, "average", 10), cell(1, "average", 30), cell(0, "zip", 15), cell(1, "zip", 37)]
    found = {row["mode"]: row for row in summary.summarise(rows)}
    assert found["zip"]["over_average"] == 6 and found["zip"]["joint"] == 26
    # Differences 5 and 7: deviation sqrt(2), error 1, Student's t with one degree of freedom 12.706.
    assert (found["zip"]["low"], found["zip"]["high"]) == (
        pytest.approx(6 - 12.71, abs=0.01),
        pytest.approx(18.71, abs=0.01),
    )
    assert summary.interval([1.0]) == ("", "")
