"""The symmetries of Hugging Face architectures, each checked by `verification` before it is used."""

from collections.abc import Callable
from typing import Any

from .families_text import bert, distilbert, gpt2, llama, roberta, small_bert, small_distilbert, small_gpt2, small_llama
from .families_vision import bit, resnet, small_bit, small_resnet, small_vit, vit
from .spec import Spec


BUILT_IN: dict[str, tuple[Callable[[Any, set[str]], Spec], Callable[[Any], dict]]] = {
    "bert": (bert, small_bert),
    "roberta": (roberta, small_bert),
    "distilbert": (distilbert, small_distilbert),
    "gpt2": (gpt2, small_gpt2),
    "llama": (llama, small_llama),
    "mistral": (llama, small_llama),
    "qwen2": (llama, small_llama),
    "qwen3": (llama, small_llama),
    "vit": (vit, small_vit),
    "resnet": (resnet, small_resnet),
    "bit": (bit, small_bit),
}
"""By model type: the specification, and config fields that make a small model of the same symmetries."""
