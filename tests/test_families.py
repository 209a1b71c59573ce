"""Families beyond the four that have a suite of their own: what works is exact, what does not is refused by name."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests import tiny
from tests.modeling.language import GREEDY, prompts
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.errors import TwinMergingError


FULL_RANK = {"method": "svd", "rank": tiny.FULL_RANK}


def auto_class(kind: str):
    return AutoModelForImageClassification if kind in tiny.IMAGE_KINDS else AutoModelForSequenceClassification


@torch.no_grad()
@pytest.mark.parametrize("family", ["electra", "modernbert", "gpt2", "llama"])
def test_each_token_of_a_mixed_batch_is_tagged_as_by_its_row_s_own_expert(family, tmp_path):
    folder = tiny.make_experts(f"{family}-tokens", tmp_path, tiny.TAGS, rows=0)
    recipe = tiny.write_recipe(folder, tuple(tiny.TAGS), data=False, exclusive=FULL_RANK)
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    inputs, names = tiny.text_batch(4), ["a", "b", "c", "a"]
    output = model(**inputs, experts=names)
    for i, name in enumerate(names):
        own = AutoModelForTokenClassification.from_pretrained(folder / name).eval()(**inputs).logits[i]
        columns, valid = model.label_space.columns(list(tiny.TAGS).index(name)), inputs["attention_mask"][i] > 0
        torch.testing.assert_close(output.expert_logits[i][valid][:, columns], own[valid], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.logits[i][valid][:, columns], own[valid].log_softmax(-1), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["electra", "modernbert", "gpt2", "llama", "qwen2", "deit"])
def test_each_row_of_a_mixed_batch_is_answered_as_by_its_own_expert(kind, tmp_path):
    folder = tiny.make_experts(kind, tmp_path, {"a": ["x", "y"], "b": ["p", "q", "r"]})
    recipe = tiny.write_recipe(folder, ("a", "b"), exclusive=FULL_RANK)
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    model = auto_class(kind).from_pretrained(tmp_path / "out").eval()
    inputs = tiny.batch(kind, 4)
    output = model(**inputs, experts=["a", "b", "b", "a"]).expert_logits
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        expert = auto_class(kind).from_pretrained(folder / name).eval()
        columns = model.label_space.columns(["a", "b"].index(name))
        torch.testing.assert_close(output[rows][:, columns], expert(**inputs).logits[rows], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3-lm", "opt-lm"])
def test_each_prompt_is_gone_on_from_as_by_its_row_s_own_expert(kind, tmp_path):
    folder = tiny.make_experts(kind, tmp_path, {"a": (), "b": ()})
    build_artifact(tiny.write_recipe(folder, ("a", "b"), exclusive=FULL_RANK), tmp_path / "out", Progress(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs, names = prompts(), ["a", "b", "b", "a"]
    written = model.generate(**inputs, experts=names, **GREEDY)
    for row, name in enumerate(names):
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        expert = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        assert written[row].tolist() == expert.generate(**single, **GREEDY)[0].tolist()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("albert", "no list of layers"),
        ("deberta", "does not run in DebertaV2ForSequenceClassification"),
        ("convnext", "no rule can apply a delta of it per row"),
    ],
)
def test_a_family_without_a_rule_is_refused_and_nothing_is_written(kind, reason, tmp_path):
    folder = tiny.make_experts(kind, tmp_path / "in", {"a": ["x", "y"], "b": ["p", "q", "r"]})
    with pytest.raises(TwinMergingError, match=reason):
        build_artifact(tiny.write_recipe(folder, ("a", "b")), tmp_path / "out", Progress(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
