"""Factories of tiny random checkpoints, data and recipes on disk; nothing comes from a network."""

import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


KINDS = ("bert", "roberta", "distilbert", "vit")
TEXT_KINDS = ("bert", "roberta", "distilbert")
LABELS: dict[str, list[str]] = {"a": ["x", "y"], "b": ["p", "q", "r"], "c": ["m", "n"]}
"""Experts and their labels; an expert with one label is a regression."""

TAGS: dict[str, list[str]] = {
    "a": ["O", "B-PER", "I-PER"],
    "b": ["B-LOC", "I-LOC", "O", "B-PER"],
    "c": ["noun", "verb"],
}
"""Experts that tag tokens: two in a chunk scheme, with `O` at different places, and one without `O`."""

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(90)]
VOCABULARY = len(SPECIAL) + len(WORDS)
HIDDEN = 32
LAYERS = 4
IMAGE = 16
FULL_RANK = 64  # more than min(m, n) of any matrix here
_TASK_WORDS = 30

_WIDTHS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {**_WIDTHS, "vocab_size": VOCABULARY, "max_position_embeddings": 66}
_DECODER = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_ARCHITECTURES: dict[str, tuple[str, str, dict]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _TEXT),
    "roberta": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        {**_TEXT, "max_position_embeddings": 70, "pad_token_id": 0, "type_vocab_size": 1},
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY,
         "max_position_embeddings": 66},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**_WIDTHS, "image_size": IMAGE, "patch_size": 4}),
    # Families that have no suite of their own, see test_families.py.
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": HIDDEN}),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", {**_TEXT, "pad_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 66, **_DECODER},
    ),
    "llama": ("LlamaConfig", "LlamaForSequenceClassification", {**_TEXT, "num_key_value_heads": 2, **_DECODER}),
    "qwen2": ("Qwen2Config", "Qwen2ForSequenceClassification", {**_TEXT, "num_key_value_heads": 2, **_DECODER}),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}),
    "deberta": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {**_TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {**_WIDTHS, "image_size": IMAGE, "patch_size": 4}),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"image_size": IMAGE, "patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
    ),
    "bit": (
        "BitConfig",
        "BitForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "num_groups": 4, "global_padding": "same"},
    ),
}  # fmt: skip
_ARCHITECTURES |= {
    f"{kind}-tokens": (config, name.replace("Sequence", "Token"), fields)
    for kind, (config, name, fields) in _ARCHITECTURES.items()
    if "Sequence" in name
}
"""Every family of text classifiers also as taggers: `bert-tokens`, ..."""
_GROUPED = {**_TEXT, "num_key_value_heads": 2, **_DECODER}
_ENCODER_DECODER = {"vocab_size": VOCABULARY, "d_model": HIDDEN, **_DECODER}
_ARCHITECTURES |= {
    "llama-lm": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral-lm": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "qwen2-lm": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3-lm": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gpt2-lm": ("GPT2Config", "GPT2LMHeadModel", _ARCHITECTURES["gpt2"][2]),
    "gpt_neox-lm": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_TEXT, **_DECODER}),
    "gemma3-lm": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "opt-lm": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_WIDTHS, **_DECODER, "vocab_size": VOCABULARY, "max_position_embeddings": 66, "ffn_dim": 64,
         "word_embed_proj_dim": 24},
    ),
    "t5-lm": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_ENCODER_DECODER, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "decoder_start_token_id": 0},
    ),
    "bart-lm": (
        "BartConfig",
        "BartForConditionalGeneration",
        {**_ENCODER_DECODER, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 66,
         "scale_embedding": True, "decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
    "bert-lm": ("BertConfig", "BertForMaskedLM", {**_TEXT, "pad_token_id": 0}),
    "roberta-lm": ("RobertaConfig", "RobertaForMaskedLM", _ARCHITECTURES["roberta"][2]),
}  # fmt: skip
"""Language models; their experts have no labels."""
IMAGE_KINDS = ("vit", "deit", "convnext", "resnet", "bit")


def new_config(kind: str, labels: Sequence[str] = ("x", "y"), **fields: Any) -> transformers.PreTrainedConfig:
    """Config of a tiny task model; `fields` override the defaults. One label: a regression."""
    name, _, defaults = _ARCHITECTURES[kind]
    meanings: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    config = getattr(transformers, name)(**{**defaults, **fields}, **({} if kind.endswith("-lm") else meanings))
    if len(labels) == 1:
        config.problem_type = "regression"
    return config


def new_model(kind: str, labels: Sequence[str] = ("x", "y"), seed: int = 0, **fields: Any) -> Any:
    """A tiny task model with random weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _ARCHITECTURES[kind][1])(new_config(kind, labels, **fields))
    return model.eval()


def perturbed(base: Any, kind: str, labels: Sequence[str], seed: int, std: float = 0.05, **fields: Any) -> Any:
    """An expert: `base` plus noise on every weight of its backbone, norms and biases included, and a head of its own."""
    expert = new_model(kind, labels, seed=seed, **fields)
    start, noise = base.state_dict(), torch.Generator().manual_seed(seed)
    state = {}
    for name, value in expert.state_dict().items():
        inherits = name in start and start[name].shape == value.shape and value.is_floating_point()
        origin = start[name] if inherits else value
        if name == "final_logits_bias":  # BART's, a buffer that nobody trains
            state[name] = origin
            continue
        state[name] = origin + std * torch.randn(value.shape, generator=noise) if origin.is_floating_point() else origin
    expert.load_state_dict(state)
    return expert


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer: `[CLS] w1 w2 [SEP]`."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)


def save_processor(kind: str, folder: Path) -> None:
    """Tokenizer or image processor of a kind, beside a checkpoint."""
    if kind in IMAGE_KINDS:
        size = {"height": IMAGE, "width": IMAGE}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
    else:
        save_tokenizer(folder)


def text_row(task: int, rng: random.Random) -> str:
    """A text of the words that belong to one task, so that a router can tell tasks apart."""
    words = WORDS[task % 3 * _TASK_WORDS : (task % 3 + 1) * _TASK_WORDS]
    return " ".join(rng.choice(words) for _ in range(rng.randint(4, 12)))


def picture(task: int, seed: int) -> Image.Image:
    """A noisy picture whose brightness tells the task."""
    noise = np.random.RandomState(seed).rand(IMAGE, IMAGE, 3)
    return Image.fromarray((noise * 80 + 60 * (task % 3)).astype("uint8"))


def write_data(kind: str, folder: Path, name: str, labels: Sequence[str], task: int, rows: int = 20) -> Path:
    """`{name}.jsonl` with `rows` rows of one task; images beside it in `images/`. One label: numbers."""
    rng = random.Random(f"{name}:{task}")
    lines = []
    if kind.endswith("-lm"):
        lines, rows = [_language_row(kind, task, rng) for _ in range(rows)], 0
    for i in range(rows):
        label: Any = round(rng.uniform(-1, 1), 3) if len(labels) == 1 else rng.choice(list(labels))
        if kind in IMAGE_KINDS:
            file = folder / "images" / f"{name}{i}.png"
            file.parent.mkdir(exist_ok=True)
            picture(task, i + 1000 * task).save(file)
            lines.append({"image": f"images/{file.name}", "label": label})
        elif kind.endswith("-tokens"):
            words = text_row(task, rng).split()
            lines.append({"tokens": words, "tags": [rng.choice(list(labels)) for _ in words]})
        else:
            lines.append({"text": text_row(task, rng), "label": label})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _language_row(kind: str, task: int, rng: random.Random) -> dict:
    words = WORDS[task % 4 * 22 : (task % 4 + 1) * 22]
    text = " ".join(rng.choice(words) for _ in range(rng.randint(4, 9)))
    return {"text": text} if kind.startswith(("bert", "roberta")) else {"prompt": text, "completion": rng.choice(words)}


def make_experts(
    kind: str,
    folder: Path | str,
    experts: Mapping[str, Sequence[str]] | None = None,
    *,
    rows: int = 20,
    std: float = 0.05,
    seed: int = 0,
    processor: bool = True,
    **fields: Any,
) -> Path:
    """
    Write `base`, one checkpoint and one `{name}.jsonl` for each expert into `folder`.

    Args:
        experts: label names by expert's name, default `LABELS`; one label makes a regression.
        rows: rows of data of each expert; 0: no data.
        std: size of the noise that makes an expert out of the base.
        processor: whether a tokenizer or image processor lies beside each checkpoint.
        fields: fields of the models' config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = new_model(kind, seed=seed, **fields)
    checkpoints = {"base": base}
    experts = LABELS if experts is None else experts
    for index, (name, labels) in enumerate(experts.items()):
        checkpoints[name] = perturbed(base, kind, labels, seed + index + 1, std, **fields)
        if rows:
            write_data(kind, folder, name, labels, index, rows)
    for name, model in checkpoints.items():
        model.save_pretrained(folder / name)
        if processor:
            save_processor(kind, folder / name)
    return folder


def write_recipe(
    folder: Path | str,
    names: Sequence[str] = tuple(LABELS),
    *,
    data: bool = True,
    file: str = "recipe.yaml",
    experts: Mapping[str, dict] | None = None,
    **overrides: Any,
) -> Path:
    """
    Write a recipe for the checkpoints of `make_experts`.

    Args:
        data: whether the experts' rows stand in the recipe.
        experts: extra keys for single experts, by name.
        overrides: top-level keys of the recipe; None removes a key. The router is `linear` where all have data.
    """
    entries = []
    for name in names:
        entry: dict[str, Any] = {"name": name, "model": name}
        if data:
            entry["data"] = f"{name}.jsonl"
        entries.append({**entry, **copy.deepcopy((experts or {}).get(name, {}))})
    router = {"router": "linear"} if data and all(entry.get("data") for entry in entries) else {}
    content = {"base_model": "base", "experts": entries, **router, **overrides}
    content = {key: value for key, value in content.items() if value is not None}
    path = Path(folder) / file
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def text_batch(rows: int, seed: int = 0, longest: int = 9, pad: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids [row, token], right-padded: row `i` has `longest - i % 4` tokens."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (rows, longest), generator=rng)
    mask = torch.ones(rows, longest, dtype=torch.long)
    for row in range(rows):
        mask[row, longest - row % 4 :] = 0
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}


def image_batch(rows: int, seed: int = 0, size: int = IMAGE) -> dict[str, torch.Tensor]:
    """Random pixels [row, 3, size, size]."""
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def batch(kind: str, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random model inputs of a kind."""
    return image_batch(rows, seed) if kind in IMAGE_KINDS else text_batch(rows, seed)
