"""Specifications are proved before use; each rule of each family is one without which the proof fails."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.alignment import zoo
from twin_merging_hf.alignment import Hook, Site, Spec, align, register_spec, registry, rule, verify_spec
from twin_merging_hf.alignment.spec import work_out
from twin_merging_hf.alignment.verification import check_function
from twin_merging_hf.errors import TwinMergingError


def _spec(name: str) -> Spec:
    model = zoo.model(name)
    return registry.family_of(model).spec(model.config, set(model.state_dict()))


def _check(spec: Spec, name: str) -> None:
    model = zoo.fresh(name)
    check_function(model, work_out(spec, model))


@pytest.mark.parametrize("name", zoo.ONE_OF_EACH)
def test_no_rule_can_be_left_out_of_a_family(name):
    spec, state = _spec(name), set(zoo.model(name).state_dict())
    tried = 0
    for position, each in enumerate(spec.rules):
        consumed = [i for i, axis in enumerate(each.axes) if axis is not None and axis[0] == "-"]
        present = any(name.startswith(each.tensors.split("{")[0]) for name in state)
        if not consumed or not present or "layers.1" in each.tensors:
            continue
        axes = tuple(None if i in consumed else axis for i, axis in enumerate(each.axes))
        broken = [*spec.rules]
        broken[position] = replace(each, axes=axes)
        if any(f"no rule covers {tensor!r}" for tensor in ()) or work_out(spec, zoo.model(name)).axes == _axes(
            replace(spec, rules=tuple(broken)), name
        ):
            continue  # a rule for heads that this model does not have
        tried += 1
        with pytest.raises(ValueError, match="wrong|differ"):
            _check(replace(spec, rules=tuple(broken)), name)
    assert tried >= 3


def _axes(spec: Spec, name: str) -> dict | None:
    try:
        return work_out(spec, zoo.model(name)).axes
    except ValueError:
        return None


def _with_site(spec: Spec, name: str, **changes) -> Spec:
    assert any(site.name == name for site in spec.sites)
    return replace(spec, sites=tuple(replace(s, **changes) if s.name == name else s for s in spec.sites))


@pytest.mark.parametrize(
    ("name", "site", "changes"),
    [
        ("llama-gqa2-biases", "qk.{i}", {"fixed": False}),  # rotary positions
        ("bert", "res", {"signed": True}),  # LayerNorm takes the mean
        ("bert", "ff.{i}", {"signed": True}),  # GELU is not odd
        ("resnet-basic", "r.stem", {"signed": True}),  # ReLU
    ],
)
def test_a_freedom_too_many_is_noticed(name, site, changes):
    with pytest.raises(ValueError, match="changes the outputs"):
        _check(_with_site(_spec(name), site, **changes), name)


def test_query_heads_and_value_heads_cannot_move_apart():
    # What the authors' code does: the aligned expert is another model.
    spec = _spec("bert")
    sites = (*spec.sites, Site("h2.{i}", 4))
    sites = tuple(replace(site, parent="h2.{i}") if site.name == "vo.{i}" else site for site in sites)
    rules = tuple(
        replace(each, axes=tuple(axis and axis.replace("h.{i}/vo.{i}", "h2.{i}/vo.{i}") for axis in each.axes))
        for each in spec.rules
    )
    with pytest.raises(ValueError, match="changes the outputs"):
        _check(replace(spec, sites=sites, rules=rules), "bert")


def test_channels_cannot_cross_the_groups_of_a_group_norm():
    spec = _spec("bit")
    flat = tuple(replace(s, size=1) if s.name.startswith("g.") else replace(s, size=s.size * 4) for s in spec.sites)
    with pytest.raises(ValueError, match="changes the outputs"):
        _check(replace(spec, sites=flat), "bit")


def test_heads_cannot_cross_groups_that_share_keys_and_values():
    spec = _spec("qwen3-gqa2")
    sites = tuple({"kv.{i}": replace(s, size=1), "rep.{i}": replace(s, size=4)}.get(s.name, s) for s in spec.sites)
    rules = tuple(
        each
        if "k_proj" not in each.tensors and "v_proj" not in each.tensors
        else replace(each, axes=(None, each.axes[1]))
        for each in spec.rules
    )
    with pytest.raises(ValueError, match="changes the outputs"):
        _check(replace(spec, sites=sites, rules=rules), "qwen3-gqa2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda spec: replace(spec, rules=spec.rules[1:]),
            "no rule covers tensor 'bert.embeddings.word_embeddings.weight'",
        ),
        (lambda spec: _with_site(spec, "res", size=31), "has 32 entries, its sites 31"),
        (lambda spec: _with_site(spec, "vo.{i}", parent="nobody"), "no site without parent"),
        (lambda spec: replace(spec, rules=(rule("bert.pooler.dense.weight", "+pool"), *spec.rules)), "has 2 axes"),
        (lambda spec: replace(spec, rules=(rule("bert.pooler.dense.weight", "+x", None), *spec.rules)), "no site 'x'"),
        (
            lambda spec: replace(spec, rules=(rule("bert.pooler.dense.weight", "pool", None), *spec.rules)),
            "starts with",
        ),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        work_out(change(_spec("bert")), zoo.model("bert"))


def test_tied_tensors_must_have_one_rule():
    spec = _spec("gpt2-tied")
    untied = replace(spec, rules=(rule("lm_head.weight", None, None), *spec.rules))
    with pytest.raises(ValueError, match="are one tensor"):
        work_out(untied, zoo.model("gpt2-tied"))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_unknown_types_and_models_without_head_are_refused(name):
    with pytest.raises(TwinMergingError, match="has no head"):
        verify_spec(zoo.model(name).base_model)
    model = zoo.fresh(name)
    model.config.model_type = "perceiver"
    with pytest.raises(TwinMergingError, match="register_spec"):
        verify_spec(model)


class MlpConfig(PretrainedConfig):
    model_type = "twin_merging_test_mlp"


class Mlp(PreTrainedModel):
    """A user's own model: two hidden layers."""

    config_class = MlpConfig
    main_input_name = "inputs"

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 12)])
        self.out = nn.Linear(12, 3)
        self.post_init()

    def forward(self, inputs, labels=None):
        for layer in self.layers:
            inputs = layer(inputs).relu()
        return SequenceClassifierOutput(logits=self.out(inputs))


def _mlp_spec(config, names):
    return Spec(
        sites=(Site("a", 16, zips=True), Site("b", 12, zips=True)),
        rules=(
            rule("layers.0.weight", "+a", None),
            rule("layers.1.weight", "+b", "-a"),
            rule("out.weight", None, "-b"),
        ),
        hooks=(Hook("in", "layers.1", "a"), Hook("in", "out", "b")),
    )


@pytest.fixture
def own_types(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})


def _mlp_inputs(model):
    return {"inputs": torch.randn(16, 6, generator=torch.Generator().manual_seed(0))}


def test_users_register_their_own_models(own_types):
    register_spec(MlpConfig.model_type, _mlp_spec, lambda: Mlp(MlpConfig()), _mlp_inputs)
    reference, expert = Mlp(MlpConfig()), Mlp(MlpConfig())
    batch = _mlp_inputs(None)
    before = expert(**batch).logits
    result = align(reference, expert, [batch])
    result.apply(expert)
    assert not result.permutation.is_identity
    torch.testing.assert_close(expert(**batch).logits, before, rtol=1e-5, atol=1e-6)


def test_a_wrong_spec_of_ones_own_is_not_registered(own_types):
    def wrong(config, names):
        spec = _mlp_spec(config, names)
        return replace(spec, rules=(*spec.rules[:2], rule("out.weight", None, None)))

    with pytest.raises(ValueError, match="changes the outputs"):
        register_spec(MlpConfig.model_type, wrong, lambda: Mlp(MlpConfig()), _mlp_inputs)
    assert registry._FAMILIES == {}
