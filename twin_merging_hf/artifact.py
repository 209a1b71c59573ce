"""The artifact on disk: its files, how a model becomes one, and how to tell that one is whole."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from twin_merging_hf import modeling
from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.deltas_twin_merging import delta_key
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.modeling.reference_twin_merging import is_referenced
from twin_merging_hf.modeling.saving_twin_merging import is_running
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from . import distributed
from .errors import TwinMergingError, is_file, storage_error
from .folder_check import paper_problems, settings_problems, stray_files


@dataclass(frozen=True)
class Layout:
    """Names of the files in an artifact's folder."""

    config: str = "config.json"
    unfinished_config: str = "config.json.unfinished"
    weights: str = "model.safetensors"
    index: str = "model.safetensors.index.json"
    recipe: str = "recipe.yaml"
    report: str = "report.json"
    card: str = "README.md"
    confusion: str = "confusion.png"
    rows: str = "rows.json"
    evaluation: str = "evaluation.json"
    evaluation_picture: str = "evaluation.png"


LAYOUT = Layout()


def code_files() -> list[Path]:
    """The files of model code that travel with every artifact."""
    return sorted(Path(modeling.__file__).parent.glob("*_twin_merging.py"))


@contextmanager
def staged(out: Path, artifact: bool = True) -> Iterator[Path]:
    """
    Give a staging folder that becomes `out` when the block ends well, and disappears when it does not.

    Args:
        artifact: False: something else than an artifact, which needs no care about its config.

    The block writes the config as `LAYOUT.unfinished_config`; it gets its name at the very end, so that a killed process
    leaves only a hidden folder that does not load, which the next build of `out` removes.

    Raises:
        TwinMergingError: `out` exists already.
    """
    refuse_existing(out)
    distributed.wait_for_all()
    made = [parent for parent in out.parents if not parent.exists()]
    staging = out.parent / f".{out.name}.building-{os.getpid()}"
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(out)
            staging.mkdir()
        except OSError as error:
            raise TwinMergingError(f"{out} cannot be made: {error.strerror}: {error.filename}") from error
        try:
            yield staging
            if distributed.is_main():
                refuse_existing(out)
                if artifact:
                    os.rename(staging / LAYOUT.unfinished_config, staging / LAYOUT.config)
                os.rename(staging, out)
            distributed.wait_for_all()  # of several processes one is written, and there for all
        except (OSError, SafetensorError) as error:
            reason = storage_error(error)
            if reason is None:
                raise
            raise TwinMergingError(f"{out} cannot be written: {reason}; nothing was left there") from error
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
        if not out.exists():
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()


def _remove_leftovers(out: Path) -> None:
    """Remove folders in which a process that is gone was building `out`."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(?:building|parts)-(\d+)")
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not is_running(int(match.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise `TwinMergingError` if `out` exists: an artifact is never written over something else."""
    if out.exists() or out.is_symlink():
        raise TwinMergingError(f"{out} exists already; choose another folder or remove it first")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is the same for the same content."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_MOST_CONFIG_BYTES = 1 << 24


def read_config(folder: Path) -> TwinMergingConfig:
    """
    Read an artifact's config.

    Raises:
        TwinMergingError: the folder is no artifact, or its config is not valid.
    """
    path = folder / LAYOUT.config
    if not path.is_file():
        raise TwinMergingError(f"{folder} is not an artifact: it has no {LAYOUT.config}")
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, more than {_MOST_CONFIG_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TwinMergingError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TwinMergingError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("model_type") != TwinMergingConfig.model_type:
        raise TwinMergingError(f"{folder} is not an artifact: its config's model_type is not 'twin_merging'")
    try:
        config = TwinMergingConfig.from_dict(content)
    except Exception as error:  # a config of unknown origin may make Transformers fail in any way
        raise TwinMergingError(f"{path}: {error or type(error).__name__}") from error
    if not config.experts:
        raise TwinMergingError(f"{path}: `experts` is empty")
    companions = config.provenance.get("companions", [])
    if not isinstance(companions, list) or not all(isinstance(n, str) and n and Path(n).name == n for n in companions):
        raise TwinMergingError(
            f"{path}: `provenance.companions` must be a list of names of files beside it, got {str(companions)[:200]}"
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """
    The artifact's weight files: those that Transformers reads, which leaves an index alone where there is one whole file.

    Raises:
        TwinMergingError: there are none, or the index is damaged.
    """
    if (folder / LAYOUT.index).is_file() and not (folder / LAYOUT.weights).is_file():
        try:
            names = set(json.loads((folder / LAYOUT.index).read_text(encoding="utf-8"))["weight_map"].values())
            if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
                raise ValueError("`weight_map` must name files beside it")
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise TwinMergingError(f"{folder / LAYOUT.index}: damaged: {error}") from error
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / LAYOUT.weights]
    for file in files:
        if not is_file(file):
            raise TwinMergingError(f"{folder}: {file.name[:200]} is missing")
        try:
            file.open("rb").close()  # of a forbidden file safetensors says that it is missing
        except PermissionError as error:
            raise TwinMergingError(f"{file} cannot be read: {error.strerror}") from error
    return files


# What reading a damaged or hostile file of tensors may end in.
_DAMAGED = (SafetensorError, OSError, AttributeError, RuntimeError, TypeError, ValueError)


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of an artifact, by name, read from the files' headers."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    view = handle.get_slice(name)
                    sizes[name] = _DTYPE_BYTES.get(view.get_dtype(), 4) * int(torch.Size(view.get_shape()).numel())
        except _DAMAGED as error:
            raise TwinMergingError(f"{file}: damaged: {error}") from error
    return sizes


_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Storage:
    """
    Bytes of an artifact by part; `ratio` is all tensor bytes over those of the shared backbone. A shared model by reference
    counts, although it lies elsewhere: it has to be loaded.
    """

    shared: int
    deltas: int
    heads: int
    router: int

    @property
    def total(self) -> int:
        return self.shared + self.deltas + self.heads + self.router

    @property
    def ratio(self) -> float:
        return self.total / self.shared if self.shared else float("inf")


def storage(folder: Path, config: TwinMergingConfig) -> Storage:
    """Account for every tensor byte of an artifact."""
    parts = {"shared": 0, "deltas": 0, "heads": 0, "router": 0}
    heads = tuple(f"shared.{name}." for name in config.head_modules)
    for name, size in tensor_sizes(folder).items():
        part = "heads" if name.startswith(heads) else name.split(".")[0]
        parts[part if part in parts else "shared"] += size
    if config.shared_reference:
        skeleton = _skeleton(config)
        dtype: Any = config.dtype or torch.float32
        tied, width = skeleton.all_tied_weights_keys, dtype.itemsize
        base = {name: tensor for name, tensor in skeleton.state_dict().items() if is_referenced(name, config)}
        parts["shared"] = sum(width * tensor.numel() for name, tensor in base.items() if name not in tied)
    return Storage(**parts)


def check_artifact(folder: Path) -> list[str]:
    """
    Tell what is wrong with an artifact; an empty list means that it is whole.

    Checks that the config is valid, all tensors are there with nothing more, finite, and of the shapes that the config
    gives; that the model code is the package's and nothing else in the folder can run; that every companion file is there
    and belongs to this config. `reload.check_whole` also loads it.
    """
    try:
        config = read_config(folder)
        return check_files(folder, config)
    except TwinMergingError as error:
        return [str(error)]
    except PermissionError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]


def check_files(folder: Path, config: TwinMergingConfig) -> list[str]:
    """As `check_artifact`, with a config that is known to be valid. Raises `TwinMergingError` for damaged weights."""
    problems = [*_check_tensors(folder, config), *stray_files(folder, {source.name for source in code_files()})]
    problems += settings_problems(folder)
    if getattr(config, "auto_map", None) != AUTO_MAP:
        problems.append(
            f"{LAYOUT.config}: `auto_map` does not name the package's classes in this folder, so other heads would not load, or "
            "other code would"
        )
    problems += _check_code(folder)
    problems += paper_problems(config, folder / LAYOUT.report, folder / LAYOUT.recipe)
    companions = config.provenance.get("companions", [])
    return problems + [f"{name} is missing" for name in companions if not is_file(folder / name)]


def _check_code(folder: Path) -> list[str]:
    """Model code that is missing, or not the package's, and what to do about it."""
    problems, differing = [], []
    for source in code_files():
        copy = folder / source.name
        if not is_file(copy):
            problems.append(f"model code {source.name} is missing; it would not load with trust_remote_code")
        elif copy.read_bytes() != source.read_bytes():
            differing.append(source.name)
    if differing:
        problems.append(
            f"model code {', '.join(differing)} is not that of the installed package; where the artifact was made by another "
            "version, load it with the installed one and `save_pretrained` to a new folder (the weights stay, the code becomes "
            "the installed package's); where it was not, somebody changed the code"
        )
    return problems


def _check_tensors(folder: Path, config: TwinMergingConfig) -> list[str]:
    skeleton = _skeleton(config)
    expected = dict(skeleton.state_dict())
    sparse = {sparse_keys(name)[1]: name for name in config.sparse_deltas}
    renamings = [t for t in get_model_conversion_mapping(skeleton) if isinstance(t, WeightRenaming)]
    problems: list[str] = []
    seen: set[str] = set()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    # On disk some families keep the names of older versions of Transformers.
                    name = key
                    if key not in expected:
                        name, _ = rename_source_key(key, renamings, [], skeleton.base_model_prefix, expected)
                    if name in seen:
                        problems.append(f"tensor {key!r} is there more than once")
                    seen.add(name)
                    tensor = handle.get_tensor(key)
                    found = _check_tensor(tensor, key, expected.get(name))
                    if not found and name in sparse:
                        owner = expected[f"shared.{sparse[name]}"]
                        found = _check_places(tensor, key, config.sparse_deltas[sparse[name]], owner.numel())
                    problems += found
        except _DAMAGED as error:
            raise TwinMergingError(f"{file}: damaged: {error}") from error
    # Of tied tensors one is stored.
    referenced = {name for name in expected if is_referenced(name, config)}
    problems += [f"tensor {name!r} is the base's, to which the config refers" for name in sorted(seen & referenced)]
    unseen = set(expected) - seen - referenced - set(skeleton.all_tied_weights_keys)
    return problems + [f"tensor {name!r} is missing" for name in sorted(unseen)]


def expected_tensors(config: TwinMergingConfig) -> set[str]:
    """Names of all tensors of an artifact, as its model has them. Raises `TwinMergingError` if it describes none."""
    return set(_skeleton(config).state_dict())


def _check_tensor(tensor: torch.Tensor, key: str, expected: torch.Tensor | None) -> list[str]:
    if expected is None:
        return [f"tensor {key!r} does not belong to this artifact"]
    if tensor.shape != expected.shape:
        return [f"tensor {key!r} is {list(tensor.shape)}, expected {list(expected.shape)}"]
    if tensor.dtype != expected.dtype and not (tensor.is_floating_point() and expected.is_floating_point()):
        return [f"tensor {key!r} is of type {tensor.dtype}, expected {expected.dtype}"]
    if tensor.is_floating_point() and not torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all():
        return [f"tensor {key!r} holds NaN or infinity"]
    return []


def _check_places(indices: torch.Tensor, key: str, counts: list[int], size: int) -> list[str]:
    """Places of sparse entries must ascend within each expert and lie inside the parameter."""
    for block in indices.split(counts):
        if len(block) and (int(block[0]) < 0 or int(block[-1]) >= size or not bool((block.diff() > 0).all())):
            return [f"tensor {key!r} must hold ascending places below {size} for each expert"]
    return []


def _skeleton(config: TwinMergingConfig) -> modeling.TwinMergingModel:
    try:
        with torch.device("meta"):
            return modeling.TwinMergingModel(config)
    except Exception as error:  # Transformers' own classes fail in any way where sizes do not fit together
        raise TwinMergingError(f"{LAYOUT.config} does not describe a model: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Inspection:
    """What is inside an artifact, as `inspect` prints it."""

    folder: str
    task: str | None
    """Name of the pipeline that serves it, if there is one."""
    shared_class: str
    experts: list[dict]
    labels: list[str]
    router: dict
    storage: dict
    rank: dict
    """Largest rank of each expert's factors, by name."""
    delta: dict
    """How deltas are stored: `kind` (`factors` or `sparse`), `dtype`, `sizes` (sum of ranks or of entries, by expert)."""
    provenance: dict
    shared_reference: dict | None = None
    """Where the shared model is, if the artifact does not hold it."""


def inspect_artifact(folder: Path) -> Inspection:
    """Read what is inside an artifact without loading its weights. Raises `TwinMergingError` as `read_config`."""
    config = read_config(folder)
    sizes = storage(folder, config)
    sizes_of = config.sparse_deltas or config.ranks
    per_expert = list(zip(*config.ranks.values(), strict=True)) if config.ranks else [() for _ in config.experts]
    totals = [sum(numbers) for numbers in zip(*sizes_of.values(), strict=True)] if sizes_of else [0] * len(per_expert)
    return Inspection(
        folder=str(folder),
        task=pipeline_task(config),
        shared_class=config.shared_class,
        experts=config.experts,
        labels=config.label_names,
        router={
            "type": config.router_type,
            "pass": config.router_pass,
            "layer": config.router_layer,
            "temperature": config.router_temperature,
            "top_k": config.router_top_k,
        },
        storage={**sizes.__dict__, "total": sizes.total, "ratio": round(sizes.ratio, 4)},
        rank={e["name"]: max(ranks, default=0) for e, ranks in zip(config.experts, per_expert, strict=True)},
        delta={
            "kind": "sparse" if config.sparse_deltas else "factors",
            "dtype": config.factor_dtype,
            "sizes": dict(zip(config.expert_names, totals, strict=True)),
        },
        provenance=config.provenance,
        shared_reference=config.shared_reference,
    )


def pipeline_task(config: TwinMergingConfig) -> str | None:
    """Name of the pipeline that serves an artifact; None for encoder-decoders, which are called by `generate`."""
    return _PIPELINES[find_shared_class(config.shared_class)[1]]


_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": None,  # Transformers has none any more
    "AutoModelForMaskedLM": "fill-mask",
}


def label_fields(space: LabelSpace) -> dict[str, Any]:
    """Config fields that say what the outputs' columns mean; none for language models."""
    if space.kind == "language":
        return {}
    return {
        "id2label": dict(enumerate(space.labels)),
        "label2id": {label: i for i, label in enumerate(space.labels)},
        "problem_type": "regression" if space.kind == "value" else "single_label_classification",
    }


def factor_keys(name: str) -> tuple[str, str]:
    """State-dict keys of a factored parameter's `up` and `down`."""
    return f"deltas.{delta_key(name)}.up", f"deltas.{delta_key(name)}.down"


def scale_key(name: str) -> str:
    """State-dict key of the scales of a parameter's integer factors."""
    return f"deltas.{delta_key(name)}.scale"


def sparse_keys(name: str) -> tuple[str, str]:
    """State-dict keys of a sparse parameter's `values` and `indices`."""
    return f"deltas.{delta_key(name)}.values", f"deltas.{delta_key(name)}.indices"


def exact_key(name: str) -> str:
    """State-dict key of a vector's exact deltas."""
    return f"deltas.{delta_key(name)}.delta"
