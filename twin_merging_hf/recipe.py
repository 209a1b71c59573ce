"""The recipe: every knob of a build as frozen dataclasses, read from YAML and checked before any weight is touched."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twin_merging_hf.modeling.configuration_twin_merging import ROUTER_PASSES, ROUTER_TYPES, check_expert_names

from .errors import TwinMergingError
from .merging import DEFAULTS
from .safe_yaml import parse_yaml


MERGE_METHODS = tuple(DEFAULTS)
EXCLUSIVE_METHODS = ("svd", "magnitude", "bernoulli")
FACTOR_DTYPES = {
    "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "int8": "int8", "int4": "int4",
}  # fmt: skip
_SIZES = ("rank", "ratio", "energy", "budget")
COMPUTE_DTYPES = ("float32", "float64")
OUT_DTYPES = ("float32", "bfloat16", "float16")
BASE = "base"
_FIELDS = {"lambda": "scaling", "density": "density", "normalize": "normalize"}


@dataclass(frozen=True)
class DataFiles:
    """JSONL files of one expert. Only `train` (and `validation`) feed the router; `test` is never read by a build."""

    train: Path
    """Rows that the router is trained on."""
    validation: Path | None = None
    """Rows that are held out; None: a seeded fifth of `train`."""
    test: Path | None = None
    """Rows that `evaluate` scores."""


@dataclass(frozen=True)
class ExpertSpec:
    """One fine-tuned checkpoint."""

    name: str
    """Letters, digits, `_ . -`; unique ignoring case. Left out: the last part of `model`."""
    model: str
    """Folder, or Hub id with an optional `@revision`: a full checkpoint or a PEFT LoRA adapter."""
    data: DataFiles | None = None
    """A JSONL file of rows, or a mapping of the files below; None: the expert brings no rows."""
    labels: tuple[str, ...] | None = None
    """New label names, in id order."""
    weight: float = 1.0
    """Coefficient of this expert in the shared model's merge."""
    base_model: str | None = None
    """Of a LoRA adapter: the base that it was trained on, instead of what its own config says."""


@dataclass(frozen=True)
class Exclusive:
    """How each expert's delta from the shared model is compressed (Twin-Merging, section 4.2)."""

    method: str = "svd"
    """`svd`, or for ablations `magnitude` (the largest entries) or `bernoulli` (random entries, rescaled)."""
    rank: int | None = 16
    """Rank of the factors of each matrix, at most min(m, n)."""
    ratio: float | None = None
    """Instead of `rank`: rank as a share of min(m, n) of each matrix, at least 1; of sparse methods, share of entries."""
    dtype: str = "float32"
    """Storage: `float32`, `bfloat16`, `int8` or `int4` (the last two for factors only)."""
    energy: float | None = None
    """Instead of `rank`: share of each delta's squared Frobenius norm to keep, by the smallest rank that does."""
    budget: float | None = None
    """Instead of `rank`: bytes of all deltas over those of the shared model, spent where they keep the most energy."""

    def rank_of(self, m: int, n: int) -> int:
        """Rank for an [m, n] matrix."""
        smallest = min(m, n)
        if self.ratio is not None:
            return max(1, min(smallest, int(self.ratio * smallest)))
        return min(smallest, self.rank or 1)


@dataclass(frozen=True)
class RouterSettings:
    """How rows are routed, and how the router is trained."""

    type: str = "auto"
    """
    `linear`, `mlp`, `centroid`, `lexical`, `knn`, `projection`, or `auto`: what does best on held-out rows if every
    expert has data, else `projection`.
    """
    layers: tuple[int, ...] | None = None
    """
    The router reads the states before these layers, and a `prefix` pass ends before the last of them; default: the
    middle one (`auto`: chosen). In a `late` pass experts act from the last of them on; it has no default.
    """
    router_pass: str = "prefix"
    """How far the shared model runs before the answer: up to `layer`, whole, or on the way of the answer itself."""
    temperature: float | None = None
    """None: fitted on held-out rows (1.0 for `projection`)."""
    top_k: int | None = None
    """Keep only so many of the largest weights of a row; None: all (`projection`: 1)."""
    epochs: int = 10
    """Of the `mlp` router; the `linear` one is solved to convergence."""
    lr: float = 5e-4
    """Learning rate of the `mlp` router."""
    none: float | None = None
    """The `none` route: the share of the experts' own held-out rows that may be taken for strange; None: no such route."""
    rank: int | None = None
    """Dimension of each expert's subspace (`projection`: 32), or of the space of neighbours (`knn`: 64)."""
    exemplars: int = 100
    """Rows kept of each expert (`knn`)."""
    neighbours: int = 10
    """How many exemplars vote (`knn`)."""
    rows: int = 2000
    """At most this many training rows for each expert (the paper: 1000)."""


@dataclass(frozen=True)
class AlignmentSettings:
    """How experts of different initialisation are brought to one order of units before the split (MuDSC)."""

    method: str = "mudsc"
    """`mudsc`, or `auto`: where weights look like those of different initialisations."""
    weight_share: float | None = 0.5
    """Share of weights, beside activations, in the similarity of units; None (`search`): chosen on held-out rows."""
    reference: str | None = None
    """The expert whose order the others take; None: the first."""
    calibration: int | Path = 512
    """How many of the experts' training rows activations are read on, or a JSONL file of rows (labels do not matter)."""
    max_sweeps: int = 20
    """At most so many visits of all blocks of units; it stops after five without improvement."""
    seed: int | None = None
    """None: the recipe's."""


@dataclass(frozen=True)
class Recipe:
    """A whole build."""

    experts: tuple[ExpertSpec, ...]
    """The fine-tuned checkpoints, at least one."""
    base_model: str | None = None
    """Folder, or Hub id with an optional `@revision`, of the model that the experts were fine-tuned from."""
    shared_model: str | None = None
    """Instead of a merge: a ready checkpoint, or `base`, the base itself."""
    shared_by_reference: bool = False
    """With `shared_model: base`: the artifact names the base and holds no copy of it."""
    merge_method: str = "linear"
    """How the shared model is merged from the experts."""
    scaling: float | None = None
    """Coefficient of the task vectors; None: the merge method's default (`merging.DEFAULTS`), as for the next two."""
    density: float | None = None
    """Share of each task vector's entries that `ties` and `dare_*` keep."""
    normalize: bool | None = None
    """Divide by the experts' weights."""
    exclusive: Exclusive = field(default_factory=Exclusive)
    """How the deltas are compressed."""
    router: RouterSettings = field(default_factory=RouterSettings)
    """How rows find their expert; a name alone is its type."""
    alignment: AlignmentSettings | None = None
    """For experts of different initialisation; None (`none`): nothing is moved. A name alone is its method."""
    include: tuple[str, ...] = ()
    """Regular expressions that match tensor names in full: only these backbone tensors get deltas."""
    exclude: tuple[str, ...] = ()
    """Regular expressions that match tensor names in full: these stay the shared model's alone."""
    dtype: str = "float32"
    """In which merging computes."""
    out_dtype: str | None = None
    """Of the artifact; None: the experts'."""
    seed: int = 0
    """Of splits, routers and randomised SVD."""
    trust_remote_code: bool = False
    """For tokenizers that come with code; model classes are always Transformers' own."""
    folder: Path = Path(".")
    """Relative paths are relative to this folder (the recipe file's)."""
    text: str = ""
    """The YAML as it was written."""

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    def gets_delta(self, tensor: str) -> bool:
        """False where `include`/`exclude` leave a tensor to the shared model alone (full match of regexes)."""
        if self.include and not any(re.fullmatch(pattern, tensor) for pattern in self.include):
            return False
        return not any(re.fullmatch(pattern, tensor) for pattern in self.exclude)


def load_recipe(path: str | Path) -> Recipe:
    """
    Read and check a recipe file.

    Raises:
        TwinMergingError: the file is missing, not YAML, or holds an unknown key or an impossible value; the message
            names the key and what is allowed.
    """
    path = Path(path)
    if path.is_dir():
        raise TwinMergingError(f"recipe {path} is a folder; give the file in it, such as {path / 'recipe.yaml'}")
    if not path.is_file():
        raise TwinMergingError(f"recipe {path} does not exist; `twin-merging init MODEL... -o recipe.yaml` writes one")
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text)
    except UnicodeDecodeError as error:
        raise TwinMergingError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise TwinMergingError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TwinMergingError(f"{path}: not valid YAML: {error}") from error
    try:
        return parse_recipe(content, folder=path.parent, text=text)
    except TwinMergingError as error:
        raise TwinMergingError(f"{path}: {error}") from error


def parse_recipe(content: Any, folder: Path = Path("."), text: str = "") -> Recipe:
    """Check a recipe's content (as parsed from YAML) and return it. Raises as `load_recipe`."""
    keys = ("base_model", "shared_model", "shared_by_reference", "merge_method", "parameters", "experts", "exclusive", "router",
            "include", "exclude", "dtype", "out_dtype", "seed", "trust_remote_code", "alignment")  # fmt: skip
    content = _mapping(content, "the recipe", keys)
    if "experts" not in content:
        raise TwinMergingError("`experts` is missing: list at least one `{name: ..., model: ...}`")
    raw_experts = content["experts"]
    if not isinstance(raw_experts, list) or not raw_experts:
        raise TwinMergingError(f"`experts` must be a list of at least one expert, got {raw_experts!r}")
    experts = tuple(_expert(raw, index, folder) for index, raw in enumerate(raw_experts))
    try:
        check_expert_names([expert.name for expert in experts])
    except ValueError as error:
        raise TwinMergingError(f"`experts`: {error}") from error
    parameters = _mapping(_or(content.get("parameters"), {}), "`parameters`", ("lambda", "density", "normalize"))
    recipe = Recipe(
        experts=experts,
        base_model=_optional_text(content, "base_model"),
        shared_model=_optional_text(content, "shared_model"),
        shared_by_reference=_flag(content, "shared_by_reference", False),
        merge_method=_choice(content, "merge_method", MERGE_METHODS, "linear"),
        scaling=_number(parameters, "lambda", 0.0) if "lambda" in parameters else None,
        density=_density(parameters),
        normalize=_flag(parameters, "normalize", True) if "normalize" in parameters else None,
        exclusive=_exclusive(content.get("exclusive")),
        router=_router(content.get("router")),
        alignment=_alignment(content.get("alignment"), folder),
        include=_patterns(content, "include"),
        exclude=_patterns(content, "exclude"),
        dtype=_choice(content, "dtype", COMPUTE_DTYPES, "float32"),
        out_dtype=_choice(content, "out_dtype", OUT_DTYPES, None),
        seed=_integer(content, "seed", 0, 0),
        trust_remote_code=_flag(content, "trust_remote_code", False),
        folder=folder,
        text=text,
    )
    _check_together(recipe, content)
    return recipe


def _check_together(recipe: Recipe, content: dict) -> None:
    if recipe.shared_model and "merge_method" in content:
        raise TwinMergingError("give either `shared_model` or `merge_method`, not both")
    if recipe.shared_by_reference and recipe.shared_model != BASE:
        raise TwinMergingError(
            "`shared_by_reference` needs `shared_model: base`: a merged shared model is nowhere else but in the artifact"
        )
    _check_merge(recipe)
    _check_alignment(recipe)
    without = [expert.name for expert in recipe.experts if expert.data is None]
    if recipe.router.type not in ("auto", "projection") and without:
        raise TwinMergingError(
            f"router {recipe.router.type!r} is trained on `data`, which expert {without[0]!r} does not have; "
            "give `data` for every expert, or `router: {type: projection}`, which needs none"
        )
    if recipe.router.top_k is not None and recipe.router.top_k > len(recipe.experts):
        raise TwinMergingError(f"`router.top_k` is {recipe.router.top_k}, but there are {len(recipe.experts)} experts")
    if recipe.router.none is not None and without:
        raise TwinMergingError(
            f"`router.none` is measured on `data`, which expert {without[0]!r} does not have; give `data` for every expert, "
            "or leave `none` out"
        )
    if recipe.router.type == "projection" and len(recipe.router.layers or ()) > 1:
        raise TwinMergingError("`projection` reads one state: give one `router.layer`")
    if recipe.router.router_pass == "late" and recipe.router.layers is None:
        raise TwinMergingError(
            "`router.pass: late` needs `router.layer`: experts act from that layer on, and what they have below it is left out"
        )
    if recipe.router.type == "projection" and recipe.router.router_pass == "full":
        raise TwinMergingError("`router.pass: full` is not possible with `projection`, which reads a layer's input")


def _check_alignment(recipe: Recipe) -> None:
    settings = recipe.alignment
    if settings is None:
        return
    if settings.reference is not None and settings.reference not in recipe.names:
        raise TwinMergingError(
            f"`alignment.reference` is {settings.reference!r}, which is none of the experts ({', '.join(recipe.names)})"
        )
    without = [expert.name for expert in recipe.experts if expert.data is None]
    if settings.weight_share is None and without:
        raise TwinMergingError(
            f"`alignment.weight_share: search` compares held-out rows, and expert {without[0]!r} has no `data`; give a number"
        )


def check_base(recipe: Recipe) -> None:
    """
    Not a part of reading a recipe: LoRA experts may bring the base that it does not name.

    Raises:
        TwinMergingError: the shared model is, or is merged with, a base that neither recipe nor experts name.
    """
    if recipe.base_model is not None:
        return
    if recipe.shared_model == BASE:
        raise TwinMergingError("`shared_model: base` needs `base_model`")
    if DEFAULTS[recipe.merge_method].needs_base and not recipe.shared_model:
        raise TwinMergingError(f"`merge_method: {recipe.merge_method}` needs `base_model`")


def _check_merge(recipe: Recipe) -> None:
    method, defaults = recipe.merge_method, DEFAULTS[recipe.merge_method]
    without = [expert.name for expert in recipe.experts if expert.data is None]
    if method == "least_squares" and not recipe.shared_model:
        if without:
            raise TwinMergingError(
                f"`merge_method: least_squares` is fitted on inputs of `data`, which expert {without[0]!r} does not have; give "
                "`data` for every expert, or use `linear`"
            )
        if min(expert.weight for expert in recipe.experts) <= 0:
            raise TwinMergingError("`merge_method: least_squares` needs experts' `parameters.weight` above 0")
    given = {"lambda": recipe.scaling, "density": recipe.density, "normalize": recipe.normalize}
    known = {"lambda": defaults.scaling, "density": defaults.density, "normalize": defaults.normalize}
    for key, value in given.items():
        if value is not None and known[key] is None:
            have = ", ".join(name for name, default in DEFAULTS.items() if getattr(default, _FIELDS[key]) is not None)
            raise TwinMergingError(
                f"`parameters.{key}` has no meaning with `merge_method: {method}`, only with {have}; remove it"
            )
    normalises = defaults.normalize if recipe.normalize is None else recipe.normalize
    by_sum = method in ("linear", "task_arithmetic", "dare_linear")
    if normalises and by_sum and sum(expert.weight for expert in recipe.experts) == 0:
        raise TwinMergingError(f"the experts' `parameters.weight` sum to 0, so `{method}` cannot normalise them")


def _density(parameters: dict) -> float | None:
    if "density" not in parameters:
        return None
    value = _number(parameters, "density", 1.0)
    if not 0 < value <= 1:
        raise TwinMergingError(f"`parameters.density` must be above 0 and at most 1, got {value!r}")
    return value


def _expert(raw: Any, index: int, folder: Path) -> ExpertSpec:
    raw = _mapping(raw, f"`experts[{index}]`", ("name", "model", "base_model", "data", "labels", "parameters"))
    where = f"`experts[{index}]`"
    model = raw.get("model")
    if not isinstance(model, str) or not _is_text(model):
        raise TwinMergingError(f"{where}: `model` must be a folder or a Hub id, got {model!r}")
    name = raw.get("name", re.sub(r"[^A-Za-z0-9_.-]", "-", model.split("@")[0].rstrip("/").split("/")[-1]))
    labels = raw.get("labels")
    if labels is not None:
        strings = isinstance(labels, list) and all(isinstance(label, str) and _is_text(label) for label in labels)
        if not strings or not labels or len(set(labels)) != len(labels):
            raise TwinMergingError(
                f"{where}: `labels` must be a list of different names (quote numbers), got {labels!r}"
            )
    parameters = _mapping(_or(raw.get("parameters"), {}), f"{where}: `parameters`", ("weight",))
    return ExpertSpec(
        name=name,
        model=model,
        data=_data(raw.get("data"), where, folder),
        labels=tuple(labels) if labels is not None else None,
        weight=_number(parameters, "weight", 1.0),
        base_model=_optional_text(raw, "base_model"),
    )


def _data(raw: Any, where: str, folder: Path) -> DataFiles | None:
    if raw is None:
        return None
    if isinstance(raw, str):
        raw = {"train": raw}
    raw = _mapping(raw, f"{where}: `data`", ("train", "validation", "test"))
    if "train" not in raw:
        raise TwinMergingError(f"{where}: `data` needs `train`")
    files = {}
    for key, value in raw.items():
        if not isinstance(value, str):
            raise TwinMergingError(f"{where}: `data.{key}` must be a path to a JSONL file, got {value!r}")
        files[key] = folder / value
    return DataFiles(**files)


def _exclusive(raw: Any) -> Exclusive:
    raw = _mapping(_or(raw, {}), "`exclusive`", ("method", *_SIZES, "dtype"))
    method = _choice(raw, "method", EXCLUSIVE_METHODS, "svd")
    given = [key for key in _SIZES if raw.get(key) is not None or key == "rank" in raw]
    if len(given) > 1:
        raise TwinMergingError(
            f"`exclusive`: give one of {', '.join(_SIZES)}; {' and '.join(given)} are not both possible"
        )
    dtype = FACTOR_DTYPES[_choice(raw, "dtype", tuple(FACTOR_DTYPES), "fp32")]
    if method != "svd":
        if given != ["ratio"]:
            raise TwinMergingError(
                f"`exclusive.method: {method}` needs `ratio`, the share of entries that are kept (such as 0.1)"
                + (f", not `{given[0]}`" if given else "")
            )
        if dtype.startswith("int"):
            raise TwinMergingError(f"`exclusive.method: {method}` stores entries as fp32 or bf16, got `dtype: {dtype}`")
    return Exclusive(
        method=method,
        rank=_integer(raw, "rank", 16, 1) if given in ([], ["rank"]) else None,
        ratio=_share(raw, "ratio"),
        dtype=dtype,
        energy=_share(raw, "energy"),
        budget=None if raw.get("budget") is None else _positive(raw, "budget", 1.0),
    )


def _share(raw: dict, key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise TwinMergingError(f"`exclusive.{key}` must be above 0 and at most 1, got {value!r}")
    return float(value)


def _router(raw: Any) -> RouterSettings:
    if isinstance(raw, str):
        raw = {"type": raw}
    keys = (
        "type",
        "layer",
        "pass",
        "temperature",
        "top_k",
        "none",
        "epochs",
        "lr",
        "rank",
        "exemplars",
        "neighbours",
        "rows",
    )
    raw = _mapping(_or(raw, {}), "`router`", keys)
    return RouterSettings(
        type=_choice(raw, "type", ("auto", *ROUTER_TYPES), "auto"),
        layers=_layers(raw.get("layer")),
        router_pass=_choice(raw, "pass", ROUTER_PASSES, "prefix"),
        temperature=None if raw.get("temperature") is None else _positive(raw, "temperature", 1.0),
        top_k=None if raw.get("top_k") is None else _integer(raw, "top_k", 1, 1),
        none=_none_share(raw),
        epochs=_integer(raw, "epochs", 10, 1),
        lr=_positive(raw, "lr", 5e-4),
        rank=None if raw.get("rank") is None else _integer(raw, "rank", 16, 1),
        exemplars=_integer(raw, "exemplars", 100, 1),
        neighbours=_integer(raw, "neighbours", 10, 1),
        rows=_integer(raw, "rows", 2000, 2),
    )


ALIGNMENT_METHODS = ("mudsc", "auto")


def _alignment(raw: Any, folder: Path) -> AlignmentSettings | None:
    if raw is None or raw == "none":
        return None
    if isinstance(raw, str):
        raw = {"method": raw}
    keys = ("method", "weight_share", "reference", "calibration", "max_sweeps", "seed")
    raw = _mapping(raw, "`alignment` (or `none`, `auto`)", keys)
    method = raw.get("method", "mudsc")
    if method not in ALIGNMENT_METHODS:
        raise TwinMergingError(
            f"`alignment` must be none, auto or mudsc (zip is no alignment: it cannot be undone, so nothing could be split "
            f"into shared and exclusive after it; `twin-merging align --mode zip` makes one merged checkpoint), got {method!r}"
        )
    share = raw.get("weight_share", 0.5)
    if share != "search" and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1):
        raise TwinMergingError(f"`alignment.weight_share` must be between 0 and 1, or search, got {share!r}")
    calibration = raw.get("calibration", 512)
    if not isinstance(calibration, str):
        calibration = _integer(raw, "calibration", 512, 0)
    return AlignmentSettings(
        method=method,
        weight_share=None if share == "search" else float(share),
        reference=_optional_text(raw, "reference"),
        calibration=folder / calibration if isinstance(calibration, str) else calibration,
        max_sweeps=_integer(raw, "max_sweeps", 20, 0),
        seed=None if raw.get("seed") is None else _integer(raw, "seed", 0, 0),
    )


def _layers(raw: Any) -> tuple[int, ...] | None:
    if raw is None:
        return None
    layers = raw if isinstance(raw, list) else [raw]
    legal = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < 1 << 20 for layer in layers)
    if not legal or not layers or len(set(layers)) != len(layers):
        raise TwinMergingError(
            f"`router.layer` must be a layer's number (an integer of at least 0), or a list of different ones, got {raw!r}"
        )
    return tuple(sorted(layers))


def _none_share(raw: dict) -> float | None:
    value = raw.get("none")
    if value is None or value is False:
        return None
    if value is True:
        return 0.05
    share = _positive(raw, "none", 0.05)
    if share >= 1:
        raise TwinMergingError(f"`router.none` is a share of rows: true (0.05), or between 0 and 1, got {value!r}")
    return share


# ---- small checks, all of which name the key --------------------------------------------------------------------


def _mapping(raw: Any, where: str, keys: tuple[str, ...]) -> dict:
    if not isinstance(raw, dict):
        raise TwinMergingError(f"{where} must be a mapping of {', '.join(keys)}, got {raw!r}")
    for key in raw:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TwinMergingError(f"{where} has an unknown key {key!r}{hint} (known: {', '.join(keys)})")
    return raw


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _choice(raw: dict, key: str, choices: tuple[str, ...], default: Any) -> Any:
    value = raw.get(key, default)
    if value is not default and value not in choices:
        raise TwinMergingError(f"`{key}` must be one of {', '.join(choices)}, got {value!r}")
    return value


def _integer(raw: dict, key: str, default: int, least: int) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        shown = "one too large" if isinstance(value, int) and value > least else repr(value)
        raise TwinMergingError(f"`{key}` must be an integer of at least {least} (and below 2**63), got {shown}")
    return value


def _number(raw: dict, key: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        shown = "one too large" if isinstance(value, int) and value.bit_length() > 999 else repr(value)
        raise TwinMergingError(f"`{key}` must be a number, got {shown}")
    return float(value)


def _positive(raw: dict, key: str, default: float) -> float:
    value = _number(raw, key, default)
    if value <= 0:
        raise TwinMergingError(f"`{key}` must be above 0, got {value!r}")
    return value


def _flag(raw: dict, key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise TwinMergingError(f"`{key}` must be true or false, got {value!r}")
    return value


def _is_text(value: str) -> bool:
    """Whether a string is not empty and has no half characters, which no file could hold."""
    return bool(value) and not any("\ud800" <= character <= "\udfff" for character in value)


def _optional_text(raw: dict, key: str) -> str | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise TwinMergingError(f"`{key}` must be a folder or a Hub id, got {value!r}")
    return value


def _patterns(raw: dict, key: str) -> tuple[str, ...]:
    value = _or(raw.get(key), [])
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TwinMergingError(f"`{key}` must be a regular expression or a list of them, got {value!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise TwinMergingError(f"`{key}`: {pattern!r} is not a regular expression: {error}") from error
    return tuple(patterns)
