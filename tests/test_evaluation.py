"""Scores: what is counted as right, and against which models."""

import numpy as np
import pytest
import torch

from tests import files, tiny
from twin_merging_hf import evaluation, preflight
from twin_merging_hf.evaluation import ArtifactOutputs, accuracy, agreement, artifact_outputs, pearson
from twin_merging_hf.inference import BATCH, batches, run_over
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.verdict import Verdict, describe, worst_confusion


class Model:
    """As much of an artifact as scoring needs."""

    def __init__(self, *experts: list[str]):
        entries = [
            {
                "name": f"e{t}",
                "labels": labels,
                "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
            }
            for t, labels in enumerate(experts)
        ]
        self.label_space = LabelSpace.of(entries)


def outputs(logits: list, expert_logits: list | None = None) -> ArtifactOutputs:
    rows = torch.tensor(logits, dtype=torch.float32)
    return ArtifactOutputs(rows, torch.tensor(expert_logits or logits, dtype=torch.float32), torch.ones(len(rows), 1))


def test_accuracy_is_the_share_of_rows_whose_largest_output_is_the_label():
    rows = [{"label": 0}, {"label": 1}, {"label": 1}, {"label": 0}]
    assert accuracy(torch.tensor([[2.0, 1], [2, 1], [0, 1], [0, 1]]), rows) == 0.5


def test_a_prediction_outside_of_the_task_is_wrong():
    rows = [{"label": 0}, {"label": 1}]
    union = torch.tensor([[9.0, 0, 5, 0], [0, 0, 0, 5]])
    assert accuracy(union, rows, [2, 3]) == 0.5
    assert accuracy(union[:, 2:], rows) == 1.0


def test_agreement_counts_equal_labels_and_other_experts_as_wrong():
    model = Model(["x", "y"], ["p", "q", "r"])
    reference = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
    found = outputs([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert agreement(model, 1, found, reference, 0.0) == 0.5


def test_agreement_knows_the_order_of_common_labels():
    model = Model(["x", "y"], ["y", "x"])
    assert model.label_space.kind == "same"
    reference = torch.tensor([[1.0, 0], [0, 1]])  # the second expert's own order: y, x
    assert agreement(model, 1, outputs([[0, 1], [1, 0]]), reference, 0.0) == 1.0
    assert agreement(model, 1, outputs([[1, 0], [0, 1]]), reference, 0.0) == 0.0


def test_a_regression_row_answered_by_another_expert_counts_as_the_mean():
    model = Model(["x", "y"], ["score"])
    own = torch.tensor([[0.1], [0.7], [0.4], [0.9]])
    routed = [[0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
    raw = [[0, 0, 0.1], [0, 0, 0.7], [0, 0, 0.4], [0, 0, 0.9]]
    values = evaluation.regression_values(model, 1, outputs(routed, raw), 0.5)
    assert values.tolist() == pytest.approx([0.1, 0.7, 0.5, 0.9])
    expected = np.corrcoef([0.1, 0.7, 0.5, 0.9], own[:, 0].numpy())[0, 1]
    assert agreement(model, 1, outputs(routed, raw), own, 0.5) == pytest.approx(expected, abs=1e-6)


def test_regressions_alone_give_their_weighted_value():
    model = Model(["score"], ["score"])
    found = outputs([[0.3], [0.6]])
    assert evaluation.regression_values(model, 1, found, 9.0).tolist() == pytest.approx([0.3, 0.6])


def test_pearson():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, generator=rng), torch.randn(50, generator=rng)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    assert pearson(a, 3 * a + 7) == pytest.approx(1) and pearson(a, -a) == pytest.approx(-1)
    assert pearson(a, torch.ones(50)) == 0.0


# ---- models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(world, kind):
    recipe = tiny.write_recipe(world.experts(kind), file="evaluation.yaml", data=True)
    opened = preflight.preflight(load_recipe(recipe))
    yield opened
    opened.close()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "base"])
def test_a_static_merge_is_a_merged_backbone_under_the_experts_own_head(world, kind, inputs, method):
    folder = world.experts(kind)
    base, *experts = (files.tensors_of(folder / name) for name in ("base", *tiny.LABELS))
    state = evaluation.static_merge(inputs, 1, method).state_dict()
    for name in inputs.experts[1].backbone:
        stored = [tensors[inputs.experts[1].places[name][1]] for tensors in (base, *experts)]
        o, a, b, c = stored
        expected = {"linear": (a + b + c) / 3, "base": o}.get(method, o + 0.3 * (a + b + c - 3 * o))
        torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-5)
    for name in inputs.experts[1].head_tensors():
        assert torch.equal(state[name], inputs.experts[1].tensor(name))


def test_the_linear_merge_is_the_artifacts_shared_model(world, kind, inputs):
    merged = evaluation.static_merge(inputs, 0, "linear").state_dict()
    shared = world.model(kind).shared.state_dict()
    for name in inputs.experts[0].backbone:
        torch.testing.assert_close(merged[name], shared[name], rtol=0, atol=1e-6)


def test_an_artifact_given_the_expert_answers_like_it(world, kind, inputs):
    model = world.model(kind)
    for t, name in enumerate(tiny.LABELS):
        rows = inputs.rows[t].held_out
        reference = evaluation.model_outputs(evaluation.checkpoint_model(inputs.experts[t]), rows, inputs.processing)
        found = artifact_outputs(model, rows, inputs.processing, name)
        columns = model.label_space.columns(t)
        torch.testing.assert_close(found.expert_logits[:, columns], reference, rtol=0, atol=1e-4)
        assert agreement(model, t, found, reference, 0.0) == 1.0
        assert torch.equal(found.expert_weights, torch.eye(3)[t].expand(len(rows), 3))


def test_answers_come_in_the_order_of_the_rows_whatever_the_batches(world):
    recipe = tiny.write_recipe(world.experts("bert"), file="evaluation.yaml")
    opened = preflight.preflight(load_recipe(recipe))
    rows = [{"text": " ".join(tiny.WORDS[i % 9 : i % 9 + 1 + i % 7])} for i in range(2 * BATCH + 3)]
    model = world.model("bert")
    together = artifact_outputs(model, rows, opened.processing).logits
    alone = torch.cat([artifact_outputs(model, [row], opened.processing).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    seen = [position for positions, _ in batches(rows, opened.processing) for position in positions]
    assert sorted(seen) == list(range(len(rows)))
    opened.close()


def test_running_leaves_the_mode_of_the_model_alone(world):
    opened = preflight.preflight(load_recipe(tiny.write_recipe(world.experts("bert"), file="evaluation.yaml")))
    model, modes = world.model("bert").train(), []

    def step(batch):
        modes.append((model.training, torch.is_grad_enabled()))
        return batch["input_ids"][:, :1]

    run_over(model, opened.rows[0].held_out, opened.processing, step)
    assert modes == [(False, False)] and model.training
    with pytest.raises(KeyError):
        run_over(model, opened.rows[0].held_out, opened.processing, lambda batch: batch["none"])
    assert model.training
    opened.close()


# ---- the verdict ------------------------------------------------------------------------------------------------


def test_the_worst_confusion_is_the_largest_share_off_the_diagonal():
    assert worst_confusion(["a", "b"], [[5, 0], [0, 3]]) is None
    found = worst_confusion(["a", "b", "c"], [[90, 10, 0], [0, 4, 1], [0, 0, 0]])
    assert found == {"expert": "b", "chosen": "c", "share": 0.2}


def test_a_verdict_in_words():
    text = "\n".join(describe(Verdict(None, None, None, None, None)))
    assert "no held-out rows" in text and "`data`" in text
    worst = {"expert": "a", "chosen": "b", "share": 0.25}
    verdict = Verdict({"a": 0.7, "b": 0.5}, {"a": 1.0, "b": 0.55}, {"a": 8, "b": 9}, 0.8, worst)
    text = "\n".join(describe(verdict))
    for part in ("70.0%", "100.0%", "80.0%", "25.0% of a's rows went to b", "a: routing loses", "b: its delta is cut"):
        assert part in text
    assert "no row" in "\n".join(describe(Verdict({"a": 1.0}, {"a": 1.0}, {"a": 3}, 1.0, None)))


def test_the_verdict_of_a_build_is_measured_on_held_out_rows(world, kind, inputs):
    """Counted once more, from the files alone."""
    report = files.read_json(world.artifact(kind) / "report.json")
    model = world.model(kind)
    right = 0
    for t, name in enumerate(tiny.LABELS):
        rows = inputs.rows[t].held_out
        own = evaluation.checkpoint_model(inputs.experts[t])
        reference = evaluation.model_outputs(own, rows, inputs.processing)
        found = artifact_outputs(model, rows, inputs.processing)
        share = agreement(model, t, found, reference, 0.0)
        assert report["verdict"]["agreement"][name] == pytest.approx(share, abs=1e-4)
        assert report["verdict"]["rows"][name] == len(rows)
        right += int((found.expert_weights.argmax(1) == t).sum())
    count = sum(len(rows.held_out) for rows in inputs.rows)
    assert report["router"]["held_out_rows"] == count
    assert report["verdict"]["router_accuracy"] == pytest.approx(right / count, abs=1e-4)
