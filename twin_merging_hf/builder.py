"""From a recipe to an artifact: the order of the steps, and no mathematics."""

import copy
import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from twin_merging_hf import modeling
from twin_merging_hf.hub_upload.model_card import write_card
from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.modeling.routing_twin_merging import new_router
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from ._version import __version__
from .align_experts import align_inputs, needs_alignment
from .artifact import LAYOUT, Storage, check_files, label_fields, refuse_existing, staged, storage, write_json
from .build_router import make_router, router_type
from .calibration import calibrate, calibration_rows
from .checkpoints import Checkpoint, commit_of, generation_settings, settings_fingerprint
from .deferred import empty_model, put, widened
from .errors import TwinMergingError
from .journal import Journal, journal
from .pictures import draw_confusion
from .preflight import Inputs, preflight
from .probe import probe
from .progress import Progress, no_loading_bars
from .recipe import Recipe, load_recipe
from .row_hashes import recorded_hashes, row_hash, write_hashes
from .separation import Separation, factor_dtype, model_dtype, planned_bytes, separate
from .source_card import card_facts
from .verdict import Verdict, mean_label, reach_verdict


LARGE = 1 << 31
"""Bytes of a shared model in float32 from which on a build does not hold it in memory as a whole."""
_SHARD = "1GB"  # what is in memory while weights are written


@dataclass(frozen=True)
class BuildResult:
    """What a build made: the folder, the artifact's report (as in report.json) and the verdict."""

    folder: Path
    report: dict
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    """What a build would do: router, tensors, bytes. Made by a dry run after every check has passed."""

    experts: list[dict]
    labels: list[str]
    router_type: str
    shared_bytes: int
    delta_bytes: int
    notes: list[str]


def plan_build(recipe: Recipe | str | Path, out: str | Path, progress: Progress | None = None) -> Plan:
    """
    Check everything and say what a build would do, without writing anything.

    Raises:
        TwinMergingError: lists every problem found.
    """
    progress = progress or Progress(quiet=True)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    refuse_existing(Path(out))
    inputs = preflight(recipe, progress.say)
    try:
        needs_alignment(inputs)
        planned = planned_bytes(inputs)
        labels = list(inputs.label_space.labels)
        notes = [*inputs.notes, *([planned.note] if planned.note else [])]
        return Plan(inputs.entries, labels, router_type(inputs), planned.shared, planned.deltas, notes)
    finally:
        inputs.close()


def build_artifact(
    recipe: Recipe | str | Path,
    out: str | Path,
    progress: Progress | None = None,
    workers: int | None = None,
    low_memory: bool | None = None,
) -> BuildResult:
    """
    Build one artifact from experts.

    A build whose process was killed goes on where it was, if it is started again.

    Args:
        recipe: a `Recipe` or the path of a recipe file.
        out: the artifact's folder; must not exist. It appears at once, when all is done.
        workers: tensors that are merged and compressed at a time, each by one thread; None: one for each core.
        low_memory: hold no model in memory as a whole, whatever its size: slower where rows are run. None: where the
            shared model takes more than 2 GiB in float32. The result does not depend on it.

    Raises:
        TwinMergingError: something in the inputs that the user can fix; nothing is written then.
    """
    progress = progress or Progress()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    out = Path(out)
    refuse_existing(out)
    progress.say("checking recipe, checkpoints and data")
    inputs = preflight(recipe, progress.say)
    try:
        inputs = align_inputs(inputs, progress)
        inputs.low_memory = _is_large(inputs) if low_memory is None else low_memory
        with staged(out) as folder, journal(out, _key(inputs)) as parts, no_loading_bars():
            report, verdict = _build_into(folder, inputs, progress, parts, workers)
    finally:
        inputs.close()
    return BuildResult(out, report, verdict)


def _is_large(inputs: Inputs) -> bool:
    return 4 * sum(shape.numel() for shape in inputs.experts[0].backbone.values()) > LARGE


def _key(inputs: Inputs) -> str:
    """Names all that the split depends on: recipe, experts, rows, and what computes it."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    found = [repr(inputs.recipe), _provenance(inputs), data_report(inputs), code.hexdigest()]
    return hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()


def _build_into(
    folder: Path, inputs: Inputs, progress: Progress, parts: Journal, workers: int | None
) -> tuple[dict, Verdict]:
    names = progress.counter("merging and compressing", len(inputs.experts[0].backbone))
    inputs.on_fit = lambda name: names.set_postfix_str(f"fitting {name}")
    separation = separate(inputs, lambda name: names.update(), journal=parts, workers=workers)
    names.close()
    if parts.found:
        progress.say(f"{parts.found} finished tensors were there from a build that was killed")
    model, router = make_router(lambda fields: _assemble(separation, inputs, fields), separation, inputs, progress)
    _save(model, folder, inputs)
    loaded = _loaded(type(model), folder, model.config, inputs.low_memory)
    del model
    progress.say("probing: a batch that mixes experts against dense models")
    difference = probe(loaded, inputs.recipe.seed)
    bar = progress.counter("calibrating the heads", calibration_rows(inputs))
    temperatures = calibrate(loaded, inputs, bar.update)
    bar.close()
    verdict = reach_verdict(loaded, inputs, router, progress.counter)
    config = loaded.config
    excluded = [name for name, entry in separation.coverage.items() if entry["treatment"] == "excluded"]
    if excluded:
        inputs.notes.append(
            f"{len(excluded)} tensors are the shared model's alone, as the recipe says; see report.json"
        )
    dropped = [name for name, entry in separation.coverage.items() if entry["treatment"] == "dropped"]
    if dropped:
        inputs.notes.append(
            f"{len(dropped)} tensors are the shared model's alone: no delta was worth its bytes; see report.json"
        )
    report = _report(folder, config, separation, inputs, router, difference, verdict)
    report["head_temperatures"] = temperatures
    write_json(folder / LAYOUT.report, report)
    if LAYOUT.confusion in config.provenance["companions"]:
        draw_confusion(folder / LAYOUT.confusion, inputs.recipe.names, router.confusion)  # type: ignore[union-attr]
    write_card(folder / LAYOUT.card, config, report, inputs.recipe.text, inputs.kind)
    config.provenance["verdict"] = asdict(verdict)
    config.dtype = config.shared_config.dtype = model_dtype(inputs)
    (folder / LAYOUT.unfinished_config).write_text(config.to_json_string(), encoding="utf-8")
    problems = check_files(folder, config)
    if problems:
        raise TwinMergingError("the finished artifact is not whole: " + "; ".join(problems))
    return report, verdict


@torch.no_grad()
def _assemble(separation: Separation, inputs: Inputs, routing: dict[str, Any]) -> Any:
    """Make the wrapper model and put all tensors in their places; `routing` holds the config's fields of routing."""
    first = inputs.experts[0]
    shared_config = copy.deepcopy(first.config)
    shared_config.architectures, shared_config.problem_type = None, None
    shared_config._name_or_path = ""
    shared_config.dtype = None
    space = inputs.label_space
    if space.kind != "language":
        shared_config.num_labels = 2
    dtype = model_dtype(inputs)
    config = TwinMergingConfig(
        shared_config=shared_config,
        shared_class=first.task_class.__name__,
        head_modules=first.head_modules,
        layers_path=first.layers_path if routing["router_layer"] is not None or routing["router_layers"] else "",
        experts=inputs.entries,
        ranks=separation.ranks,
        exact_deltas=separation.exact,
        sparse_deltas=separation.sparse,
        factor_dtype=factor_dtype(inputs),
        is_encoder_decoder=space.kind == "language" and shared_config.is_encoder_decoder,
        **label_fields(space),
        shared_reference=_shared_reference(inputs),
        provenance=_provenance(inputs),
        dtype=dtype,
        **routing,
    )
    config.auto_map = dict(AUTO_MAP)
    auto_class = find_shared_class(config.shared_class)[1]
    model_class = getattr(modeling, AUTO_MAP[auto_class].split(".")[-1])
    model: Any = empty_model(lambda: model_class(config), dtype)
    model.router = new_router(config).eval()
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in separation.state.items()}
    missing = [name for name in put(model, state) if not name.startswith("router.")]
    if missing:
        raise RuntimeError(f"assembling: missing {missing[:3]}")
    if model.can_generate():
        model.generation_config = generation_settings(first)
    return model


def _loaded(model_class: Any, folder: Path, config: TwinMergingConfig, low_memory: bool) -> Any:
    """The artifact as anyone would load it, in float32; with `low_memory`, its matrices only while they are read."""
    if not low_memory:
        return model_class.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    return widened(model_class.from_pretrained(folder, config=config, dtype=config.dtype).eval())


def _save(model: Any, folder: Path, inputs: Inputs) -> None:
    """Write processor, recipe, weights, config and code; the list of companions goes into the config."""
    if inputs.processing is not None:
        processor = inputs.processing.processor
        # Several chat templates would go into a folder of their own, but all companions are files.
        several = isinstance(getattr(processor, "chat_template", None), dict)
        processor.save_pretrained(folder, **({"save_jinja_files": False} if several else {}))
    (folder / LAYOUT.recipe).write_text(inputs.recipe.text, encoding="utf-8")
    hashes = recorded_hashes(inputs.recipe, inputs.entries, inputs.kind)
    if hashes:
        write_hashes(folder / LAYOUT.rows, hashes)
    companions = {path.name for path in folder.iterdir()} | {LAYOUT.report, LAYOUT.card}
    if inputs.rows is not None and can_draw():
        companions.add(LAYOUT.confusion)
    model.config.provenance["companions"] = sorted(companions)
    save_weights(model, folder)


def save_weights(model: Any, folder: Path) -> None:
    """Write weights and model code, and no config yet."""
    parts = folder / "parts"
    model.save_pretrained(parts, max_shard_size=_SHARD)
    (parts / LAYOUT.config).unlink()  # written again at the end: until then, nothing here shall load
    for path in parts.iterdir():
        path.rename(folder / path.name)
    parts.rmdir()


def can_draw() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def _shared_reference(inputs: Inputs) -> dict | None:
    """Where the shared model is, if the recipe wants no copy of it."""
    base = inputs.base
    if not inputs.recipe.shared_by_reference or base is None:
        return None
    if base.from_hub:
        return {"model": base.source.partition("@")[0], "revision": commit_of(base.path), "sha256": base.fingerprint()}
    return {"model": str(base.path.resolve()), "revision": None, "sha256": base.fingerprint()}


def _provenance(inputs: Inputs) -> dict:
    recipe = inputs.recipe
    sources = {"base": inputs.base} if inputs.base else {}
    if inputs.shared is not None and inputs.shared is not inputs.base:
        sources["shared"] = inputs.shared
    sources |= dict(zip(recipe.names, inputs.experts, strict=True))
    return {
        "recipe_sha256": hashlib.sha256(recipe.text.encode()).hexdigest(),
        "seed": recipe.seed,
        "sources": {name: source_of(checkpoint) for name, checkpoint in sources.items()},
        "versions": versions(),
    }


def source_of(checkpoint: Checkpoint) -> dict:
    """Where a checkpoint came from, its fingerprints, and what its card says about rights and data, for `provenance`."""
    return {
        "model": checkpoint.source,
        "from_hub": checkpoint.from_hub,
        "revision": commit_of(checkpoint.path) if checkpoint.from_hub else None,
        "sha256": checkpoint.fingerprint(),
        "config_sha256": settings_fingerprint(checkpoint.path),
        **({"adapter_of": checkpoint.adapter_of} if checkpoint.adapter_of else {}),
        **card_facts(checkpoint.path),
    }


def versions() -> dict[str, str]:
    """Versions of what made an artifact."""
    return {
        "twin-merging-hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _report(folder, config, separation, inputs, router, difference, verdict) -> dict:
    sizes: Storage = storage(folder, config)
    return {
        "experts": inputs.entries,
        "labels": list(inputs.label_space.labels),
        "storage": {**asdict(sizes), "total": sizes.total, "ratio": round(sizes.ratio, 4)},
        "exclusive": {**asdict(inputs.recipe.exclusive), "dtype": config.factor_dtype, **separation.summary()},
        "router": asdict(router) if router else {"type": config.router_type, "held_out_rows": 0},
        **({"alignment": inputs.alignment} if inputs.alignment else {}),
        "probe": {"largest_relative_difference": float(f"{difference:.1e}")},
        "verdict": asdict(verdict),
        "data": data_report(inputs),
        "notes": inputs.notes,
        "tensors": separation.coverage,
    }


def data_report(inputs: Inputs) -> dict:
    """Counts and digests of the rows that the build used (rows.json has each row's), and means of regression labels."""
    report = {}
    for entry, rows in zip(inputs.entries, inputs.rows or [], strict=bool(inputs.rows)):
        found: dict[str, Any] = {}
        for part in ("train", "held_out"):
            chosen = getattr(rows, part)
            joined = "\n".join(sorted(row_hash(row) for row in chosen))
            found[part] = {"rows": len(chosen), "sha256": hashlib.sha256(joined.encode()).hexdigest()}
        if entry["problem_type"] == "regression":
            found["train_mean"] = mean_label(rows.train)
        report[entry["name"]] = found
    return report
