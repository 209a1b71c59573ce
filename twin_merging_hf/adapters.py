"""
PEFT adapter folders: what LoRA experts are read from, and which adapters are no plain LoRA.

`adapter_config.json` and `adapter_model.safetensors` are read as JSON and tensors; PEFT itself is not needed.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import TwinMergingError


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_FULL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

_MERGE = (
    "merge it into its base in PEFT (`model.merge_and_unload().save_pretrained(FOLDER)`) and give that full checkpoint"
)
# Field of adapter_config.json -> what it means where it is set, and what to do.
_REFUSED_FIELDS: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA: its weight norms change with the base, so its delta is no product", _MERGE),
    "lora_bias": ("a bias on lora_B, which is no part of a product", _MERGE),
    "use_qalora": ("QA-LoRA, whose delta pools the input", _MERGE),
    "use_bdlora": ("block-diagonal LoRA", _MERGE),
    "target_parameters": ("LoRA on bare parameters", _MERGE),
    "layer_replication": (
        "replicated layers, so its model has other layers than the base and the other experts",
        "train it again without that",
    ),
    "alora_invocation_tokens": ("activated LoRA, which acts on some tokens only", "train it again without that"),
    "trainable_token_indices": ("trained token embeddings", _MERGE),
    "arrow_config": ("an Arrow router over other adapters", "give those adapters, each as an expert"),
    "velora_config": ("VeLoRA", _MERGE),
    "monteclora_config": ("MonteCLoRA", _MERGE),
    "megatron_config": ("Megatron's parallel layers", _MERGE),
}
# Kinds of adapters that `merge_and_unload` cannot merge -> what to do.
_INPUTS_ONLY = "it learned inputs, and there is nothing to merge into weights; train a LoRA on the same rows"
_UNMERGEABLE = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"), _INPUTS_ONLY),
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE"), _INPUTS_ONLY),
    "XLORA": "it is a router over other adapters; give those, each as an expert",
}
# Ways to start a LoRA that change the base's weights: the adapter then belongs to other weights than the base's own.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields that must hold text; null is another way to leave one out.
_TEXT_FIELDS = ("base_model_name_or_path", "revision", "task_type", "bias")
_MAX_RANK = _MAX_ALPHA = 2**20
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<half>[AB])(\.default)?(\.weight)?")
_ROOT = "base_model.model."


@dataclass(frozen=True)
class LoraPair:
    """Keys of one module's two factors in the adapter's file, and what multiplies their product."""

    a: str
    b: str
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """
    One checked adapter folder.

    pairs: by path of the module in the task model.
    saved: tensors that the adapter holds as a whole, such as a head: name in the task model -> key in the file.
    shapes: of all tensors in the file, by key.
    """

    path: Path
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    saved: dict[str, str]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def base(self) -> str | None:
        """The base that the adapter says it was trained on: a folder, or a Hub id with an optional `@revision`."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if not isinstance(name, str) or not name:
            return None
        return f"{name}@{revision}" if revision and not os.path.isdir(name) else name

    @property
    def file(self) -> Path:
        return self.path / ADAPTER_WEIGHTS


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter and no full checkpoint."""
    return (path / ADAPTER_CONFIG).is_file() and not any((path / name).is_file() for name in _FULL_WEIGHTS)


def read_adapter(path: Path, role: str) -> Adapter:
    """
    Read an adapter folder without its tensors.

    Raises:
        TwinMergingError: it is no plain LoRA, its files are missing, damaged, or contradict each other; all reasons at once.
    """
    config = _read_config(path, role)
    problems = _refusals(config)
    if problems:
        raise TwinMergingError(f"{role}: the PEFT adapter {path} cannot be an expert: " + "; ".join(problems))
    shapes = _read_shapes(path, role)
    halves: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for key in shapes:
        name = key.removeprefix(_ROOT)
        match = _HALF.fullmatch(name)
        if match:
            halves.setdefault(match["module"], {})[f"{match['half']}{match['kind'] or ''}"] = key
        elif ".lora_" in name:
            problems.append(f"tensor {key!r} is none that a plain LoRA has; {_MERGE}")
        else:
            saved[_saved_name(name)] = key
    pairs = {module: _pair(module, found, config, shapes, problems) for module, found in halves.items()}
    if not pairs and not problems:
        problems.append(f"{path / ADAPTER_WEIGHTS} holds no lora_A and lora_B")
    if problems:
        raise TwinMergingError(f"{role}: the PEFT adapter {path} cannot be an expert: " + "; ".join(problems))
    return Adapter(path, config, {m: pair for m, pair in pairs.items() if pair is not None}, saved, shapes)


def _read_config(path: Path, role: str) -> dict:
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TwinMergingError(f"{role}: {path / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TwinMergingError(f"{role}: {path / ADAPTER_CONFIG} is no JSON object")
    return config


def _refusals(config: dict) -> list[str]:
    """Everything about an adapter's config that makes it something else than a plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        remedy = _UNMERGEABLE.get(str(kind), _MERGE)
        return [f"it is {kind}, only LORA has deltas of low rank that are a product of two matrices; {remedy}"]
    problems = _malformed(config)
    if problems:
        return problems
    problems = [
        f"it has {what} (`{name}`); {remedy}" for name, (what, remedy) in _REFUSED_FIELDS.items() if config.get(name)
    ]
    if (config.get("bias") or "none") != "none":
        problems.append(f"it trained the base's biases (`bias: {config['bias']}`), which are no LoRA; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        problems.append(
            f"`init_lora_weights: {start}` changed the base's weights before training; save it with "
            "`path_initial_model_for_weight_conversion` (see PEFT's guide), which makes it an ordinary LoRA"
        )
    return problems


def _malformed(config: dict) -> list[str]:
    """The fields that hold what PEFT never writes there, of those that are read here."""
    problems = [
        f"`{name}` must be text, got {_short(config[name])}"
        for name in _TEXT_FIELDS
        if not isinstance(config.get(name), str | None)
    ]
    for name, where, kind, check in (
        ("r", "rank_pattern", f"a whole number from 1 to {_MAX_RANK}", _is_rank),
        ("lora_alpha", "alpha_pattern", f"a number of at most {_MAX_ALPHA}", _is_number),
    ):
        if not check(config.get(name)):
            problems.append(f"`{name}` must be {kind}, got {_short(config.get(name))}")
        patterns = {} if config.get(where) is None else config[where]
        if not isinstance(patterns, dict):
            problems.append(f"`{where}` must be a mapping, got {_short(patterns)}")
            continue
        for pattern, value in patterns.items():
            if not check(value):
                problems.append(f"`{where}`, {_short(pattern)}: must be {kind}, got {_short(value)}")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                problems.append(f"`{where}`: {_short(pattern)} is not a regular expression: {error}")
    mapping = config.get("auto_mapping") or {}
    if not isinstance(mapping, dict) or not isinstance(mapping.get("base_model_class"), str | None):
        problems.append(f"`auto_mapping` must be a mapping that names a class, got {_short(mapping)}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_RANK


def _short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_shapes(path: Path, role: str) -> dict[str, tuple[int, ...]]:
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        found = (
            f"only {_PICKLE}, a pickle, is there; pickles can run code, so load it once in PEFT where you trust it and call "
            "`save_pretrained` to get safetensors"
            if (path / _PICKLE).is_file()
            else "no weights are there"
        )
        raise TwinMergingError(f"{role}: {path} has no {ADAPTER_WEIGHTS}: {found}")
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TwinMergingError(f"{role}: the weights in {file} are damaged: {error}") from error


def _saved_name(name: str) -> str:
    """Name in the task model of a tensor that PEFT saved as a whole."""
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)


def _pair(
    module: str, halves: dict[str, str], config: dict, shapes: dict[str, tuple[int, ...]], problems: list[str]
) -> LoraPair | None:
    """The factors of one module, with PEFT's scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    embedding = set(halves) == {"Aembedding_", "Bembedding_"}
    if not embedding and set(halves) != {"A", "B"}:
        problems.append(f"module {module!r} has only one of lora_A and lora_B")
        return None
    a, b = (halves[f"{half}{'embedding_' if embedding else ''}"] for half in "AB")
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    found = shapes[a][0], shapes[b][1]
    if found != (rank, rank):
        problems.append(
            f"module {module!r} has rank {rank} by {ADAPTER_CONFIG}, but {ADAPTER_WEIGHTS} holds lora_A of {found[0]} and "
            f"lora_B of {found[1]}; the files do not belong together"
        )
        return None
    return LoraPair(a, b, alpha / rank**0.5 if config.get("use_rslora") else alpha / rank, embedding)


def _by_pattern(patterns: dict | None, module: str, default: float) -> Any:
    """The value of the first pattern that matches the end of a module's path, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(repr(name) for name in sorted(names)[:most]) + (", ..." if len(names) > most else "")
