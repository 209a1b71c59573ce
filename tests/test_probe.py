"""The proof at the end of a build: it passes for true artifacts and for no others."""

import pytest
import torch

from tests import tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.modeling import deltas_twin_merging as deltas
from twin_merging_hf.modeling.call_twin_merging import CallWeights
from twin_merging_hf.probe import TOLERANCE, dense_model, probe, probe_weights, random_inputs


def test_artifacts_pass_at_any_rank(world, kind):
    assert probe(world.model(kind)) < TOLERANCE / 10
    narrow = world.model(kind, exclusive={"rank": 2, "dtype": "bf16"}, router={"type": "projection"}, data=False)
    assert probe(narrow, seed=5) < TOLERANCE / 10


def test_probing_is_reproducible_and_leaves_the_random_state_alone(world):
    model = world.model("bert")
    state = torch.get_rng_state()
    first = random_inputs(model.shared, 6, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], value) for name, value in random_inputs(model.shared, 6, 3).items())
    assert not torch.equal(first["input_ids"], random_inputs(model.shared, 6, 4)["input_ids"])


def test_random_inputs_are_inputs(world, kind):
    model = world.model(kind)
    inputs = random_inputs(model.shared, 7, 0)
    if kind == "vit":
        assert inputs["pixel_values"].shape == (7, 3, tiny.IMAGE, tiny.IMAGE)
        return
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.min() >= 0 and ids.max() < tiny.VOCABULARY
    assert set(mask.unique().tolist()) == {0, 1} and (mask[:, 0] == 1).all()
    assert (ids[mask == 0] == 0).all() and (ids[mask == 1] != 0).all()


def test_weights_try_each_expert_none_and_mixtures():
    weights = probe_weights(3)
    assert weights.shape == (6, 3) and torch.equal(weights[:3], torch.eye(3)) and not weights[3].any()
    assert len(set(weights[5].tolist())) == 3 and float(weights[5].sum()) == pytest.approx(1)


def test_the_dense_side_is_the_expert_itself(world, kind):
    """Full rank: shared plus one expert's deltas is that expert's checkpoint, tensor by tensor."""
    model = world.model(kind)
    dense = dense_model(model.config, dict(model.state_dict()), torch.eye(3)[1], 1)
    expert = type(dense).from_pretrained(world.experts(kind) / "b")
    for name, value in expert.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], value, rtol=0, atol=2e-5)


def break_rule(monkeypatch, rule: str, factor: float) -> None:
    """Let the deltas of one rule act `factor` times as strongly as they should."""
    if rule in deltas._TERMS:
        term = deltas._TERMS[rule]
        monkeypatch.setitem(deltas._TERMS, rule, lambda *args: factor * term(*args))
        return
    if rule == "table":
        tables = deltas.tables
        monkeypatch.setattr(deltas, "tables", lambda *args: factor * tables(*args))
        return
    owner, method = {
        "linear": (deltas.MatrixForward, "_factored"),
        "linear bias": (deltas.MatrixForward, "_row_bias"),
        "layer_norm": (deltas.NormForward, "__call__"),
    }[rule]
    real = getattr(owner, method)

    def scaled(self, *args):
        result = real(self, *args)
        if rule == "linear bias":
            return None if result is None else factor * result
        plain = type(self.module).forward(self.module, args[0])
        return plain + factor * (result - plain.view(result.shape))

    monkeypatch.setattr(owner, method, scaled)


RULES = {
    "linear": "bert", "linear bias": "bert", "layer_norm": "bert", "embedding": "bert", "conv2d": "vit", "bias": "vit",
    "table": "vit",
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_a_term_that_acts_wrongly_is_caught(world, monkeypatch, rule, factor):
    model = world.model(RULES[rule])
    break_rule(monkeypatch, rule, factor)
    with pytest.raises(TwinMergingError, match="does not compute what it should"):
        probe(model)


def test_rows_that_meet_are_caught(world, monkeypatch):
    """Every row with the weights of the whole batch: right alone, wrong together."""
    real = CallWeights.columns
    monkeypatch.setattr(
        CallWeights,
        "columns",
        lambda self, *args: real(self, *args).mean(0, keepdim=True).expand_as(real(self, *args)),
    )
    with pytest.raises(TwinMergingError, match="does not compute what it should"):
        probe(world.model("bert"))
