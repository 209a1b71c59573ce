"""Alignment: the function stays, planted permutations are found, and nothing odd in a model upsets it (T1-T3, T6-T8, T10)."""

import math

import pytest
import torch

from tests.alignment import zoo
from twin_merging_hf.alignment import Permutation, align, align_all
from twin_merging_hf.alignment.verification import outputs


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _same(one: Permutation, other: Permutation) -> bool:
    parts = [(one.index, other.index), (one.sign, other.sign)]
    return all(torch.equal(a[name], b[name]) for a, b in parts for name in a)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_random_legal_permutation_leaves_the_function_as_it_was(name):
    reference, batch = zoo.model(name), zoo.batches(name)[0]
    copied, permutation = zoo.planted(name, seed=3)
    assert not permutation.is_identity
    assert not torch.equal(next(copied.parameters()), next(reference.parameters()))
    assert _relative(outputs(copied, batch), outputs(reference, batch)) < 1e-5


@pytest.mark.parametrize("weight_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_planted_permutation_is_recovered_to_the_last_unit_under_noise(name, weight_share):
    reference, batches = zoo.model(name), zoo.batches(name)
    noisy, permutation = zoo.planted(name, seed=7, noise=0.05)
    clean, _ = zoo.planted(name, seed=7)
    result = align(reference, noisy, batches, weight_share=weight_share, layout=zoo.layout(name))
    restored = result.state_dict(clean.state_dict())
    wrong = [n for n, tensor in reference.state_dict().items() if not torch.equal(restored[n], tensor)]
    # Restored to the last bit: so are planted signs, and so is a mean of both models.
    assert wrong == []
    assert result.report.objective > 0.9 and result.report.objective > result.report.identity_objective + 0.3


@pytest.mark.parametrize("name", zoo.ONE_OF_EACH)
def test_weights_alone_recover_it_without_any_data(name):
    noisy, _ = zoo.planted(name, seed=9, noise=0.01)
    clean, _ = zoo.planted(name, seed=9)
    result = align(zoo.model(name), noisy, layout=zoo.layout(name))
    assert result.report.weight_share == 1.0
    restored = result.state_dict(clean.state_dict())
    assert all(torch.equal(restored[n], tensor) for n, tensor in zoo.model(name).state_dict().items())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_what_is_found_for_a_stranger_leaves_it_the_expert_it_was(name, tmp_path):
    # Decisive where a planted permutation is not: here the two models share nothing.
    reference, expert, batches = zoo.model(name), zoo.model(name, seed=1), zoo.batches(name)
    aligned = zoo.fresh(name, seed=1)
    result = align(reference, expert, batches, layout=zoo.layout(name), max_sweeps=3)
    result.apply(aligned)
    assert not result.permutation.is_identity
    assert _relative(outputs(aligned, batches[0]), outputs(expert, batches[0])) < 1e-5
    aligned.save_pretrained(tmp_path)
    loaded, info = type(aligned).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.to_dict().keys() == expert.config.to_dict().keys()
    assert _relative(outputs(loaded, batches[0]), outputs(expert, batches[0])) < 1e-5
    for tied, source in aligned.all_tied_weights_keys.items():
        parameters = dict(loaded.named_parameters(remove_duplicate=False))
        assert parameters[tied] is parameters[source]


@pytest.mark.parametrize("weight_share", [0.5, 1.0])
def test_the_objective_of_a_stranger_rises_at_each_accepted_sweep_above_the_identity(weight_share):
    report = align(
        zoo.model("bert"), zoo.model("bert", seed=1), zoo.batches("bert"), weight_share=weight_share,
        layout=zoo.layout("bert"),
    ).report  # fmt: skip
    accepted = [value for value, kept in zip(report.objectives, report.accepted, strict=True) if kept]
    assert len(accepted) >= 2 and accepted == sorted(accepted)
    assert report.objective == accepted[-1] > report.identity_objective


@pytest.mark.parametrize("weight_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", zoo.ONE_OF_EACH)
def test_experts_of_one_start_stay_where_they_are(name, weight_share):
    expert = zoo.fresh(name)
    with torch.no_grad():
        for tensor in expert.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape))
    result = align(zoo.model(name), expert, zoo.batches(name), weight_share=weight_share, layout=zoo.layout(name))
    assert result.permutation.is_identity
    assert result.report.objective >= result.report.identity_objective


def test_the_identity_is_kept_where_the_search_finds_nothing_better():
    # Two blocks of units that are the same in all but noise: a start that is stuck with the wrong one is given up.
    reference, expert = zoo.model("bert"), zoo.fresh("bert")
    constant = [{name: value[:1] * 0 + value[:1] for name, value in zoo.batches("bert")[0].items()}]
    result = align(reference, expert, constant, weight_share=0.5, layout=zoo.layout("bert"), max_sweeps=0)
    assert result.report.objective >= result.report.identity_objective


def test_the_same_seed_gives_the_same_permutation_and_another_order_of_experts_too():
    models = [zoo.model("bert", seed) for seed in range(3)]
    batches, layout = zoo.batches("bert"), zoo.layout("bert")
    once = align_all(models, batches, layout=layout, max_sweeps=3)
    again = align_all([models[0], models[2], models[1]], batches, layout=layout, max_sweeps=3)
    assert once[0] is None and again[0] is None
    assert _same(once[1].permutation, again[2].permutation) and _same(once[2].permutation, again[1].permutation)
    other = align_all([models[1], models[0]], batches, reference=1, layout=layout, max_sweeps=3)
    assert other[1] is None and _same(other[0].permutation, once[1].permutation)
    for model, result in zip(models[1:], once[1:], strict=True):
        moved = result.state_dict(model.state_dict())
        assert {n: t.shape for n, t in moved.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_models_keep_mode_hooks_and_weights():
    reference, expert = zoo.fresh("resnet-basic"), zoo.fresh("resnet-basic", seed=1)
    expert.train()
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    align(reference, expert, zoo.batches("resnet-basic"), layout=zoo.layout("resnet-basic"), max_sweeps=1)
    assert expert.training and not reference.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in expert.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*reference.modules(), *expert.modules()])


def _odd_units(model) -> None:
    """Dead, constant and duplicated feed-forward units in the first layer."""
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        up, bias, down = layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight
        up[0], bias[0] = 0.0, -30.0
        up[1], bias[1] = 0.0, 3.0
        up[2], bias[2], down[:, 2] = 0.0, 0.0, 0.0
        up[4], bias[4], down[:, 4] = up[3], bias[3], down[:, 3]


@pytest.mark.parametrize("weight_share", [0.0, 0.5, 1.0])
def test_dead_constant_and_duplicated_units_do_no_harm(weight_share):
    reference, expert = zoo.fresh("bert"), zoo.fresh("bert", seed=1)
    _odd_units(reference)
    _odd_units(expert)
    report = align(
        reference, expert, zoo.batches("bert"), weight_share=weight_share, layout=zoo.layout("bert"), max_sweeps=2
    ).report
    assert all(math.isfinite(value) for value in [*report.objectives, report.identity_objective])
    assert all(site.similarity is None or math.isfinite(site.similarity) for site in report.sites.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_recovered_exactly(dtype):
    reference, (copied, _) = zoo.fresh("bert").to(dtype), zoo.planted("bert", seed=5)
    copied = copied.to(dtype)
    batches = zoo.batches("bert") if dtype is torch.bfloat16 else None  # half floats do not run everywhere
    result = align(reference, copied, batches, layout=zoo.layout("bert"))
    restored = result.state_dict(copied.state_dict())
    assert all(torch.equal(restored[n], tensor) for n, tensor in reference.state_dict().items())
    assert all(tensor.dtype is dtype for tensor in restored.values())


def test_one_batch_of_one_row_suffices_to_finish():
    batch = {name: value[1:2] for name, value in zoo.batches("bert")[0].items()}
    result = align(zoo.model("bert"), zoo.model("bert", seed=1), [batch], layout=zoo.layout("bert"), max_sweeps=1)
    assert math.isfinite(result.report.objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_share": 1.5}, "between 0 and 1"),
        ({"similarity": "euclid"}, "'pearson' or 'cosine'"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        align(zoo.model("bert"), zoo.model("bert", seed=1), layout=zoo.layout("bert"), **options)


def test_models_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in their tensors"):
        align(zoo.model("bert"), zoo.model("bert-tokens"), layout=zoo.layout("bert"))
