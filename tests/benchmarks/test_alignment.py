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


@pytest.mark.parametrize("family", ["mlp", "resnet-bn"])
def test_a_zip_of_an_expert_with_itself_is_that_expert(family):
    models.register_perceptron()
    tasks = [data.make_task(source(1200), name) for name in ("low", "high")]
    experts = [models.new_model(family, task.names, 7).eval() for task in tasks]
    prefix = f"{experts[0].base_model_prefix}."
    own = {k: v for k, v in experts[0].state_dict().items() if k.startswith(prefix)}
    experts[1].load_state_dict(own, strict=False)
    batches = merges.calibration(tasks)
    merge = merges.zipped(experts, batches, 1.0, 0, same_task=False)
    plain = merges.average(experts, batches, same_task=False)  # statistics estimated anew, as those of the zip
    with torch.no_grad():
        for zipped, expert in zip(merge.models, plain.models, strict=True):
            inputs = tasks[0].test
            torch.testing.assert_close(zipped(**inputs).logits, expert(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_families_without_units_to_zip_have_no_zip(capsys):
    tasks = [data.make_task(source(1200), name) for name in ("low", "high")]
    experts = [models.new_model("resnet-gn", task.names, seed).eval() for seed, task in enumerate(tasks)]
    assert merges.zipped(experts, merges.calibration(tasks), 0.5, 0, same_task=False) is None
    assert "no site of this architecture can be zipped" in capsys.readouterr().out


def test_corners_of_the_landscape_lie_where_the_grid_says():
    landscape = importlib.import_module("alignment_landscape")
    grid = [
        {"toward_activations": a / 4, "toward_weights": b / 4, "x": 3 * a / 4 + b / 4, "y": 2 * b / 4}
        for a in range(-2, 7)
        for b in range(-2, 7)
    ]
    assert landscape.corner_place(grid, (1.0, 0.0)) == pytest.approx((3, 0))
    assert landscape.corner_place(grid, (0.0, 1.0)) == pytest.approx((1, 2))


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
