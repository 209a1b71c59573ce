"""Head temperatures: they make an over-sure expert's probabilities mean what they say, and change nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from twin_merging_hf import calibration
from twin_merging_hf.calibration import calibrate, calibration_rows
from twin_merging_hf.evaluation import ArtifactOutputs
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace


ENTRIES: list[dict[str, Any]] = [
    {"name": "a", "labels": ["x", "y"], "problem_type": "single_label_classification"},
    {"name": "b", "labels": ["u", "v", "w"], "problem_type": "single_label_classification"},
    {"name": "r", "labels": ["n"], "problem_type": "regression"},
]


def scene(monkeypatch: pytest.MonkeyPatch, rows: int, too_sure: float) -> tuple[Any, Any]:
    """A model of which expert `a` is `too_sure` times surer than it is right, and inputs with so many held-out rows."""
    rng = torch.Generator().manual_seed(0)
    right = torch.randn(rows, 6, generator=rng) * 2
    labels = {"a": torch.multinomial(right[:, :2].softmax(-1), 1, generator=rng)[:, 0]}
    labels["b"] = torch.multinomial(right[:, 2:5].softmax(-1), 1, generator=rng)[:, 0]
    labels["r"] = torch.zeros(rows)
    shown = right.clone()
    shown[:, :2] *= too_sure
    entries = [dict(entry) for entry in ENTRIES]
    model = SimpleNamespace(config=SimpleNamespace(experts=entries), label_space=LabelSpace.of(entries))
    parts = [SimpleNamespace(held_out=[{"label": value.item()} for value in labels[e["name"]]]) for e in entries]
    monkeypatch.setattr(
        calibration, "artifact_outputs", lambda m, chosen, *rest: ArtifactOutputs(shown, shown[: len(chosen)], shown)
    )
    return model, SimpleNamespace(rows=parts, processing=object())


@pytest.mark.parametrize("too_sure", [3.0, 0.4])
def test_the_temperature_is_how_much_too_sure_an_expert_is(monkeypatch, too_sure):
    model, inputs = scene(monkeypatch, 300, too_sure)
    fitted = calibrate(model, inputs)
    assert fitted["a"] == pytest.approx(too_sure, rel=0.35) and fitted["b"] == pytest.approx(1.0, rel=0.35)
    assert model.label_space.temperatures == (fitted["a"], fitted["b"], 1.0) and "r" not in fitted


def test_few_rows_change_nothing(monkeypatch):
    model, inputs = scene(monkeypatch, 99, 5.0)
    assert calibrate(model, inputs) == {} and model.label_space.temperatures == (1.0, 1.0, 1.0)
    assert calibration_rows(inputs) == 297


def test_a_temperature_divides_an_expert_s_outputs_in_logits_alone():
    plain = LabelSpace.of(ENTRIES)
    warm = LabelSpace.of([{**ENTRIES[0], "temperature": 2.5}, *ENTRIES[1:]])
    outputs, weights = torch.randn(4, 6), torch.tensor([[0.5, 0.3, 0.2]] * 4)
    logits, raw = warm.compose(outputs, weights)
    expected = outputs[:, :2].div(2.5).log_softmax(-1) + torch.tensor(0.5).log()
    torch.testing.assert_close(logits[:, :2], expected)
    torch.testing.assert_close(logits[:, 2:], plain.compose(outputs, weights)[0][:, 2:])
    assert torch.equal(raw, outputs)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("bad", [0, -1.0, True, "warm"])
def test_an_impossible_temperature_is_refused(world, bad):
    from twin_merging_hf.modeling import TwinMergingConfig

    content = TwinMergingConfig.from_pretrained(world.artifact("bert")).to_dict()
    content["experts"][0]["temperature"] = bad
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        TwinMergingConfig.from_dict(content)


def test_the_tiny_artifacts_have_no_temperature(world):
    """Their few rows leave every head as it is, so that `logits` there are plain log-probabilities."""
    assert set(world.model("bert").label_space.temperatures) == {1.0}
    assert tiny.LABELS
