"""Language models whose weights lie elsewhere until they are needed: tied vocabularies and T5's biases included."""

import pytest
from accelerate import cpu_offload

from tests.modeling.language import GREEDY, NAMES, LanguageWorld, prompts, side_of


@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm", "bart-lm"])
def test_an_offloaded_model_writes_the_same(kind, tmp_path):
    language = LanguageWorld(tmp_path)
    model, inputs = language.model(kind), prompts(side=side_of(kind))
    expected = model.generate(**inputs, experts=NAMES, **GREEDY).tolist()
    offloaded = language.model(kind)
    cpu_offload(offloaded, execution_device="cpu")
    assert {parameter.device.type for parameter in offloaded.deltas.parameters()} == {"meta"}
    assert offloaded.generate(**inputs, experts=NAMES, **GREEDY).tolist() == expected
    routed = model.generate(**inputs, **GREEDY).tolist()
    assert offloaded.generate(**inputs, **GREEDY).tolist() == routed
