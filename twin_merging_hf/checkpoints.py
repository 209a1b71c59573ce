"""Checkpoints, read lazily tensor by tensor: the only file that opens experts, bases and ready shared models."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_layers import GradientCheckpointingLayer

from twin_merging_hf.modeling.limits_twin_merging import check_sizes
from twin_merging_hf.modeling.shared_twin_merging import LANGUAGE_MODELS, find_shared_class, refuse_unservable

from .adapters import ADAPTER_WEIGHTS, is_adapter
from .batch_statistics import Statistics, batch_norms, restated
from .errors import TwinMergingError, is_file, without_tokens


_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MOST_CONFIG_CHARACTERS = 1 << 24
_SETTINGS = ("config.json", "adapter_config.json")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


@dataclass
class Checkpoint:
    """
    One model folder: its config, its task class, and where each tensor of the task model lies.

    role: how messages call it, such as "expert 'sst2'" or "base model".
    places: name in the task model -> (file, name in the file).
    missing, extra: backbone tensors that the task class has and the files lack, and the other way round.
    ignored: head tensors of other tasks in the files.
    """

    role: str
    source: str
    path: Path
    config: PreTrainedConfig
    task_class: type[PreTrainedModel]
    skeleton: PreTrainedModel
    places: dict[str, tuple[Path, str]]
    missing: list[str]
    extra: list[str]
    ignored: list[str]
    from_hub: bool = False
    absent: list[str] = field(default_factory=list)
    """Backbone tensors that a base's own class does not have, such as the pooler of a masked language model."""
    copies: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Second copies of tied tensors, by the name of the one that counts."""
    statistics: Statistics = field(default_factory=dict, repr=False, compare=False)
    """Statistics in which the batch norms are read (`batch_statistics`); where empty, they are read as stored."""
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)
    _fingerprint: str = field(default="", repr=False, compare=False)

    @property
    def prefix(self) -> str:
        """Name of the backbone inside the task model, such as "bert"."""
        return self.task_class.base_model_prefix

    @cached_property
    def auto_class(self) -> str:
        """Name of the Auto class that the task class belongs to."""
        return find_shared_class(self.task_class.__name__)[1]

    @property
    def is_language_model(self) -> bool:
        """True for models that write tokens: all of their tensors are backbone."""
        return self.auto_class in LANGUAGE_MODELS

    @cached_property
    def backbone(self) -> dict[str, torch.Size]:
        """Shapes, as stored, of all backbone tensors that are there."""
        return {name: self.shape(name) for name in self.places if self.in_backbone(name)}

    def in_backbone(self, name: str) -> bool:
        """False for tensors of a task head."""
        return self.is_language_model or name.startswith(f"{self.prefix}.")

    @cached_property
    def head_modules(self) -> list[str]:
        """Direct children with parameters outside the backbone, in order."""
        if self.is_language_model:
            return []
        children = self.skeleton.named_children()
        return [name for name, child in children if name != self.prefix and any(True for _ in child.parameters())]

    @cached_property
    def layers_path(self) -> str:
        """
        Path, in the task model, of its list of layers: the first list of which every member is a Transformers layer, or
        that is as long as the config says (layers, or stages of a convolutional model).

        Raises:
            TwinMergingError: there is none.
        """
        lists = [(name, m) for name, m in self.skeleton.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        for name, members in lists:
            if all(isinstance(layer, GradientCheckpointingLayer) for layer in members):
                return name
        counts = (getattr(self.config, "num_hidden_layers", 0), len(getattr(self.config, "depths", None) or ()))
        for name, members in lists:
            if len(members) in counts:
                return name
        raise TwinMergingError(
            f"{self.task_class.__name__} has no list of layers in which a router could stop; use `router: {{pass: full}}`"
        )

    @property
    def layer_count(self) -> int:
        """How many layers the backbone has."""
        return len(cast(nn.ModuleList, self.skeleton.get_submodule(self.layers_path)))

    @cached_property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of a convolutional model's feature maps: before each layer, then of the last; found on the skeleton."""
        found: list[int] = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
            for layer in cast(nn.ModuleList, self.skeleton.get_submodule(self.layers_path))
        ]
        pixels = torch.empty(1, self.config.num_channels, 64, 64, device="meta")  # of any size: nothing is computed
        last = self.skeleton.eval().base_model(pixel_values=pixels).last_hidden_state
        for hook in hooks:
            hook.remove()
        return (*found, last.shape[1])

    def head_tensors(self) -> list[str]:
        """Names of the tensors outside the backbone."""
        return [name for name in self.places if not self.in_backbone(name)]

    def find_untied(self) -> str | None:
        """Return the name of a tied tensor of which the files hold two copies that differ, or None."""
        for name, (file, key) in self.copies.items():
            if not torch.equal(self._open(file).get_tensor(key), self.tensor(name)):
                return name
        return None

    def contradictions(self) -> list[str]:
        """Tensors whose shape is not what the config says, as sentences."""
        expected = self.skeleton.state_dict()
        return [
            f"tensor {name!r} is {list(self.shape(name))}, but {list(expected[name].shape)} by its config.json"
            for name in self.places
            if self.shape(name) != expected[name].shape
        ]

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading it."""
        file, key = self.places[name]
        return torch.Size(self._open(file).get_slice(key).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor as stored, without reading it."""
        file, key = self.places[name]
        return _DTYPES[self._open(file).get_slice(key).get_dtype()]

    @cached_property
    def batch_norms(self) -> dict[str, Any]:
        """Batch norms of the task model, by name."""
        return batch_norms(self.skeleton)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor: as stored, but batch norms in the common `statistics`, where there are some."""
        module = name.rpartition(".")[0]
        if f"{module}.running_mean" in self.statistics and module in self.batch_norms:
            return restated(self.stored, name, self.batch_norms[module], self.statistics)
        return self.stored(name)

    def stored(self, name: str) -> torch.Tensor:
        """Read one tensor, as stored."""
        file, key = self.places[name]
        return self._open(file).get_tensor(key)

    def fingerprint(self) -> str:
        """SHA-256 of the weight files, in order of their names."""
        if not self._fingerprint:  # all files are read for it
            self._fingerprint = weights_fingerprint(self.path, self.role)
        return self._fingerprint

    def load_model(self) -> PreTrainedModel:
        """The checkpoint as its own stock class, float32."""
        return self.task_class.from_pretrained(self.path, dtype=torch.float32).eval()

    @property
    def adapter_of(self) -> str | None:
        """For a LoRA adapter, the base that it is put on."""
        return None

    @property
    def processing_paths(self) -> list[Path]:
        """Folders in which tokenizer, image processor and generation settings may lie; the first that has them counts."""
        return [self.path]

    def close(self) -> None:
        """Close the files."""
        self._handles.clear()

    def find_not_finite(self) -> str | None:
        """Return the name of a tensor that holds NaN or infinity, or None. Reads every tensor once."""
        for name in self.places:
            tensor = self.stored(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return name
        return None


def weights_fingerprint(path: Path, role: str) -> str:
    """SHA-256 of a model folder's weight files (an adapter's own), in order of their names. Raises as `open_checkpoint`."""
    if is_adapter(path):
        return _sha256([path / ADAPTER_WEIGHTS])
    return _sha256(sorted(set(_weight_files(path, role).values())))


def settings_fingerprint(path: Path) -> str:
    """SHA-256 of the files that say how a model folder's weights are used."""
    return _sha256([path / name for name in _SETTINGS if (path / name).is_file()])


def commit_of(path: Path) -> str | None:
    """The commit of a model folder in the Hub's cache, or None for any other folder."""
    return path.name if path.parent.name == "snapshots" else None


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def resolve(source: str, folder: Path, role: str) -> Path:
    """
    Return the local folder of a source: a folder (relative to `folder`), or a Hub id with an optional `@revision`.

    Raises:
        TwinMergingError: there is no such folder, and no such repository can be had from the Hub.
    """
    try:
        local = local_folder(source, folder)
        if local.is_dir():
            return local
    except (OSError, RuntimeError, ValueError) as error:  # such as `~nobody`, or a name that no file can have
        raise TwinMergingError(f"{role}: {source!r} is not a folder: {error}") from error
    repo_id, _, revision = source.partition("@")
    if not _HUB_ID.fullmatch(repo_id) or repo_id in (".", "..") or source.startswith((".", "/", "~")):
        raise TwinMergingError(f"{role}: {local} is not a folder")
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise TwinMergingError(
            f"{role}: {source!r} is neither a folder ({local} does not exist) nor available from the Hub "
            f"({type(error).__name__}: {next(iter(without_tokens(str(error)).splitlines()), 'no message')})"
        ) from error


def local_folder(source: str, folder: Path) -> Path:
    """Where a source lies if it is a folder."""
    return folder / Path(source).expanduser()  # an absolute path stays itself


def open_checkpoint(source: str, folder: Path, role: str, like: Checkpoint | None = None) -> Checkpoint:
    """
    Open a checkpoint without reading its weights.

    Args:
        like: open it as this checkpoint's task class (for a base model, whose own head does not matter).

    Raises:
        TwinMergingError: no config, no safetensors, a damaged file, or a class that is not Transformers' own.
    """
    path = resolve(source, folder, role)
    config = load_config(path, role)
    if like is not None:
        if config.model_type != like.config.model_type:
            raise TwinMergingError(
                f"{role} is a {config.model_type} model, but {like.role} is a {like.config.model_type} model; "
                "all must be of one architecture"
            )
        return open_base(source, folder, role, like.task_class, like.config)
    task_class = _task_class(config, role)
    skeleton = _skeleton(task_class, config, path, role)
    places, missing, extra, ignored, copies = _locate(skeleton, _weight_files(path, role), role)
    from_hub = not local_folder(source, folder).is_dir()
    return Checkpoint(
        role, source, path, config, task_class, skeleton, places, missing, extra, ignored, from_hub, copies=copies
    )


def open_base(
    source: str, folder: Path, role: str, task_class: type[PreTrainedModel], like: PreTrainedConfig
) -> Checkpoint:
    """
    Open the backbone of a checkpoint of any head as a task class with the labels of `like`; its own head is ignored.

    Raises:
        TwinMergingError: as `open_checkpoint`.
    """
    path = resolve(source, folder, role)
    own_config = load_config(path, role)
    config = _with_labels(load_config(path, role), like)
    skeleton = _skeleton(task_class, config, path, role)
    places, missing, extra, ignored, copies = _locate(skeleton, _weight_files(path, role), role)
    from_hub = not local_folder(source, folder).is_dir()
    base = Checkpoint(
        role, source, path, config, task_class, skeleton, places, missing, extra, ignored, from_hub, copies=copies
    )
    known = _own_tensors(own_config, skeleton)
    base.ignored = sorted(set(ignored) | {name for name in extra if name in known})
    base.extra = [name for name in extra if name not in known]
    heads = [name for name in places if not base.in_backbone(name)]
    base.ignored += [name for name in heads if name not in base.ignored]
    base.places = {name: place for name, place in places.items() if name not in heads}
    held = _own_tensors(own_config, None)
    missing = [name for name in missing if base.in_backbone(name)]
    base.absent = [name for name in missing if held and name not in held]
    base.missing = [name for name in missing if name not in base.absent]
    return base


def _skeleton(task_class: type[PreTrainedModel], config: PreTrainedConfig, path: Path, role: str) -> PreTrainedModel:
    """The task model without its weights. Raises `TwinMergingError` if the config does not fit, or no rule fits the model."""
    _refuse(task_class, config, role)
    try:
        with torch.device("meta"):
            skeleton = task_class(config)
    except Exception as error:
        raise TwinMergingError(
            f"{role}: {path / 'config.json'} describes no {task_class.__name__}: {error!r}"
        ) from error
    _refuse_fused_experts(skeleton, role)
    return skeleton


def load_config(path: Path, role: str) -> PreTrainedConfig:
    """Read a checkpoint's config; none of its code runs. Raises `TwinMergingError` if there is none, or it is damaged."""
    if not (path / "config.json").is_file():
        raise TwinMergingError(f"{role}: {path} has no config.json{_adapter_hint(path)}")
    try:
        text = (path / "config.json").read_text(encoding="utf-8")
        if len(text) > _MOST_CONFIG_CHARACTERS:
            raise ValueError(f"{len(text)} characters, more than {_MOST_CONFIG_CHARACTERS}")
        check_sizes(json.loads(text), "config")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise TwinMergingError(
            f"{role}: {path / 'config.json'} cannot be read as a Transformers config: {error}"
        ) from error
    if getattr(config, "quantization_config", None):
        raise TwinMergingError(
            f"{role} is quantised (`quantization_config` in {path / 'config.json'}); deltas are differences of full-precision "
            "weights, so give the checkpoint that it was quantised from"
        )
    return config


def _adapter_hint(path: Path) -> str:
    """What a folder that is no checkpoint is instead, where PEFT made it."""
    if (path / "adapter_config.json").is_file():
        return " (it is a PEFT adapter; adapters are experts, not bases)"
    inner = sorted(file.parent.name for file in path.glob("*/adapter_config.json"))
    return f" (there are PEFT adapters in its folders {', '.join(inner)}: name one of these)" if inner else ""


def _task_class(config: PreTrainedConfig, role: str) -> type[PreTrainedModel]:
    names = config.architectures or []
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise TwinMergingError(f"{role}: config.json must name one architecture, got {names!r}")
    try:
        return find_shared_class(names[0])[0]
    except ValueError as error:
        raise TwinMergingError(
            f"{role} is a {names[0]}; experts must be checkpoints of one of Transformers' own classes for sequence, token or "
            "image classification or for language modeling (load it with its Auto class, such as "
            "AutoModelForSequenceClassification or AutoModelForCausalLM, and save it again)"
        ) from error


def _refuse(task_class: type[PreTrainedModel], config: PreTrainedConfig, role: str) -> None:
    try:
        refuse_unservable(task_class, config)
    except ValueError as error:
        raise TwinMergingError(
            f"{role}: {error}; its rows cannot each have a mixture of their own. Not supported"
        ) from error


def _refuse_fused_experts(skeleton: PreTrainedModel, role: str) -> None:
    """Weights of a mixture-of-experts layer are one parameter [expert, ...], which tokens, not rows, are sent through."""
    fused = [name for name, value in skeleton.named_parameters() if ".experts." in name and value.dim() > 2]
    if fused:
        raise TwinMergingError(
            f"{role}: {type(skeleton).__name__} has layers of many experts of its own ({fused[0]}, and {len(fused) - 1} more), "
            "which no rule can change per row. Not supported"
        )


def _with_labels(config: PreTrainedConfig, other: PreTrainedConfig) -> PreTrainedConfig:
    """A base's config with an expert's number of labels and its choice of tying, which its own class may not have."""
    if "tie_word_embeddings" in other.to_dict():
        config.tie_word_embeddings = other.tie_word_embeddings
    config.num_labels = other.num_labels or 2
    return config


def _weight_files(path: Path, role: str) -> dict[str, Path]:
    """Map each tensor name in the files to its file. As in Transformers, an index counts where there is no whole file."""
    try:
        if (path / _INDEX).is_file() and not (path / _WEIGHTS).is_file():
            weight_map = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                if Path(shard).name != shard or not is_file(path / shard):
                    raise TwinMergingError(f"{role}: {path / _INDEX} names {shard!r}, which is not a file beside it")
        elif (path / _WEIGHTS).is_file():
            shards = [_WEIGHTS]
        else:
            found = [name for name in _PICKLES if (path / name).is_file()]
            remedy = (
                f"only {found[0]}, a pickle, is there; pickles can run code, so load it once where you trust it and "
                "call `save_pretrained` to get safetensors"
                if found
                else "no weights are there"
            )
            raise TwinMergingError(f"{role}: {path} has no {_WEIGHTS}: {remedy}")
        located: dict[str, Path] = {}
        for shard in shards:
            (path / shard).open("rb").close()  # of a forbidden file safetensors says that it is missing
            with safe_open(path / shard, framework="pt") as handle:
                located.update(dict.fromkeys(handle.keys(), path / shard))
        return located
    except TwinMergingError:
        raise
    except PermissionError as error:
        raise TwinMergingError(f"{role}: {error.filename} cannot be read: {error.strerror}") from error
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise TwinMergingError(f"{role}: the weights in {path} are damaged: {type(error).__name__}: {error}") from error


def _locate(skeleton: PreTrainedModel, files: dict[str, Path], role: str) -> tuple[dict, list, list, list, dict]:
    """
    Find each tensor of the task model in the files, by Transformers' own renaming rules.

    Returns:
        places, missing names, extra backbone names, extra head names, second copies of tied tensors.
    """
    expected = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    buffers = {name for name, _ in skeleton.named_buffers()} - set(expected)
    has_prefix = any(key.startswith(f"{prefix}.") for key in files)
    places, extra, ignored = {}, [], []
    for key in sorted(files, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, expected)
        if converted is not None:
            raise TwinMergingError(
                f"{role}: tensor {key!r} is stored in another form than {type(skeleton).__name__} uses; "
                "load and save the checkpoint once with this version of Transformers (save_original_format=False)"
            )
        if name in expected:
            places[name] = (files[key], key)
        elif name in buffers or f"{prefix}.{name}" in buffers:
            continue  # old checkpoints carry tables such as position_ids that models now compute
        elif name.startswith(f"{prefix}.") or not has_prefix:
            extra.append(name)
        else:
            ignored.append(name)
    copies = {}
    for target, source in skeleton.all_tied_weights_keys.items():
        if target in places and source in places:
            copies[source] = places.pop(target)
        elif target in places:
            places[source] = places.pop(target)
    missing = [name for name in expected if name not in places and name not in skeleton.all_tied_weights_keys]
    return places, missing, extra, ignored, copies


def _own_tensors(config: PreTrainedConfig, skeleton: PreTrainedModel | None) -> set[str]:
    """Names of the tensors of a base checkpoint's own class, and of the whole backbone of a task model's class."""
    import transformers

    names: set[str] = set()
    also = [] if skeleton is None else [type(skeleton.base_model).__name__]
    for class_name in [*(config.architectures or []), *also]:
        own_class = getattr(transformers, class_name, None)
        if not (isinstance(own_class, type) and issubclass(own_class, PreTrainedModel)):
            continue
        with torch.device("meta"):
            own = set(own_class(config).state_dict())
        names |= own | {f"{own_class.base_model_prefix}.{name}" for name in own}
    return names


def generation_settings(checkpoint: Checkpoint) -> GenerationConfig:
    """How a checkpoint generates unless told otherwise: its generation_config.json, else what its config says."""
    for path in checkpoint.processing_paths:
        if (path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(checkpoint.config)
