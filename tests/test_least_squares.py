"""The fitted shared model: streamed equations equal a direct solve, and no fit is worse than the mean of the experts."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification as Auto
from transformers.pytorch_utils import Conv1D

from tests import tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.least_squares import ChannelEquations, NormalEquations, fit_layers, is_fitted, new_fit
from twin_merging_hf.preflight import preflight
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.shared_merge import merge_tensor


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def direct(x, y, weights, start, ridge: float) -> torch.Tensor:
    """The same problem as one overdetermined system, float64."""
    x, y, root = x.double(), y.double(), weights.double().sqrt()[:, None]
    unit = ((root * x).pow(2).sum(0)).mean()
    pull = (ridge * unit).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    system, wanted = torch.cat([root * x, pull]), torch.cat([root * y, pull @ start.double().T])
    return torch.linalg.lstsq(system, wanted).solution.T


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_streamed_equations_equal_a_direct_solve(ridge):
    x, y, start = draw(60, 5), draw(60, 3, seed=1), draw(3, 5, seed=2)
    weights = torch.tensor([0.5] * 20 + [2.0] * 40)
    equations = NormalEquations(start)
    for rows, weight in ((slice(0, 20), 0.5), (slice(20, 33), 2.0), (slice(33, 60), 2.0)):
        equations.add(x[rows], y[rows], weight)
    solution = equations.solve(ridge)
    torch.testing.assert_close(solution, direct(x, y, weights, start, ridge), atol=1e-5, rtol=1e-5)
    for matrix in (solution, start.double()):
        expected = (weights[:, None] * (y - x @ matrix.float().T).pow(2)).sum()
        assert equations.loss(matrix) == pytest.approx(float(expected), rel=1e-4)


def test_a_channel_s_scale_and_shift_equal_a_direct_solve():
    x, y, start = draw(40, 4), draw(40, 4, seed=1), draw(4, 2, seed=2)
    equations = ChannelEquations(start)
    equations.add(x[:15], y[:15], 1.0)
    equations.add(x[15:], y[15:], 1.0)
    solution = equations.solve(1e-2)
    for c in range(4):
        design = torch.stack([x[:, c], torch.ones(40)], dim=1)
        expected = direct(design, y[:, c : c + 1], torch.ones(40), start[c : c + 1], 1e-2)
        torch.testing.assert_close(solution[c : c + 1], expected, atol=1e-5, rtol=1e-5)
    loss = (y - (x * solution[:, 0] + solution[:, 1])).pow(2).sum()
    assert equations.loss(solution) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("equations", [NormalEquations(draw(3, 5)), ChannelEquations(draw(3, 2))])
def test_without_samples_the_start_stays(equations):
    assert torch.equal(equations.solve(1e-4), equations.start)


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (6, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (6, 4)),
    "conv1d": (lambda: Conv1D(3, 4), (6, 5, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=(1, 0)), (6, 2, 7, 6)),
    "convolution of the same size": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2, bias=False), (6, 2, 7, 6)),
    "layer norm": (lambda: nn.LayerNorm(4), (6, 5, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(4).eval(), (6, 4, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (6, 4, 3, 3)),
}


@torch.no_grad()
@pytest.mark.parametrize(("new", "shape"), MODULES.values(), ids=MODULES)
def test_samples_times_parameters_are_what_the_module_computes(new, shape):
    module, x = new(), draw(*shape)
    for i, parameter in enumerate(module.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=i))
    fit, expected = new_fit(module), module(x)
    channels_last = expected.movedim(1, -1) if expected.dim() == 4 else expected
    torch.testing.assert_close(fit.outputs(fit.samples(x)), channels_last.reshape(-1, channels_last.shape[-1]))
    before = fit.parameters().clone()
    fit.write(torch.zeros_like(before))
    assert not any(bool(parameter.any()) for parameter in module.parameters())
    fit.write(before)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("module", [nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(3, 2), nn.LayerNorm(4, bias=False)])
def test_what_is_not_linear_in_its_parameters_is_not_fitted(module):
    assert not is_fitted(module)


@torch.no_grad()
def pair(kind: str, std: float = 0.05) -> tuple:
    """Two experts far from each other, their mean, and inputs of each."""
    base = tiny.new_model(kind)
    experts = [tiny.perturbed(base, kind, ("x", "y"), seed, std) for seed in (1, 2)]
    merged = copy.deepcopy(experts[0])
    other = experts[1].state_dict()
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            value.copy_((value + other[name]) / 2)
    inputs = [[tiny.batch(kind, 12, seed=10 * t + i) for i in range(2)] for t in range(2)]
    return merged, experts, inputs, [part[:1] for part in inputs]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "gpt2", "resnet", "bit"])
def test_the_fit_is_closer_to_the_experts_than_their_mean_on_rows_left_out(kind):
    merged, experts, inputs, _ = pair(kind)
    left_out = [[tiny.batch(kind, 16, seed=77 + t)] for t in range(2)]
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    own = [{name: value.clone() for name, value in expert.state_dict().items()} for expert in experts]
    report = fit_layers(merged, experts, inputs, left_out)
    assert not report.kept_mean and report.loss < report.mean_loss
    assert any(ridge is not None for ridge in report.ridges.values())
    heads = [name for name in before if not name.startswith(f"{merged.base_model_prefix}.")]
    assert all(torch.equal(merged.state_dict()[name], before[name]) for name in heads)
    for expert, state in zip(experts, own, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in expert.state_dict().items())


@torch.no_grad()
def test_padding_has_no_part_in_the_fit():
    merged, experts, inputs, left_out = pair("bert")
    again = copy.deepcopy(merged)
    fit_layers(merged, experts, inputs, left_out)
    noisy = [
        [{**b, "input_ids": torch.where(b["attention_mask"] > 0, b["input_ids"], 7)} for b in own] for own in inputs
    ]
    fit_layers(again, experts, noisy, left_out)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_empty_batches_change_nothing_and_an_expert_without_rows_is_refused():
    merged, experts, inputs, left_out = pair("bert")
    again = copy.deepcopy(merged)
    fit_layers(merged, experts, inputs, left_out)
    empty = {key: value[:0] for key, value in inputs[0][0].items()}
    padding = {**inputs[0][0], "attention_mask": torch.zeros_like(inputs[0][0]["attention_mask"])}
    fit_layers(again, experts, [[empty, *own] for own in inputs], [[empty, *own] for own in left_out])
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name])
    fit_layers(again, experts, [[*own, padding] for own in inputs], left_out)
    assert all(torch.isfinite(value).all() for value in again.state_dict().values())
    for batches, held_out, name in (
        ([inputs[0], [empty]], left_out, "batches"),
        (inputs, [left_out[0], []], "left_out"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` holds no rows for expert"):
            fit_layers(merged, experts, batches, held_out)


def test_experts_that_agree_stay_what_they_are():
    _, (expert, _), inputs, left_out = pair("resnet")
    merged = copy.deepcopy(expert)
    report = fit_layers(merged, [expert, expert], inputs, left_out)
    assert report.loss == pytest.approx(0, abs=1e-8)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expert.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_a_fit_that_does_not_help_is_taken_back(monkeypatch):
    merged, experts, inputs, left_out = pair("bert")
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    monkeypatch.setattr(NormalEquations, "solve", lambda self, ridge: self.start * 3)
    monkeypatch.setattr(NormalEquations, "loss", lambda self, solution: float(-solution.abs().sum()))
    report = fit_layers(merged, experts, inputs, left_out)
    assert report.kept_mean and report.loss == report.mean_loss
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


# ---- in a recipe ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_build_with_a_fitted_shared_model_answers_as_the_experts(tmp_path):
    folder = tiny.make_experts("bert", tmp_path, {"a": ["x", "y"], "b": ["p", "q"]}, rows=24)
    exclusive = {"rank": tiny.FULL_RANK}
    recipe = tiny.write_recipe(folder, ("a", "b"), merge_method="least_squares", base_model=None, exclusive=exclusive)
    result = build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    assert any(note.startswith("least_squares: squared error of the last state") for note in result.report["notes"])
    model, inputs = Auto.from_pretrained(tmp_path / "out").eval(), tiny.batch("bert", 4)
    output = model(**inputs, experts=["a", "b", "a", "b"]).expert_logits
    for t, name in enumerate(("a", "b")):
        own = Auto.from_pretrained(folder / name).eval()(**inputs).logits
        torch.testing.assert_close(output[t::2][:, model.label_space.columns(t)], own[t::2], atol=1e-4, rtol=0)


def test_the_fit_says_which_module_it_is_at(tmp_path):
    folder = tiny.make_experts("bert", tmp_path, {"a": ["x", "y"], "b": ["z", "w"]})
    recipe = tiny.write_recipe(folder, ("a", "b"), merge_method="least_squares", base_model=None)
    inputs, seen = preflight(load_recipe(recipe)), []
    inputs.on_fit = seen.append
    name = next(iter(inputs.experts[0].backbone))
    merge_tensor(inputs, name)
    assert any(module.endswith("query") for module in seen) and len(seen) == len(set(seen)) > 5


def test_without_rows_it_is_refused(tmp_path):
    folder = tiny.make_experts("bert", tmp_path, {"a": ["x", "y"], "b": ["p", "q"]}, rows=0)
    recipe = tiny.write_recipe(folder, ("a", "b"), merge_method="least_squares", data=False)
    with pytest.raises(TwinMergingError, match="fitted on inputs of `data`, which expert 'a' does not have"):
        load_recipe(recipe)
