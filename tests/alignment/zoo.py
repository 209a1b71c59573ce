"""Tiny random models of every family that can be aligned, with random norms and biases, each made once."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from twin_merging_hf.alignment import Layout, Permutation, checked_layout
from twin_merging_hf.alignment.batchnorm import reestimate_batch_norm
from twin_merging_hf.alignment.verification import random_inputs, randomise


_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_TEXT = {**_WIDTHS, "vocab_size": 60, "max_position_embeddings": 40}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": 60, "max_position_embeddings": 40}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 60, "n_positions": 40}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_size": 12, "patch_size": 4}


def _llama(kind: str, task: str, groups: int, **fields: Any) -> Any:
    config = getattr(hf, f"{kind}Config")(**_TEXT, **_IDS, num_key_value_heads=groups, **fields)
    return getattr(hf, f"{kind}For{task}")(config)


MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)),
    "bert-tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**_TEXT)),
    "bert-mlm-tied": lambda: hf.BertForMaskedLM(hf.BertConfig(**_TEXT)),
    "bert-mlm-untied": lambda: hf.BertForMaskedLM(hf.BertConfig(**_TEXT, tie_word_embeddings=False)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT)),
    "roberta-mlm-tied": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_TEXT)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**_DISTIL)),
    "distilbert-mlm-untied": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(**_DISTIL, tie_word_embeddings=False)
    ),
    "gpt2-tied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, **_IDS)),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**_GPT2, **_IDS)),
    "llama-gqa1-tied": lambda: _llama("Llama", "CausalLM", 4, tie_word_embeddings=True),
    "llama-gqa2-biases": lambda: _llama("Llama", "CausalLM", 2, attention_bias=True, mlp_bias=True),
    "llama-gqa4": lambda: _llama("Llama", "SequenceClassification", 1),
    "mistral-gqa2": lambda: _llama("Mistral", "CausalLM", 2, head_dim=12),
    "qwen2-gqa2-tied": lambda: _llama("Qwen2", "CausalLM", 2, tie_word_embeddings=True),
    "qwen3-gqa2": lambda: _llama("Qwen3", "CausalLM", 2, head_dim=8),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_WIDTHS, **_IMAGE)),
    "vit-no-biases": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_WIDTHS, **_IMAGE, qkv_bias=False)),
    "resnet-basic": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 2], layer_type="basic")
    ),
    "resnet-bottleneck": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
    ),
    "bit": lambda: hf.BitForImageClassification(
        hf.BitConfig(embedding_size=8, hidden_sizes=[32, 64], depths=[1, 2], num_groups=4)
    ),
    "bit-late-norms": lambda: hf.BitForImageClassification(
        hf.BitConfig(embedding_size=8, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4, layer_type="bottleneck")
    ),
}
ONE_OF_EACH = ("bert", "gpt2-tied", "llama-gqa2-biases", "vit", "resnet-basic", "bit")


@functools.cache
def model(name: str, seed: int = 0) -> Any:
    """A random model: read only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MODELS[name]().eval()
    randomise(made, seed)
    # Else channels behind a ReLU are dead at random, and activations say nothing about those.
    reestimate_batch_norm(made, [random_inputs(made, 8, 100)])
    return made


def fresh(name: str, seed: int = 0) -> Any:
    """A random model to change."""
    return copy.deepcopy(model(name, seed))


@functools.cache
def layout(name: str) -> Layout:
    """The verified specification of a model."""
    return checked_layout(model(name))


@functools.cache
def batches(name: str, count: int = 4, rows: int = 8) -> list[dict]:
    """Calibration batches, texts with padding."""
    return [random_inputs(model(name), rows, seed) for seed in range(count)]


def planted(name: str, seed: int, noise: float = 0.0) -> tuple[Any, Permutation]:
    """A copy of `model(name)`, permuted at random, plus noise of a share of each tensor's spread; and the permutation."""
    permutation = Permutation.random(layout(name), seed)
    copied = fresh(name)
    permutation.apply(copied)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in copied.parameters():
            spread = tensor.std() if tensor.numel() > 1 else 0.0
            tensor.add_(noise * spread * torch.randn(tensor.shape, generator=generator))
    return copied, permutation
