"""LoRA experts: a base checkpoint and an adapter folder, seen together as one checkpoint of a task model."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from .adapters import Adapter, LoraPair, is_adapter, listed, read_adapter
from .checkpoints import Checkpoint, load_config, local_folder, open_base, open_checkpoint, resolve
from .errors import TwinMergingError
from .low_rank import LowRank


# PEFT's task_type -> where Transformers lists the class of each architecture.
_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
# A prime that is no width of a model: as number of labels it marks the tensors of a head. A config writes every label down, and
# the oldest Transformers checks each, so it is not larger than it must be.
_MARK = 10_007


@dataclass
class AdaptedCheckpoint(Checkpoint):
    """
    A task model whose weights are base + scale * B A, read tensor by tensor like a full checkpoint.

    adapter: the folder. base: the base's backbone as this task class. pairs: LoRA factors by parameter name.
    """

    adapter: Adapter = field(default=None)  # type: ignore[assignment]
    base: Checkpoint = field(default=None)  # type: ignore[assignment]
    pairs: dict[str, LoraPair] = field(default_factory=dict)

    def low_rank(self, name: str) -> LowRank | None:
        """
        What the adapter adds to a parameter, as a product in the shape of the parameter's matrix [m, n]; None: nothing.

        PEFT keeps A [r, in] and B [out, r]; Conv1D weights are [in, out] and embeddings [vocabulary, hidden], so there the
        product is transposed.
        """
        pair = self.pairs.get(name)
        if pair is None:
            return None
        handle = self._open(self.adapter.file)
        a, b = handle.get_tensor(pair.a).float().flatten(1), handle.get_tensor(pair.b).float().flatten(1)
        if pair.embedding or isinstance(self.skeleton.get_submodule(name.rpartition(".")[0]), Conv1D):
            return LowRank(pair.scale * a.T, b.T)
        return LowRank(pair.scale * b, a)

    def rank_of(self, name: str) -> int:
        """Rank that the adapter gives a parameter's change; 0: it leaves it alone."""
        return self.adapter.shapes[self.pairs[name].a][0] if name in self.pairs else 0

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the adapted model; float32 where the adapter changes it, else as the base stores it."""
        start, delta = super().tensor(name), self.low_rank(name)
        return start if delta is None else start.float() + delta.dense().reshape(start.shape)

    def find_not_finite(self) -> str | None:
        handle = self._open(self.adapter.file)
        return next((key for key in self.adapter.shapes if not torch.isfinite(handle.get_tensor(key)).all()), None)

    def load_model(self) -> PreTrainedModel:
        model = self.task_class(copy.deepcopy(self.config)).float()
        missing, _ = model.load_state_dict({name: self.tensor(name) for name in self.places}, strict=False)
        missing = [name for name in missing if name not in model.all_tied_weights_keys]
        if missing:
            raise RuntimeError(f"{self.role}: {missing[:3]} left random")
        model.tie_weights()
        return model.eval()

    def close(self) -> None:
        super().close()
        self.base.close()

    @property
    def adapter_of(self) -> str:
        return self.base.source

    @property
    def processing_paths(self) -> list[Path]:
        """The adapter's folder, and the base's where the adapter has no tokenizer of its own."""
        return [self.path, self.base.path]


def adapter_base(source: str, folder: Path, role: str) -> str | None:
    """The base that an expert names itself (None: a full checkpoint, or an adapter that names none), as `resolve` takes it."""
    path = resolve(source, folder, role)
    if not is_adapter(path):
        return None
    name = read_adapter(path, role).base
    return name and as_source(name)


def as_source(name: str) -> str:
    """A base as an adapter names it: PEFT means folders relative to the working directory, a recipe to its own folder."""
    local = os.path.expanduser(name)  # `Path` raises for names that no file can have
    return str(Path(local).resolve()) if os.path.isdir(local) else name


def open_expert(
    source: str, folder: Path, role: str, base: str | None = None, trained_on: str | None = None
) -> Checkpoint:
    """
    Open an expert: a full checkpoint, or a PEFT LoRA folder on its base. No weights are read.

    Args:
        base: the base that the build works with; None: the one that the adapter names.
        trained_on: instead of what the adapter says, the base it was trained on.

    Raises:
        TwinMergingError: as `open_checkpoint`; an adapter that is no plain LoRA, has no head, does not fit its base, or
            was trained on another base than `base`.
    """
    path = resolve(source, folder, role)
    if not is_adapter(path):
        if trained_on is not None:
            raise TwinMergingError(f"{role}: `base_model` belongs to a LoRA adapter, but {path} is a full checkpoint")
        return open_checkpoint(source, folder, role)
    adapter = read_adapter(path, role)
    named = trained_on or (adapter.base and as_source(adapter.base))
    used = base or named
    if used is None:
        raise TwinMergingError(f"{role}: adapter_config.json names no base; give `base_model` in the recipe")
    opened = _open_on(adapter, source, folder, role, used)
    if base is not None:
        _check_base(opened, named, base, folder)
    return opened


def _open_on(adapter: Adapter, source: str, folder: Path, role: str, used: str) -> AdaptedCheckpoint:
    """Join an adapter and a base. Raises `TwinMergingError`, listing everything that does not fit."""
    base_path = resolve(used, folder, f"base of {role}")
    own_config = load_config(base_path, f"base of {role}")
    task_class = _task_class(adapter, own_config, role)
    config = _task_config(adapter, own_config, task_class)
    base = open_base(used, folder, f"base of {role}", task_class, config)
    with torch.device("meta"):
        skeleton = task_class(config)
    problems: list[str] = []
    places = dict(base.places)
    places |= _heads(adapter, skeleton, base, used, folder, problems)
    pairs = _pairs(adapter, skeleton, places, problems)
    if base.absent or base.missing:
        problems.append(
            f"its base {base_path} has no {listed([*base.absent, *base.missing])}, which a {task_class.__name__} has: it was "
            "random in training and is not in the adapter; merge the trained model into a full checkpoint"
        )
    if problems:
        raise TwinMergingError(f"{role}: the PEFT adapter {adapter.path} cannot be an expert: " + "; ".join(problems))
    return AdaptedCheckpoint(
        role,
        source,
        adapter.path,
        config,
        task_class,
        skeleton,
        places,
        missing=[],
        extra=base.extra,
        ignored=[],
        from_hub=not local_folder(source, folder).is_dir(),
        adapter=adapter,
        base=base,
        pairs=pairs,
    )


def _task_class(adapter: Adapter, base: PreTrainedConfig, role: str) -> type[PreTrainedModel]:
    kind = adapter.config.get("task_type")
    mapping = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    if kind in _CLASSES:
        name: Any = getattr(modeling_auto, _CLASSES[kind]).get(base.model_type)
    elif kind is None:
        name = mapping or next(iter(base.architectures or []), None)
    else:
        name = None
    name = name if isinstance(name, str) else next(iter(name or []), None)
    try:
        return find_shared_class(name or "")[0]
    except ValueError as error:
        raise TwinMergingError(
            f"{role}: the adapter's task_type is {kind!r} on a {base.model_type} model"
            f"{f', a {name}' if name else ''}, which is no task that experts can have; train it on a task class (task_type "
            f"{', '.join(_CLASSES)})"
        ) from error


def _task_config(adapter: Adapter, base: PreTrainedConfig, task_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """
    The base's config with as many labels as the adapter's head has.

    PEFT keeps no label names, and the base's are those of another head: they come from a config.json beside the adapter, or
    are automatic ones.
    """
    config = copy.deepcopy(base)
    config.architectures = [task_class.__name__]
    labels = _label_count(adapter, base, task_class)
    if labels is not None:
        config.id2label = {i: f"LABEL_{i}" for i in range(labels)}
        config.label2id = {label: i for i, label in config.id2label.items()}
        config.problem_type = None
    beside = adapter.path / "config.json"
    if beside.is_file():
        own = load_config(adapter.path, "the adapter")
        if own.model_type == base.model_type and (labels is None or own.num_labels == labels):
            config.id2label, config.label2id, config.problem_type = own.id2label, own.label2id, own.problem_type
    return config


def _label_count(adapter: Adapter, base: PreTrainedConfig, task_class: type[PreTrainedModel]) -> int | None:
    """How many labels the head has that the adapter saved; None: it saved none, or such models have no labels."""
    marked = copy.deepcopy(base)
    marked.num_labels = _MARK
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in task_class(marked).state_dict().items()}
    for name, key in adapter.saved.items():
        if name in shapes and shapes[name][:1] == (_MARK,):
            return adapter.shapes[key][0]
    return None


def _heads(
    adapter: Adapter, skeleton: PreTrainedModel, base: Checkpoint, used: str, folder: Path, problems: list[str]
) -> dict[str, tuple[Path, str]]:
    """Places of the head's tensors: in the adapter, else in a base of the same task; other saved tensors are judged."""
    expected = skeleton.state_dict()
    places: dict[str, tuple[Path, str]] = {}
    backbone: dict[str, str] = {}
    for name, key in adapter.saved.items():
        if name not in expected:
            problems.append(f"it saved {key!r}, which a {type(skeleton).__name__} does not have")
        elif base.in_backbone(name):
            backbone[name] = key
        elif adapter.shapes[key] != tuple(expected[name].shape):
            problems.append(f"tensor {key!r} is {list(adapter.shapes[key])}, expected {list(expected[name].shape)}")
        else:
            places[name] = (adapter.file, key)
    problems += _judge_saved(adapter, backbone, base)
    wanted = [name for name in expected if not base.in_backbone(name) and name not in places]
    if wanted:
        own = _own_head(used, folder, base, wanted)
        if own is None:
            problems.append(
                f"head tensor {listed(wanted)} is neither in the adapter nor in its base: it was random in training; train "
                "again with that module in `modules_to_save`"
            )
        else:
            places |= own
    return places


def _own_head(used: str, folder: Path, base: Checkpoint, wanted: list[str]) -> dict[str, tuple[Path, str]] | None:
    """Places of head tensors in a base that is a model of the same task itself; None: it is not, or lacks some."""
    own_config = load_config(base.path, base.role)
    if base.task_class.__name__ not in (own_config.architectures or [])[:1]:
        return None
    own = open_checkpoint(used, folder, base.role)
    fits = all(name in own.places and own.shape(name) == base.skeleton.state_dict()[name].shape for name in wanted)
    return {name: own.places[name] for name in wanted} if fits else None


def _judge_saved(adapter: Adapter, saved: dict[str, str], base: Checkpoint) -> list[str]:
    """Why backbone tensors that the adapter saved as a whole (name -> key) are a problem; those that are the base's are none."""
    resized = [key for name, key in saved.items() if adapter.shapes[key] != _shape_in(base, name)]
    with safe_open(adapter.file, framework="pt") as handle:
        changed = [
            key
            for name, key in saved.items()
            if key not in resized and not torch.equal(handle.get_tensor(key).float(), base.tensor(name).float())
        ]
    problems = []
    if changed:
        problems.append(
            f"it saved {listed(changed)}, unlike the base's: backbone tensors trained as a whole (`modules_to_save`) are no "
            "LoRA, or the base is another one; merge it into its base in PEFT (`merge_and_unload`) and give the full checkpoint"
        )
    if resized:
        problems.append(
            f"it saved {listed(resized)} of shape {list(adapter.shapes[sorted(resized)[0]])}: tokens were added, and all experts "
            "need one vocabulary; add the same tokens to the base (`resize_token_embeddings`), train all adapters on that, or "
            "merge this one (`merge_and_unload`) and give experts that all have the new tokens"
        )
    return problems


def _shape_in(base: Checkpoint, name: str) -> tuple[int, ...] | None:
    return tuple(base.shape(name)) if name in base.places else None


def _pairs(
    adapter: Adapter, skeleton: PreTrainedModel, places: dict[str, tuple[Path, str]], problems: list[str]
) -> dict[str, LoraPair]:
    """LoRA factors by the name of the parameter they change."""
    expected = skeleton.state_dict()
    tied = {*skeleton.all_tied_weights_keys, *skeleton.all_tied_weights_keys.values()}
    renamings = [t for t in get_model_conversion_mapping(skeleton) if isinstance(t, WeightRenaming)]
    found, unknown = {}, []
    for module, pair in adapter.pairs.items():
        name = f"{module}.weight"
        if name not in expected:
            name, _ = rename_source_key(name, renamings, [], skeleton.base_model_prefix, expected)
        if name not in expected:
            unknown.append(module)
            continue
        if name in tied:
            problems.append(
                f"it adapts {module!r}, whose weight is tied to another module's: PEFT changes one of the two, a merged weight "
                "both; train without it in `target_modules`, or untie the base"
            )
            continue
        owner = skeleton.get_submodule(name.rpartition(".")[0])
        shape = _product_shape(adapter, pair, isinstance(owner, Conv1D) or pair.embedding, expected[name])
        if shape != tuple(expected[name].shape):
            problems.append(
                f"its factors of {module!r} make a matrix {list(shape)}, but the base's is {list(expected[name].shape)}; the "
                "adapter was trained on another base"
            )
        elif isinstance(owner, nn.Conv2d) and owner.groups != 1:
            problems.append(f"it adapts {module!r}, a convolution in groups, whose delta is no product of two matrices")
        elif name in places:
            found[name] = pair
    if unknown:
        problems.append(
            f"it adapts {len(unknown)} modules that a {type(skeleton).__name__} does not have: {listed(unknown)}; it was "
            "trained on another architecture"
        )
    return found


def _product_shape(adapter: Adapter, pair: LoraPair, transposed: bool, weight: torch.Tensor) -> tuple[int, ...]:
    """Shape that a parameter would need to have for its LoRA factors to fit."""
    a, b = adapter.shapes[pair.a], adapter.shapes[pair.b]
    if transposed:
        return (a[1], b[0])
    return (b[0], *a[1:]) if weight.dim() == len(a) else (b[0], *a[1:], *b[2:])


# ---- was it trained on this base? ------------------------------------------------------------------------------------


def _check_base(expert: AdaptedCheckpoint, named: str | None, base: str, folder: Path) -> None:
    """
    Refuse an adapter of another base than the build's: by name and revision, else by comparing all weights.

    Raises:
        TwinMergingError: the weights differ, or what the adapter names cannot be found to compare.
    """
    if named is not None and _same_name(named, base):
        return
    remedy = f"if it is the same model, say so: `base_model: {base}` in the expert's entry of the recipe"
    if named is None:
        raise TwinMergingError(
            f"{expert.role}: adapter_config.json names no base, so it may be another than {base}; {remedy}"
        )
    try:
        other = open_base(named, folder, expert.base.role, expert.task_class, expert.config)
    except TwinMergingError as error:
        raise TwinMergingError(
            f"{expert.role}: the adapter was trained on {named!r}, the recipe's base is {base!r}, and they cannot be compared "
            f"because the former is not to be had here; {remedy}"
        ) from error
    difference = first_difference(expert.base, other)
    if difference is not None:
        raise TwinMergingError(
            f"{expert.role}: the adapter was trained on {named!r}, whose weights are not those of the recipe's base {base!r} "
            f"({difference} differs); all experts must come from one base"
        )


def _same_name(named: str, base: str) -> bool:
    """The same folder or Hub id; a revision that one of them does not give is taken to fit."""
    (one, _, mine), (other, _, its) = named.partition("@"), base.partition("@")
    return one == other and (mine == its or not mine or not its)


def first_difference(one: Checkpoint, other: Checkpoint) -> str | None:
    """Name of the first backbone tensor in which two checkpoints of one class differ; None: their weights are the same."""
    if one.path == other.path:
        return None
    for name in sorted(set(one.places) ^ set(other.places)):
        return name
    for name in one.places:
        if one.shape(name) != other.shape(name) or not torch.equal(
            one.tensor(name).float(), other.tensor(name).float()
        ):
            return name
    return None
