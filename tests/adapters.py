"""Tiny LoRA adapters on disk as PEFT writes them, and the dense task models that they mean; PEFT itself is not needed."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import tiny


RANKS = {"a": 3, "b": 5, "c": 4}
TARGETS = {
    "bert": ("query", "value", "intermediate.dense"),
    "gpt2": ("c_attn", "c_proj", "wte"),
    "vit": ("q_proj", "query", "projection"),
    "llama": ("q_proj", "down_proj"),
    "llama-lm": ("q_proj", "down_proj"),
    "gpt2-lm": ("c_attn", "mlp.c_proj"),
}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["query", "value"],
}


def targeted(model: nn.Module, ends: Sequence[str]) -> dict[str, nn.Module]:
    """Modules of a task model's backbone whose path ends so."""
    prefix = f"{model.base_model_prefix}."
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and any(f".{name}".endswith(f".{end}") for end in ends)
    }


def sizes(module: nn.Module) -> tuple[torch.Size, torch.Size]:
    """Shapes of lora_A and lora_B without their rank: what a module reads, and what it writes."""
    shape = module.weight.shape
    if isinstance(module, nn.Conv2d):
        return shape[1:], torch.Size((shape[0], 1, 1))
    if isinstance(module, (Conv1D, nn.Embedding)):
        return shape[:1], shape[1:]
    return shape[1:], shape[:1]


def write_adapter(
    folder: Path,
    base_folder: Path,
    base: Any,
    head: Any,
    ends: Sequence[str],
    rank: int = 4,
    seed: int = 0,
    std: float = 0.2,
    **config: Any,
) -> None:
    """
    One adapter with random factors.

    Args:
        base: the base's task model. head: a task model whose head the adapter brings (None: none).
        config: fields of adapter_config.json.
    """
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in targeted(base, ends).items():
        reads, writes = sizes(module)
        a = std * torch.randn(rank, *reads, generator=noise)
        b = std * torch.randn(writes[0], rank, *writes[1:], generator=noise)
        for half, value in (("A", a), ("B", b)):
            kind = f"lora_embedding_{half}" if isinstance(module, nn.Embedding) else f"lora_{half}.weight"
            tensors[f"base_model.model.{name}.{kind}"] = value.contiguous()
    for name, value in (head.state_dict() if head is not None else {}).items():
        if not name.startswith(f"{head.base_model_prefix}."):
            tensors[f"base_model.model.{name}"] = value.clone()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {**CONFIG, "r": rank, "base_model_name_or_path": str(base_folder), "target_modules": list(ends), **config}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")


def make_adapters(
    kind: str, folder: Path, labels: Mapping[str, Sequence[str]] | None = None, data: int = 0, **config: Any
) -> Path:
    """`base` with its processor, and one adapter for each expert, of different ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in tiny.IMAGE_KINDS:  # PEFT has no task type for pictures, and writes the class instead
        config = {"task_type": None, "auto_mapping": {"base_model_class": "ViTForImageClassification"}, **config}
    base = tiny.new_model(kind)
    base.save_pretrained(folder / "base")
    tiny.save_processor(kind, folder / "base")
    for index, (name, names) in enumerate((labels or tiny.LABELS).items()):
        head = tiny.new_model(kind, names, seed=index + 1) if names else None
        write_adapter(folder / name, folder / "base", base, head, TARGETS[kind], RANKS[name], seed=index + 1, **config)
        if data:
            tiny.write_data(kind, folder, name, names, index, data)
    return folder


def recipe(folder: Path, labels: Mapping[str, Sequence[str]] | None = None, **overrides: Any) -> Path:
    """Recipe of `make_adapters`: full rank, no data, label names given."""
    labels = labels or tiny.LABELS
    own = {name: {"labels": list(names)} for name, names in labels.items() if names}
    defaults = {"exclusive": {"rank": tiny.FULL_RANK}, "data": False, "experts": own}
    return tiny.write_recipe(folder, list(labels), **{**defaults, **overrides})


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of an adapter."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "adapter_model.safetensors")


def rewrite(folder: Path, change: Any) -> None:
    """Replace an adapter's tensors by `change(tensors)`."""
    tensors = change(read(folder)[1])
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of adapter_config.json; None removes one."""
    content = {**read(folder)[0], **fields}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept), encoding="utf-8")


def dense_delta(folder: Path, module_name: str, module: nn.Module, scale: float) -> torch.Tensor:
    """scale * B A in the layout of the module's weight, float64, by one product each."""
    tensors = {key: value.double() for key, value in read(folder)[1].items()}
    root = f"base_model.model.{module_name}"
    if isinstance(module, nn.Embedding):
        return scale * (tensors[f"{root}.lora_embedding_B"] @ tensors[f"{root}.lora_embedding_A"]).T
    a, b = tensors[f"{root}.lora_A.weight"], tensors[f"{root}.lora_B.weight"]
    if isinstance(module, nn.Conv2d):
        return scale * torch.einsum("orxy,rikl->oikl", b, a)
    return scale * ((b @ a).T if isinstance(module, Conv1D) else b @ a)


def dense_model(kind: str, folder: Path, name: str, labels: Sequence[str], scale: float) -> Any:
    """The task model that an adapter of `make_adapters` means, all its modules with one scale."""
    base = tiny.new_model(kind)
    model = tiny.new_model(kind, labels) if labels else tiny.new_model(kind)
    state = copy.deepcopy(model.state_dict())
    backbone = f"{base.base_model_prefix}." if labels else ""  # a language model's head is backbone
    state |= {key: value for key, value in base.state_dict().items() if key.startswith(backbone)}
    tensors = read(folder / name)[1]
    for key in state:
        saved = tensors.get(f"base_model.model.{key}")
        state[key] = state[key] if saved is None else saved
    for path, module in targeted(model, TARGETS[kind]).items():
        state[f"{path}.weight"] = (
            state[f"{path}.weight"].double() + dense_delta(folder / name, path, module, scale)
        ).float()
    model.load_state_dict(state)
    return model.eval()
