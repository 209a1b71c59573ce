"""SmolLM2-135M-Instruct, real weights: four experts in one batch are written as each alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import smollm2, tiny
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import Progress, build_artifact


NAMES = ["a", "b", "c", "d"]
RANK = 2
QUESTIONS = ["What is the capital of France?", "Name a fruit.", "Why is the sky blue?", "Write a line about rain."]
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def changed(base: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy that answers otherwise: rank-2 changes of the projections of every third layer, and of norms and vocabulary."""
    expert, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in expert.named_parameters():
            layer = int(name.split(".")[2]) if ".layers." in name else 0
            if value.dim() == 1:
                value.mul_(1 + 0.02 * torch.randn(value.shape, generator=draw))
            elif layer % 3 == 0:
                up, down = (torch.randn(n, RANK, generator=draw) for n in value.shape)
                value.add_(up @ down.T, alpha=0.1 * float(value.std()))
    return expert


@pytest.mark.slow
@pytest.mark.timeout(3600)
@torch.no_grad()
def test_four_experts_of_smollm2_in_one_batch_are_written_as_each_alone(tmp_path):
    base, tokenizer = smollm2.load()
    for seed, name in enumerate(["base", *NAMES]):
        (base if name == "base" else changed(base, seed)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    del base
    recipe = tiny.write_recipe(tmp_path, NAMES, data=False, shared_model="base", exclusive={"rank": RANK})
    folder = build_artifact(recipe, tmp_path / "artifact", Progress(quiet=True)).folder
    assert check_artifact(folder) == []
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**inputs, experts=NAMES, **GREEDY)
    beams = model.generate(**inputs, experts=NAMES, num_beams=2, **GREEDY)
    alone = set()
    for row, name in enumerate(NAMES):
        expert = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        own = expert.generate(**single, **GREEDY)
        size = own.shape[1]
        assert written[row, :size].tolist() == own[0].tolist(), tokenizer.decode(own[0])
        own = expert.generate(**single, num_beams=2, **GREEDY)
        assert beams[row, : own.shape[1]].tolist() == own[0].tolist()
        first = expert.generate(**{key: value[:1] for key, value in inputs.items()}, **GREEDY)
        alone.add(tuple(first[0].tolist()))
    assert len(alone) == len(NAMES), "experts that answer alike prove nothing"
