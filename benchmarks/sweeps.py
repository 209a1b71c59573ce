"""The sweeps: score against rank, bytes, number of experts; unseen tasks; other domains; long fine-tunes."""

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifacts import OURS, Artifact, all_head_outputs, chosen_router, ours, stored
from bench import Bench
from rivals import bitdelta_states, emr_states, storage_ratios, task_known
from running import backbone, expert_runner, load, run
from scores import Answers, normalised, task_scores
from static_merges import StaticMerges
from table import new_figure, save, write_rows

from twin_merging_hf.modeling.configuration_twin_merging import ROUTER_TYPES
from twin_merging_hf.recipe import EXCLUSIVE_METHODS


RANKS = (1, 2, 4, 8, 16, 32, 64)
BYTE_POINTS = {"fp32": (2, 4, 9, 16), "bf16": (4, 8, 19), "int8": (4, 8, 16), "int4": (4, 8, 16, 24)}
BUDGETS = (0.045,)  # with heads and a router, 1.05 models in all
LORA_RANKS = (4, 9, 16)
SPARSE_RATIO = 0.1  # nine of ten are dropped: of each matrix's singular directions, or of its entries
NONE_SHARE = 0.05
HELD_OUT = 100  # rows of each task in builds of fewer experts: they calibrate, and choose nothing
LONG = 3  # times as many epochs
LONG_RANKS = (1, 2, 4, 8, 16, 32)
TrainLonger = Callable[[int, int], Path] | None


def own_answers(bench: Bench) -> Answers:
    """Each test row answered by its own expert."""
    part = bench.part("test")
    return bench.answer(expert_runner(bench, part).get(part.gold.task), part.gold.task)


def percent(bench: Bench, answers: Answers) -> float:
    """Normalised score on test rows."""
    gold = bench.part("test").gold
    return float(normalised(task_scores(answers, gold), task_scores(own_answers(bench), gold))[0])


def measured(bench: Bench, name: str, exclusive: dict, **parts: Any) -> tuple[float, float, float]:
    """Size, score with the task given, and score under our router, of deltas stored in a certain way."""
    artifact = stored(bench, name, exclusive, **parts)
    choice = ours(bench, 0).weights().argmax(1)
    found = artifact.ratio, percent(bench, artifact.given()), percent(bench, artifact.chosen(choice))
    artifact.close()
    return found


# ---- rank and bytes ---------------------------------------------------------------------------------------------


def rank(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """Score against rank, fp32 factors."""
    rows = [[r, *measured(bench, f"rank-{r}", {"rank": r, "dtype": "fp32"})] for r in RANKS]
    write_rows(out.with_suffix(".csv"), ["rank", "storage_ratio", "task_given", "our_router"], rows)
    figure, axes = new_figure(6, 4)
    for column, label in ((2, "task given"), (3, "our router")):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], marker="o", label=label)
    axes.set_xscale("log", base=2)
    _finish(figure, axes, "rank", out)
    return "; ".join(f"rank {r}: {given:.1f} given, {routed:.1f} routed" for r, _, given, routed in rows)


def size(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """Score against bytes: types of factors, a global budget, separate LoRAs, EMR-Merging, BitDelta."""
    rows: list[list] = []
    for dtype, ranks in BYTE_POINTS.items():
        for r in ranks:
            found = measured(bench, f"{dtype}-{r}", {"rank": r, "dtype": dtype})
            rows.append([f"ours, {dtype}", f"rank {r}", *found])
    narrow = OURS["exclusive"]["dtype"]
    for budget, setting in [*_equal_budgets(bench, narrow), *((budget, f"{budget}") for budget in BUDGETS)]:
        found = measured(bench, f"budget-{budget}", {"budget": budget, "dtype": narrow})
        rows.append([f"ours, {narrow}, budget", setting, *found])
    for r in LORA_RANKS:
        found = measured(bench, f"loras-{r}", {"rank": r, "dtype": "fp32"}, shared_model="base")
        rows.append(["separate LoRAs, fp32", f"rank {r}", *found])
    ratios, task = storage_ratios(bench), bench.part("test").gold.task
    for name, states in (("EMR-Merging", emr_states), ("BitDelta", bitdelta_states)):
        raw = task_known(bench, name, states)
        rows.append([name, "", ratios[name], percent(bench, bench.answer(raw, task)), float("nan")])
    write_rows(out.with_suffix(".csv"), ["method", "setting", "storage_ratio", "task_given", "our_router"], rows)
    figure, axes = new_figure(7, 4.5)
    for method in dict.fromkeys(row[0] for row in rows):
        points = sorted((row[2], row[3]) for row in rows if row[0] == method)
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=method)
    _finish(figure, axes, "all bytes / one fp32 model, log", out, scale="log")
    return "; ".join(f"{m} {s} {x:.3f}x {given:.1f}" for m, s, x, given, _ in rows)


def _equal_budgets(bench: Bench, dtype: str) -> list[tuple[float, str]]:
    """Budgets of the same bytes as each uniform rank of the sweep, and what to call them."""
    found = []
    for r in BYTE_POINTS.get(dtype, ()):
        sizes = stored(bench, f"{dtype}-{r}", {"rank": r, "dtype": dtype}).report["storage"]
        found.append((sizes["deltas"] / sizes["shared"], f"as rank {r}"))
    return found


def ablations(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """The leading singular directions against the largest entries and random ones, as many of a hundred, fp32."""
    rows = []
    for method in EXCLUSIVE_METHODS:
        exclusive = {"method": method, "ratio": SPARSE_RATIO, "dtype": "fp32"}
        rows.append([method, *measured(bench, f"method-{method}", exclusive)])
    write_rows(out.with_suffix(".csv"), ["method", "storage_ratio", "task_given", "our_router"], rows)
    figure, axes = new_figure(6, 4)
    for place, label in ((2, "task given"), (3, "our router")):
        axes.bar(np.arange(len(rows)) + 0.4 * (place - 2.5), [row[place] for row in rows], 0.38, label=label)
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    _finish(figure, axes, f"what is kept, {SPARSE_RATIO:.0%}", out)
    return "; ".join(f"{m}: {given:.1f} given, {routed:.1f} routed, {x:.2f}x" for m, x, given, routed in rows)


# ---- experts ----------------------------------------------------------------------------------------------------


def experts(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """Score against the number of experts, the first 2 to all."""
    rows = []
    for count in range(2, len(bench.tasks) + 1):
        some = bench.subset(list(range(count)))
        artifact = ours(some, 0, HELD_OUT, router=chosen_router(bench))
        part, gold = some.part("test"), some.part("test").gold
        mean = some.answer(StaticMerges(some).raw("linear", {}, 0, part), gold.task)
        accuracy = float((artifact.weights().argmax(1) == gold.task).mean())
        scores = [percent(some, answers) for answers in (artifact.routed(), artifact.given(), mean)]
        rows.append([count, *scores, 100 * accuracy, artifact.ratio])
        artifact.close()
    head = ["experts", "routed", "task_given", "mean_true_head", "router_accuracy", "storage_ratio"]
    write_rows(out.with_suffix(".csv"), head, rows)
    figure, axes = new_figure(6, 4)
    for column in range(1, 5):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], marker="o", label=head[column])
    _finish(figure, axes, "experts", out)
    return "; ".join(f"{row[0]} experts: routed {row[1]:.1f}, given {row[2]:.1f}, mean {row[3]:.1f}" for row in rows)


# ---- rows that belong to no expert ------------------------------------------------------------------------------


def without(bench: Bench, held: int, **router: Any) -> Artifact:
    """Our artifact of all experts but one."""
    some = bench.subset([i for i in range(len(bench.tasks)) if i != held])
    return ours(some, 0, HELD_OUT, router={**chosen_router(bench), **router})


def unseen(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """
    One task's delta withheld: its own head on the features of the routed mixture, and of shared alone.

    The `none` route's distance is set by held-out rows of the built experts; `taken` is the share of the withheld task's
    rows beyond it.
    """
    part = bench.part("test")
    own = task_scores(own_answers(bench), part.gold)[0]
    rows = []
    for held, task in enumerate(bench.tasks):
        artifact = without(bench, held, none=NONE_SHARE)
        found = [
            _by_own_head(bench, held, artifact, *how) for how in (("__shared__", False), (None, False), (None, True))
        ]
        rows.append([task.name, *(100 * score / own[held] for score in found), 100 * _taken(bench, held, artifact)])
        artifact.close()
    rows.append(["mean", *np.mean([row[1:] for row in rows], axis=0)])
    columns = ["shared_alone", "routed", "routed_with_none"]
    write_rows(out.with_suffix(".csv"), ["held_out_task", *columns, "taken_by_none"], rows)
    figure, axes = new_figure(8, 4)
    for place, label in enumerate(columns):
        axes.bar(np.arange(len(rows)) + 0.27 * (place - 1), [row[1 + place] for row in rows], 0.25, label=label)
    axes.set_xticks(range(len(rows)), [row[0] for row in rows], rotation=20)
    _finish(figure, axes, "task whose delta is withheld", out)
    means = [f"{column} {score:.1f}" for column, score in zip(columns, rows[-1][1:-1], strict=True)]
    return f"mean over held-out tasks: {', '.join(means)}; {rows[-1][-1]:.0f} % of their rows taken by `none`"


def _taken(bench: Bench, held: int, artifact: Artifact) -> float:
    """Share of a withheld task's test rows that get no expert."""
    part = bench.part("test")
    rows = [part.rows[i] for i in np.flatnonzero(part.gold.task == held)]

    def compute() -> dict[str, np.ndarray]:
        model = artifact.model
        return {"weights": run(artifact.bench, rows, model, lambda inputs: model.route(**inputs), "unseen, routing")}

    key = [artifact.key, artifact.bench.names, part.digest]
    weights = bench.cached(f"unseen-{bench.names[held]}-routing", key, compute)["weights"]
    return float((weights.sum(1) == 0).mean())


def _by_own_head(bench: Bench, held: int, artifact: Artifact, experts: str | None, none: bool) -> float:
    """Score of a withheld task's test rows: its own expert's head on an artifact's features; `none`: that route is on."""
    part = bench.part("test")
    rows = [part.rows[i] for i in np.flatnonzero(part.gold.task == held)]

    def compute() -> dict[str, np.ndarray]:
        head, config = load(bench.experts[held], bench.kind).classifier, artifact.model.config
        built = config.router_none_distance
        config.router_none_distance = built if none else float("inf")
        try:
            return {"raw": all_head_outputs(artifact, rows, f"{bench.names[held]} unseen", head, experts=experts)}
        finally:
            config.router_none_distance = built

    key = [artifact.key, artifact.bench.names, part.digest, experts, none]
    return _one_task(bench, held, bench.cached(f"unseen-{bench.names[held]}", key, compute)["raw"])


def _one_task(bench: Bench, task: int, outputs: np.ndarray) -> float:
    """Score of one task's own head's outputs [row, label] on its test rows."""
    part = bench.part("test")
    raw = np.full((len(part.rows), bench.width), -np.inf, np.float32)
    raw[:, [span.start for span in bench.spans]] = 0
    raw[part.gold.task == task, bench.spans[task]] = outputs
    return float(task_scores(bench.answer(raw, part.gold.task), part.gold)[0, task])


def shift(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """Another domain's rows of the same labels: task b's rows where only task a's expert was built in."""
    part, rows = bench.part("test"), []
    pairs = [(a, b) for a, b in permutations(range(len(bench.tasks)), 2) if _alike(bench, a, b)]
    for a, b in pairs:
        artifact = without(bench, b)
        some, mine = artifact.bench, np.flatnonzero(part.gold.task == b)
        texts, place = [part.rows[i] for i in mine], some.names.index(bench.names[a])
        found = {
            "routed": _cached_labels(artifact, texts, place, None),
            "expert_a_given": _cached_labels(artifact, texts, place, bench.names[a]),
            "shared_alone": _cached_labels(artifact, texts, place, "__shared__"),
        }
        artifact.close()
        truth = part.gold.label[mine]
        expert = expert_runner(bench, part).get(np.where(part.gold.task == b, a, part.gold.task))[mine]
        itself = expert[:, bench.spans[a]].argmax(1)
        chosen = float((found["routed"][1] == place).mean())
        scores = [float((labels == truth).mean()) for labels, _ in found.values()]
        rows.append([bench.names[a], bench.names[b], *scores, float((itself == truth).mean()), chosen])
    head = ["expert", "rows_of", "routed_own_head", "expert_given", "shared_alone", "expert_itself", "routed_to_expert"]
    write_rows(out.with_suffix(".csv"), head, rows)
    figure, axes = new_figure(7, 4)
    for index in range(2, len(head)):
        axes.bar(np.arange(len(rows)) + 0.16 * (index - 4), [100 * row[index] for row in rows], 0.15, label=head[index])
    axes.set_xticks(range(len(rows)), [f"{row[0]} -> {row[1]}" for row in rows])
    _finish(figure, axes, "expert -> rows of", out, "accuracy, %")
    return "; ".join(
        f"{r[0]} -> {r[1]}: routed {r[2]:.3f}, expert given {r[3]:.3f}, shared {r[4]:.3f}, expert itself {r[5]:.3f}, "
        f"{r[6]:.0%} of rows routed to it"
        for r in rows
    )


def _alike(bench: Bench, a: int, b: int) -> bool:
    return bench.tasks[a].labels is not None and bench.tasks[a].labels == bench.tasks[b].labels


def _cached_labels(
    artifact: Artifact, rows: list[dict], place: int, experts: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Labels [row] by one expert's head, however the deltas are mixed, and the expert whose weight is largest [row].

    A routed row's head would be its router's; here the question is what the features are worth, and where rows go.
    """

    def compute() -> dict[str, np.ndarray]:
        raw = all_head_outputs(artifact, rows, "shift", experts=experts)
        model = artifact.model
        routing = run(artifact.bench, rows, model, lambda inputs: model.route(**inputs), "shift, routing")
        return {"label": raw[:, artifact.bench.spans[place]].argmax(1), "expert": routing.argmax(1)}

    key = [artifact.key, [row["label"] for row in rows], place, experts]
    arrays = artifact.bench.cached("shift", key, compute)
    return arrays["label"], arrays["expert"]


# ---- routers ----------------------------------------------------------------------------------------------------


def routers(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """The package's own routers, each type in artifacts of its own: how many rows find their expert, and the score."""
    rows = []
    for kind in ROUTER_TYPES:
        for layer in ("middle", "last") if kind in ("linear", "mlp") else ("middle",):
            settings = {"type": kind} | ({"pass": "full"} if layer == "last" else {})
            artifact = ours(bench, 0, router=settings)
            truth = {split: bench.part(split).gold.task for split in ("validation", "test")}
            found = [float((artifact.weights(split).argmax(1) == truth[split]).mean()) for split in truth]
            rows.append([kind, layer, *found, percent(bench, artifact.routed())])
            artifact.close()
    write_rows(out.with_suffix(".csv"), ["type", "layer", "validation", "test", "routed_score"], rows)
    figure, axes = new_figure(7, 4)
    axes.bar(range(len(rows)), [100 * row[3] for row in rows], label="router accuracy, test rows, %")
    axes.plot([row[4] for row in rows], "o", color="tab:orange", label="normalised score")
    axes.set_xticks(range(len(rows)), [f"{row[0]}, {row[1]}" for row in rows], rotation=20)
    _finish(figure, axes, "router", out, "%")
    return "; ".join(f"{r[0]} ({r[1]}): {r[3]:.1%} of test rows, score {r[4]:.1f}" for r in rows)


# ---- long fine-tunes --------------------------------------------------------------------------------------------


def long(bench: Bench, out: Path, train_longer: TrainLonger) -> str:
    """Two experts fine-tuned three times as long: the spectra of what they learned, and the rank that they need."""
    if train_longer is None:
        return "not for this benchmark"
    settings = json.loads((bench.experts[0] / "training.json").read_text())["settings"]
    usual = bench.subset([0, 1])
    longer = bench.subset([0, 1])
    longer.experts = [train_longer(i, LONG * settings["epochs"]) for i in (0, 1)]
    rows, figure_rows = [], []
    for name, some in (("usual", usual), ("long", longer)):
        for r in LONG_RANKS:
            recipe = {
                "merge_method": "linear",
                "exclusive": {"rank": r, "dtype": "fp32"},
                "router": {"type": "projection"},
            }
            artifact = Artifact(some, f"long-{r}", recipe, with_data=False)
            kept = spectrum(some)[r - 1]
            rows.append([name, r, artifact.ratio, percent(some, artifact.given()), kept])
            artifact.close()
        figure_rows.append((name, spectrum(some)))
    write_rows(out.with_suffix(".csv"), ["training", "rank", "storage_ratio", "task_given", "energy_kept"], rows)
    figure, axes = new_figure(6, 4)
    for name, energy in figure_rows:
        axes.plot(range(1, len(energy) + 1), 100 * energy, label=f"{name}: energy of expert - base")
        points = [(row[1], row[3]) for row in rows if row[0] == name]
        axes.plot(*zip(*points, strict=True), "o--", label=f"{name}: score, task given")
    axes.set_xscale("log", base=2)
    _finish(figure, axes, "rank", out, "%")
    return "; ".join(f"{n}, rank {r}: {given:.1f}, energy {kept:.0%}" for n, r, _, given, kept in rows)


def spectrum(bench: Bench) -> np.ndarray:
    """Share of squared singular values of (expert - base) within each rank, mean over matrices and experts: [rank]."""
    base, curves = backbone(bench, bench.base), []
    for path in bench.experts:
        for name, value in backbone(bench, path).items():
            delta = (value - base[name]).squeeze()
            if delta.dim() == 2 and min(delta.shape) >= max(LONG_RANKS) and delta.shape[0] < 10 * delta.shape[1]:
                energy = torch.linalg.svdvals(delta).square().cumsum(0)
                curves.append((energy / energy[-1].clamp(min=1e-30)).numpy())
    width = min(len(curve) for curve in curves)
    return np.mean([curve[:width] for curve in curves], axis=0)


def _finish(
    figure: Any, axes: Any, label: str, out: Path, unit: str = "normalised score, %", scale: str | None = None
) -> None:
    if scale:
        axes.set_xscale(scale)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.legend(fontsize=7)
    save(figure, out.with_suffix(".png"))


SWEEPS = {
    "routers": routers,
    "rank": rank,
    "bytes": size,
    "ablations": ablations,
    "experts": experts,
    "unseen": unseen,
    "shift": shift,
    "long": long,
}
