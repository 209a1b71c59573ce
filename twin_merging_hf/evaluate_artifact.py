"""An artifact on labelled rows that nobody has seen: every figure that a user may want to know, from files to one dict."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.modeling_twin_merging import SHARED
from twin_merging_hf.modeling.shared_twin_merging import LANGUAGE_MODELS, find_shared_class

from .align_experts import align_inputs
from .artifact import LAYOUT, pipeline_task, read_config, storage
from .data import read_rows
from .errors import TwinMergingError
from .evaluate_task import Answers, Task, as_scored, task_answers
from .evaluation import ArtifactOutputs, checkpoint_model, model_outputs, static_merge
from .inference import BATCH
from .language_evaluation import longest_completion, text_difference, written_texts
from .merging import DEFAULTS
from .metrics import ScoreTable, bootstrap_difference, metric_for
from .preflight import Inputs, preflight
from .processing import Processing, load_processing, position_limit
from .progress import Progress, no_loading_bars
from .recipe import load_recipe
from .row_hashes import RowHashes, read_hashes, recorded_hashes, refuse_overlap
from .scoring import calibration, expert_predictions, router_score
from .timing import time_ratio
from .verdict import mean_label


ON_THESE_ROWS = "the experts themselves, on these rows"
AT_BUILD = "recorded at build, on held-out rows of that time (not on these rows)"
_KINDS = {
    "AutoModelForSequenceClassification": "text",
    "AutoModelForImageClassification": "image",
    "AutoModelForCausalLM": "prompt",
    "AutoModelForSeq2SeqLM": "prompt",
}
_TIMED_TOKENS = 16


def evaluate_artifact(
    artifact: str | Path,
    data: Mapping[str, str | Path],
    recipe: str | Path | None = None,
    *,
    merges: Sequence[str] = (),
    metrics: Mapping[str, str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    resamples: int = 1000,
    progress: Progress | None = None,
) -> dict:
    """
    Score an artifact, routed by itself and with each row's expert given, on rows that it was not made with.

    Args:
        data: JSONL file by expert's name. Empty: the `test` files of the recipe.
        recipe: evaluate its experts on the same rows, as what the artifact's scores are relative to; without it, the
            experts' scores recorded at build are used, and the result says so.
        merges: static merges of the recipe's experts to show beside it, each with the true task's own head.
        metrics: metric by expert's name; default: accuracy, Pearson correlation for a regression, exact match for texts.
        device: where models run, as torch names it.
        seed, resamples: of the bootstrap intervals.

    Returns:
        What `docs/evaluate.md` lists, ready for JSON. All of it is the same for the same inputs, `time` excepted.

    Raises:
        TwinMergingError: rows that the artifact was made with (by file and line), a recipe of other experts, a name or
            metric that does not fit, damaged files, a package that is missing.
    """
    folder, progress = Path(artifact), progress or Progress(quiet=True)
    config, report = read_config(folder), _read_report(folder)
    if find_shared_class(config.shared_class)[1] not in _KINDS:
        raise TwinMergingError(
            f"{folder}: evaluate scores classification of whole rows, regression and generation, not {config.shared_class}"
        )
    with _opened(recipe, progress) as inputs, no_loading_bars():
        _check_request(config, inputs, merges, data)
        if merges and inputs is not None:  # of experts as the build saw them
            inputs = align_inputs(inputs, progress)
        files = dict(data) or _test_files(inputs)
        tasks = _tasks(config, files, metrics or {}, report, inputs)
        notes = _refuse_seen_rows(folder, config, report, tasks, inputs)
        notes += [f"{name}: no rows given, so not evaluated" for name in config.expert_names if name not in files]
        model, processing = _load(folder, config, device)
        bar = progress.counter("evaluating the artifact", 2 * sum(len(task.rows) for task in tasks))
        routed = {t.expert: task_answers(model, t, processing, None, bar.update) for t in tasks}
        given = {t.expert: task_answers(model, t, processing, t.name, bar.update) for t in tasks}
        bar.close()
        times = _times(model, tasks, processing)
        compared = _compare(model, tasks, routed, given, seed, resamples)
        del model
        own, source = _expert_scores(tasks, report, inputs, device, progress, notes)
        merged = {method: _merge_scores(method, tasks, inputs, device, progress) for method in merges}
    tables = {method: ScoreTable(scores, own) for method, scores in {**compared.scores, **merged}.items()}
    notes += _undefined_notes(tables["routed"])
    if not all(task.regression for task in tasks) and any(task.regression for task in tasks):
        left_out = ", ".join(task.name for task in tasks if task.regression)
        notes.append(f"calibration: regression rows ({left_out}) are left out, because a number has no distribution")
    sizes = storage(folder, config)
    return {
        "artifact": str(folder),
        "task": pipeline_task(config),
        "data": {t.name: {"file": str(t.path), "rows": len(t.rows), "metric": t.metric.name} for t in tasks},
        "experts": {"scores": own, "source": source},
        "routed": tables["routed"].as_dict(),
        "given": tables["given"].as_dict(),
        "merges": {method: tables[method].as_dict() for method in merges},
        "difference": compared.differences,
        "router": compared.router,
        "calibration": compared.calibration,
        "storage": {**asdict(sizes), "total": sizes.total, "ratio": sizes.ratio},
        "time": times,
        "notes": notes,
    }


# ---- what is asked for, and whether it may be -----------------------------------------------------------------------


@contextmanager
def _opened(recipe: str | Path | None, progress: Progress) -> Iterator[Inputs | None]:
    """The checked inputs of a recipe, closed in the end, or None without a recipe."""
    if recipe is None:
        yield None
        return
    inputs = preflight(load_recipe(recipe), progress.say)
    try:
        yield inputs
    finally:
        inputs.close()


def _read_report(folder: Path) -> dict:
    path = folder / LAYOUT.report
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("not an object")
        return report
    except (OSError, ValueError, RecursionError) as error:
        raise TwinMergingError(f"{path} cannot be read ({error}); `twin-merging check {folder}` tells more") from error


def _check_request(
    config: TwinMergingConfig, inputs: Inputs | None, merges: Sequence[str], data: Mapping[str, Any]
) -> None:
    unknown = [name for name in data if name not in config.expert_names]
    if unknown:
        raise TwinMergingError(
            f"data is given for {unknown[0]!r}, but the artifact's experts are {', '.join(config.expert_names)}"
        )
    if inputs is None:
        if merges:
            raise TwinMergingError("static merges are made of the experts, so they need the recipe (`--recipe`)")
        return
    _check_merges(merges, inputs)
    for name in data or config.expert_names:
        _check_same_expert(name, config, inputs)


def _check_merges(merges: Sequence[str], inputs: Inputs) -> None:
    for method in merges:
        if method not in (*DEFAULTS, "base"):
            raise TwinMergingError(f"{method!r} is no merge method; known: {', '.join(DEFAULTS)}, base")
        if inputs.base is None and method != "linear":
            raise TwinMergingError(f"the static merge `{method}` needs `base_model` in the recipe")


def _check_same_expert(name: str, config: TwinMergingConfig, inputs: Inputs) -> None:
    """Scores are relative to the experts that the artifact was built from, not to others of the same name."""
    entry = config.experts[config.expert_names.index(name)]
    mine = next((e for e in inputs.entries if e["name"] == name), None)
    if mine is None:
        raise TwinMergingError(
            f"the recipe has no expert {name!r} (it has {', '.join(inputs.recipe.names)}); give the artifact's recipe"
        )
    for key in ("labels", "problem_type"):
        if mine[key] != entry[key]:
            raise TwinMergingError(
                f"expert {name!r}: `{key}` is {mine[key]} in the recipe, but {entry[key]} in the artifact"
            )
    recorded = config.provenance.get("sources", {}).get(name, {}).get("sha256")
    checkpoint = inputs.experts[inputs.recipe.names.index(name)]
    if recorded is not None and checkpoint.fingerprint() != recorded:
        raise TwinMergingError(
            f"expert {name!r}: {checkpoint.path} is not the checkpoint that the artifact was built from (its weights have "
            "another SHA-256); give that one, or build the artifact again"
        )


def _test_files(inputs: Inputs | None) -> dict[str, Path]:
    experts = inputs.recipe.experts if inputs is not None else ()
    files = {e.name: e.data.test for e in experts if e.data is not None and e.data.test is not None}
    if not files:
        raise TwinMergingError("no rows to evaluate: give `--data NAME=FILE`, or a recipe with `data.test`")
    return files


def _tasks(
    config: TwinMergingConfig,
    files: Mapping[str, str | Path],
    metrics: Mapping[str, str],
    report: dict,
    inputs: Inputs | None,
) -> list[Task]:
    stray = [name for name in metrics if name not in files]
    if stray:
        raise TwinMergingError(f"a metric is given for {stray[0]!r}, but no rows of it (rows: {', '.join(files)})")
    kind, writes = _kind(config), find_shared_class(config.shared_class)[1] in LANGUAGE_MODELS
    tasks = []
    for index, entry in enumerate(config.experts):
        name, labels, regression = entry["name"], entry["labels"], entry["problem_type"] == "regression"
        if name not in files:
            continue
        path = Path(files[name])
        scored = "text" if writes else "regression" if regression else "classes"
        metric = metric_for(name, scored, len(labels), metrics.get(name))
        try:
            rows = read_rows(path, kind, labels, regression)
        except TwinMergingError as error:
            raise TwinMergingError(f"expert {name!r}: {error}") from error
        mean = _train_mean(name, report, inputs) if regression else None
        tasks.append(Task(name, index, path, rows, regression, metric, mean, writes))
    return tasks


def _kind(config: TwinMergingConfig) -> str:
    """Kind of an artifact's rows, as `read_rows` takes it."""
    return _KINDS[find_shared_class(config.shared_class)[1]]


def _train_mean(name: str, report: dict, inputs: Inputs | None) -> float | None:
    """Mean label of a regression expert's train rows: the recipe's, else as recorded at build, else unknown."""
    if inputs is not None and inputs.rows is not None and name in inputs.recipe.names:
        return mean_label(inputs.rows[inputs.recipe.names.index(name)].train)
    return report.get("data", {}).get(name, {}).get("train_mean")


def _refuse_seen_rows(
    folder: Path, config: TwinMergingConfig, report: dict, tasks: list[Task], inputs: Inputs | None
) -> list[str]:
    """Refuse rows that the artifact or the recipe's experts were made with; notes on what could not be checked."""
    recorded: list[tuple[str, RowHashes]] = []
    notes = []
    if (folder / LAYOUT.rows).is_file() or LAYOUT.rows in config.provenance.get("companions", []) or report.get("data"):
        recorded.append(("recorded in the artifact", read_hashes(folder / LAYOUT.rows)))
    else:
        notes.append(
            "the artifact was built without data and records no rows, so overlap with training was not checked"
        )
    if inputs is not None:
        recorded.append(("in the recipe", recorded_hashes(inputs.recipe, inputs.entries, inputs.kind)))
    refuse_overlap({task.name: (task.path, task.rows) for task in tasks}, recorded)
    return notes


# ---- models ---------------------------------------------------------------------------------------------------------


def _load(folder: Path, config: TwinMergingConfig, device: str) -> tuple[Any, Processing]:
    kind = _kind(config)
    processing = load_processing(folder, kind, "the artifact")
    if processing is None:
        what = "image processor" if kind == "image" else "tokenizer"
        raise TwinMergingError(f"{folder} has no {what} to read rows with; put one there and evaluate again")
    auto = getattr(transformers, find_shared_class(config.shared_class)[1])
    try:
        model = auto.from_pretrained(folder).eval()
    except (ValueError, OSError) as error:
        raise TwinMergingError(f"{folder} cannot be loaded: {error}") from error
    limit = min(processing.max_tokens, position_limit(model.shared))
    return _placed(model, device), replace(processing, max_tokens=limit)


def _placed(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise TwinMergingError(f"device {device!r} cannot be used: {error}") from error


def _expert_scores(
    tasks: list[Task], report: dict, inputs: Inputs | None, device: str, progress: Progress, notes: list[str]
) -> tuple[dict[str, float | None], str]:
    """Scores of the experts themselves, and where they come from."""
    if inputs is not None:
        models = lambda t: checkpoint_model(inputs.experts[t])  # noqa: E731
        return _stock_scores("the experts", models, tasks, inputs, device, progress), ON_THESE_ROWS  # type: ignore[return-value]
    recorded = (report.get("verdict") or {}).get("expert_scores") or {}
    scores: dict[str, float | None] = {}
    for task in tasks:
        entry = recorded.get(task.name)
        if entry is not None and entry["metric"] == task.metric.name:
            scores[task.name] = entry["score"]
        else:
            scores[task.name] = None
            what = f"only its {entry['metric']}" if entry else "no score of it"
            notes.append(f"{task.name}: the build recorded {what}; give --recipe to normalise {task.metric.name}")
    return scores, AT_BUILD


def _merge_scores(
    method: str, tasks: list[Task], inputs: Inputs | None, device: str, progress: Progress
) -> dict[str, float]:
    """Scores of a static merge under each task's own head."""
    assert inputs is not None
    return _stock_scores(method, lambda t: static_merge(inputs, t, method), tasks, inputs, device, progress)


def _stock_scores(
    what: str, model_of: Callable[[int], Any], tasks: list[Task], inputs: Inputs, device: str, progress: Progress
) -> dict[str, float]:
    """Scores by task of stock models, one for each task. Args: model_of: by the expert's place in the recipe."""
    assert inputs.processing is not None
    scores = {}
    bar = progress.counter(f"evaluating {what}", sum(len(task.rows) for task in tasks))
    for task in tasks:
        model = _placed(model_of(inputs.recipe.names.index(task.name)), device)
        if task.writes:
            tokens = longest_completion(task.rows, inputs.processing)
            texts, _ = written_texts(model, task.rows, inputs.processing, tokens, tick=bar.update)
            scores[task.name] = task.metric(texts, task.truth)
            continue
        outputs = model_outputs(model, task.rows, inputs.processing, bar.update)
        if not torch.isfinite(outputs).all():
            raise TwinMergingError(f"{task.name}: the outputs of {what} hold NaN or infinity")
        scores[task.name] = task.metric(expert_predictions(outputs, task.regression), task.truth)
    bar.close()
    return scores


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compared:
    """Figures that need the artifact's label space: scores by method and task, and what was measured of the router."""

    scores: dict[str, dict[str, float]]
    differences: dict[str, dict]
    router: dict
    calibration: dict | None


def _compare(
    model: Any,
    tasks: list[Task],
    routed: dict[int, Answers],
    given: dict[int, Answers],
    seed: int,
    resamples: int,
) -> _Compared:
    scores: dict[str, dict[str, float]] = {"routed": {}, "given": {}}
    differences, by_task = {}, {}
    labelled = {t: answers for t, answers in routed.items() if isinstance(answers, ArtifactOutputs)}
    for task in tasks:
        t, truth, draw = task.expert, task.truth, f"{seed}:{task.name}"
        by_itself, by_hand = as_scored(model, task, routed[t]), as_scored(model, task, given[t])
        scores["routed"][task.name] = task.metric(by_itself, truth)
        scores["given"][task.name] = task.metric(by_hand, truth)
        if task.writes:
            found = text_difference(by_itself, by_hand, task.rows, task.metric, draw, resamples)
            differences[task.name] = asdict(found)
            continue
        found = bootstrap_difference(by_itself, by_hand, truth, task.metric, resamples=resamples, seed=draw)
        differences[task.name] = asdict(found)
        alone = calibration(model, {t: labelled[t]}, {t: task.rows})
        if alone is not None:
            by_task[task.name] = asdict(alone)
    router = asdict(router_score(model.expert_names, {t.name: routed[t.expert].expert_weights for t in tasks}))
    router["confusion_columns"] = [*model.expert_names, "none"]
    together = calibration(model, labelled, {task.expert: task.rows for task in tasks}) if labelled else None
    figures = None if together is None else {**asdict(together), "bins": 15, "tasks": by_task}
    return _Compared(scores, differences, router, figures)


def _times(model: Any, tasks: list[Task], processing: Processing) -> dict:
    """A routed batch of rows of all tasks against the same batch by the shared model with experts off."""
    ranked = sorted(((i, t.expert, row) for t in tasks for i, row in enumerate(t.rows[:BATCH])), key=lambda x: x[:2])
    rows = [row for _, _, row in ranked[:BATCH]]
    device = next(model.parameters()).device
    if tasks[0].writes:
        times = time_ratio(
            lambda: written_texts(model, rows, processing, _TIMED_TOKENS, routed=True),
            lambda: written_texts(model, rows, processing, _TIMED_TOKENS, experts=SHARED),
        )
    else:
        inputs = {name: value.to(device) for name, value in processing.inputs(rows).items()}
        with torch.no_grad():
            times = time_ratio(lambda: model(**inputs), lambda: model(**inputs, experts=SHARED))
    return {
        "batch": len(rows),
        "device": device.type,
        "routed_seconds": times.first,
        "shared_seconds": times.second,
        "ratio": times.ratio,
        "ratio_spread": [times.smallest, times.largest],
        "repeats": times.repeats,
    }


def _undefined_notes(table: ScoreTable) -> list[str]:
    return [
        f"{task}: its own expert scores {own:.4f}, and a ratio to that says nothing, so it has no normalised score"
        for task in table.undefined
        if (own := table.experts[task]) is not None
    ]
