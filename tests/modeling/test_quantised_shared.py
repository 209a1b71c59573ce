"""A shared model that Transformers quantises while loading: deltas, heads and router stay as they are, and act."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests import tiny
from tests.conftest import load
from tests.modeling.language import NAMES, LanguageWorld
from twin_merging_hf.modeling.deltas_twin_merging import follow_replacements


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8 and the scale of each row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 7  # as coarse as four bits: it must be seen
    return (weight / scale).round().to(torch.int8), scale


class IntegerLinear(nn.Linear):
    """As bitsandbytes does it: takes the place of an `nn.Linear`, and is one by inheritance."""

    def integers(self) -> None:
        values, scale = rounded(self.weight.data)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@register_quantization_config("test-integers")
class IntegerConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs: Any):
        self.quant_method = "test-integers"


@register_quantizer("test-integers")
class IntegerQuantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model, **kwargs):
        skipped = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, skipped):
                parent, _, child = name.rpartition(".")
                with torch.device("meta"):
                    new = IntegerLinear(module.in_features, module.out_features, module.bias is not None)
                setattr(model.get_submodule(parent), child, new)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, IntegerLinear):
                module.integers()

    def is_serializable(self, **kwargs) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def integers_in(model: nn.Module) -> dict[str, IntegerLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLinear)}


@torch.no_grad()
def reference(artifact, names) -> Any:
    """The artifact with those matrices of its shared model rounded in place: the same numbers, in floating point."""
    model = load(artifact)
    for name in names:
        weight = model.get_submodule(name).weight
        values, scale = rounded(weight)
        weight.copy_(values * scale)
    return model


@pytest.mark.parametrize("kind", ["bert", "vit"])
@torch.no_grad()
def test_experts_act_on_a_quantised_shared_model(world, kind):
    artifact, batch = world.artifact(kind), tiny.batch(kind, 6)
    model = load(artifact, quantization_config=IntegerConfig())
    names = integers_in(model)
    assert len(names) >= 6 * tiny.LAYERS - 1
    assert all(name.startswith("shared.") for name in names), "heads, factors and router stay as they are"
    expected = reference(artifact, names)
    torch.testing.assert_close(model.route(**batch), expected.route(**batch), rtol=0, atol=1e-5)
    for call in ({"experts": ["a", "b", "c", "a", "__shared__", "c"]}, {}):
        found, wanted = (each(**batch, **call).logits for each in (model, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    plain = load(artifact)(**batch, experts="a").logits
    assert (model(**batch, experts="a").logits - plain).abs().max() > 1e-3, (
        "rounding that changes nothing proves nothing"
    )


@torch.no_grad()
def test_every_plan_but_the_merged_one_works_on_it(world):
    artifact, batch = world.artifact("bert"), tiny.batch("bert", 3)
    model = load(artifact, quantization_config=IntegerConfig())
    expected = reference(artifact, integers_in(model))(**batch, experts=["a", "b", "c"]).logits
    for plan in ("factored", "gathered", "auto"):
        model.set_plan(plan)
        torch.testing.assert_close(model(**batch, experts=["a", "b", "c"]).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="quantised"):
        model.set_plan("materialised")


@torch.no_grad()
def test_a_wrapper_around_the_new_module_stays_around_the_delta(world):
    model, batch = world.model("bert"), tiny.batch("bert", 3)
    expected = model(**batch, experts=["a", "b", "c"]).logits
    path = next(path for path in model._stand_ins if path.endswith("query"))
    parent, _, child = path.rpartition(".")
    old = model.shared.get_submodule(path)
    new = nn.Linear(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    seen = []

    class Seeing(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    add_hook_to_module(new, Seeing())
    setattr(model.shared.get_submodule(parent), child, new)
    assert not torch.equal(model(**batch, experts=["a", "b", "c"]).logits, expected), "its delta is lost"
    follow_replacements(model.shared, model._stand_ins)
    seen.clear()
    torch.testing.assert_close(model(**batch, experts=["a", "b", "c"]).logits, expected, rtol=0, atol=1e-6)
    assert seen == [new]


@torch.no_grad()
def test_a_quantised_language_model_generates_by_its_experts(tmp_path):
    language = LanguageWorld(tmp_path)
    artifact = language.artifact("llama-lm")
    model = load(artifact, quantization_config=IntegerConfig())
    expected = reference(artifact, integers_in(model))
    inputs = tiny.batch("llama-lm", len(NAMES))
    settings = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    found = model.generate(**inputs, experts=NAMES, **settings)
    assert found.tolist() == expected.generate(**inputs, experts=NAMES, **settings).tolist()
    assert found.tolist() != model.generate(**inputs, experts="__shared__", **settings).tolist()
