"""`tune`: choose merge coefficients and rank on held-out rows. Test rows are never read."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from twin_merging_hf.modeling.deltas_twin_merging import is_vector

from .align_experts import align_inputs
from .compression import truncated_svd
from .errors import TwinMergingError
from .evaluation import accuracy, checkpoint_model, merged_backbone, model_outputs, pearson, with_backbone
from .language_evaluation import predicted_tokens, token_agreement
from .merging import DEFAULTS
from .preflight import Inputs, preflight
from .progress import Progress, no_loading_bars
from .recipe import Recipe, load_recipe
from .separation import model_dtype
from .shapes import as_matrix, matrix_shape
from .shared_merge import merge_settings
from .token_evaluation import expert_tags, tag_accuracy
from .tuned_recipe import write_tuned


TOLERANCE = 0.002
"""A smaller rank is taken if it loses at most this much of the best normalised score."""


@dataclass(frozen=True)
class Grids:
    """What is tried, besides the recipe's own values. `sums`: lambdas where task vectors are added, not averaged."""

    sums: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    lambdas: tuple[float, ...] = (0.5, 0.7, 1.0, 1.3, 1.6, 2.0)
    densities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.9)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Candidate:
    """
    One setting and its scores on held-out rows.

    raw: by expert: accuracy (of tokens or their tags, where there are no classes of rows), or Pearson correlation of a
    regression. score: mean over experts of raw / the expert's own.
    """

    setting: dict[str, float]
    raw: dict[str, float]
    score: float


@dataclass
class Tuning:
    """All that was tried. `chosen` holds the values that the tuned recipe gets; `left` says why others are untouched."""

    rows: dict[str, int]
    own: dict[str, float]
    merge: list[Candidate] = field(default_factory=list)
    rank: list[Candidate] = field(default_factory=list)
    chosen: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def tune_recipe(
    path: str | Path, out: str | Path, grids: Grids | None = None, progress: Progress | None = None
) -> Tuning:
    """
    Choose lambda and density of the merge method, then `exclusive.rank`, and write the recipe with these values.

    Beside `out`, a JSON file of the same name holds every candidate's scores. Rows are those that a build holds out: the
    experts' `validation` rows, or the seeded part of `train`. The router is left to the build, which holds out the same rows.

    Raises:
        TwinMergingError: an expert has no data, an output exists, an expert fails on its own rows, or what `preflight` finds.
    """
    progress, grids, out = progress or Progress(), grids or Grids(), Path(out)
    log = out.with_suffix(".json")
    if log == out:
        raise TwinMergingError(f"{out}: the tuned recipe is YAML and {log.name} its record; name it *.yaml")
    for file in (out, log):
        if file.exists() or file.is_symlink():
            raise TwinMergingError(f"{file} exists already; choose another file with -o")
    recipe = load_recipe(path)
    without = [expert.name for expert in recipe.experts if expert.data is None]
    if without:
        raise TwinMergingError(
            f"{path}: expert {without[0]!r} has no `data`; tuning needs held-out rows of every expert"
        )
    progress.say("checking recipe, checkpoints and data")
    inputs = preflight(recipe, progress.say)
    try:
        inputs = align_inputs(inputs, progress)
        with no_loading_bars():
            tuning = _tune(inputs, grids, progress)
    finally:
        inputs.close()
    write_tuned(recipe, out, log, tuning.chosen, tuning.left, asdict(tuning))
    return tuning


def _tune(inputs: Inputs, grids: Grids, progress: Progress) -> Tuning:
    names = inputs.recipe.names
    assert inputs.rows is not None
    own = {}
    for index, name in enumerate(names):
        progress.say(f"{name}: the expert itself on {len(inputs.rows[index].held_out)} held-out rows")
        own[name] = _score(inputs, index, checkpoint_model(inputs.experts[index]))
        if own[name] <= 0:
            raise TwinMergingError(
                f"expert {name!r} scores {own[name]:.4f} on its own held-out rows, so nothing can be compared with it; "
                "check that they belong to its task"
            )
    tuning = Tuning({name: len(rows.held_out) for name, rows in zip(names, inputs.rows, strict=True)}, own)
    _tune_merge(inputs, grids, progress, tuning)
    chosen: dict[str, float] = {key: tuning.chosen[key] for key in ("lambda", "density") if key in tuning.chosen}
    tuned = _with(inputs.recipe, chosen)
    _tune_rank(inputs, tuned, grids, progress, tuning)
    tuning.left["router"] = (
        "the build trains it, and chooses it where the recipe says `auto`, holding out the same rows"
    )
    return tuning


def _score(inputs: Inputs, index: int, model: torch.nn.Module) -> float:
    """
    A stock model's score on an expert's held-out rows: accuracy (of tags, where tokens are tagged; of the completion's or
    the masked tokens, of a language model), or Pearson of a regression.
    """
    assert inputs.rows is not None and inputs.processing is not None
    rows, processing, entry = inputs.rows[index].held_out, inputs.processing, inputs.entries[index]
    if processing.kind in ("prompt", "masked"):
        return token_agreement(*predicted_tokens(model, rows, processing))
    if processing.kind == "tokens":
        return tag_accuracy(expert_tags(model, list(entry["labels"]), rows, processing))
    outputs = model_outputs(model, rows, processing)
    if entry["problem_type"] == "regression":
        return pearson(outputs[:, 0], torch.tensor([row["label"] for row in rows]))
    return accuracy(outputs, rows)


def _candidate(setting: dict[str, float], raw: dict[str, float], own: dict[str, float]) -> Candidate:
    return Candidate(setting, raw, sum(raw[name] / own[name] for name in own) / len(own))


def _with(recipe: Recipe, setting: dict[str, float]) -> Recipe:
    return replace(
        recipe, scaling=setting.get("lambda", recipe.scaling), density=setting.get("density", recipe.density)
    )


# ---- lambda and density -----------------------------------------------------------------------------------------


def _tune_merge(inputs: Inputs, grids: Grids, progress: Progress, tuning: Tuning) -> None:
    """Score the static merge, with each expert's own head, over the whole grid; the best score wins, the first of equals."""
    recipe, defaults = inputs.recipe, DEFAULTS[inputs.recipe.merge_method]
    if recipe.shared_model is not None:
        tuning.left["parameters"] = "the shared model is a ready one"
        return
    if defaults.scaling is None:
        tuning.left["parameters"] = f"`merge_method: {recipe.merge_method}` has no coefficient to choose"
        return
    settings = merge_settings(recipe)
    adds = recipe.merge_method in ("task_arithmetic", "dare_linear") and not settings.normalize
    lambdas = _own_first(settings.scaling, grids.sums if adds else grids.lambdas)
    densities = _own_first(settings.density, grids.densities) if defaults.density is not None else [None]
    bar = progress.counter("trying merges", len(lambdas) * len(densities) * len(recipe.experts))
    base = merged_backbone(inputs, "base")
    for density in densities:
        # All these methods are base + lambda * something, and that is merged once.
        setting = {"lambda": 1.0} if density is None else {"lambda": 1.0, "density": density}
        unit = merged_backbone(inputs, recipe.merge_method, _with(recipe, setting))
        for scaling in lambdas:
            backbone = {name: origin + scaling * (unit[name] - origin) for name, origin in base.items()}
            raw = {}
            for index, name in enumerate(recipe.names):
                raw[name] = _score(inputs, index, with_backbone(inputs, index, backbone))
                bar.update()
            tuning.merge.append(_candidate({**setting, "lambda": scaling}, raw, tuning.own))
    bar.close()
    tuning.chosen |= max(tuning.merge, key=lambda candidate: candidate.score).setting


def _own_first(own: float, grid: tuple[float, ...]) -> list[float]:
    return [own, *(value for value in sorted(grid) if value != own)]


# ---- rank -------------------------------------------------------------------------------------------------------


def _tune_rank(inputs: Inputs, recipe: Recipe, grids: Grids, progress: Progress, tuning: Tuning) -> None:
    """Score shared + truncated delta with the expert given; the smallest rank near the best wins."""
    if recipe.exclusive.rank is None or recipe.exclusive.method != "svd":
        tuning.left["exclusive.rank"] = "the recipe chooses ranks by another rule"
        return
    shapes = inputs.experts[0].backbone
    sides = [min(matrix_shape(s)) for name, s in shapes.items() if inputs.gets_delta(name) and not is_vector(s)]
    if not sides:
        tuning.left["exclusive.rank"] = "no matrix gets a delta"
        return
    ranks = sorted({min(rank, max(sides)) for rank in (*grids.ranks, recipe.exclusive.rank)})
    shared = _shared(inputs, recipe)
    raw: dict[int, dict[str, float]] = {rank: {} for rank in ranks}
    bar = progress.counter("trying ranks", len(ranks) * len(recipe.experts))
    for index, name in enumerate(recipe.names):
        exact, factors = _split(inputs, index, shared, ranks[-1])
        model = with_backbone(inputs, index, shared | exact)
        state = model.state_dict()
        for rank in ranks:
            for tensor, (up, down) in factors.items():
                delta = (up[:, :rank] @ down[:rank]).reshape(shared[tensor].shape)
                state[tensor].copy_(shared[tensor] + delta)
            raw[rank][name] = _score(inputs, index, model)
            bar.update()
    bar.close()
    tuning.rank = [_candidate({"rank": rank}, raw[rank], tuning.own) for rank in ranks]
    best = max(candidate.score for candidate in tuning.rank)
    tuning.chosen["rank"] = next(c.setting["rank"] for c in tuning.rank if c.score >= best - TOLERANCE - 1e-9)


def _shared(inputs: Inputs, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The shared model's floating-point backbone tensors, as a build would store them, in float32."""
    if inputs.shared is None:
        merged = merged_backbone(inputs, recipe.merge_method, recipe)
    else:
        tensors = ((name, inputs.shared.tensor(name)) for name in inputs.experts[0].backbone)
        merged = {name: tensor.float() for name, tensor in tensors if tensor.is_floating_point()}
    return {name: tensor.to(model_dtype(inputs)).float() for name, tensor in merged.items()}


def _split(inputs: Inputs, index: int, shared: dict[str, torch.Tensor], rank: int) -> tuple[dict, dict]:
    """One expert's vectors, and the factors of its deltas at the largest rank: smaller ranks are their leading parts."""
    recipe, checkpoint = inputs.recipe, inputs.experts[index]
    exact, factors = {}, {}
    for name, origin in shared.items():
        if not inputs.gets_delta(name):
            continue
        own = checkpoint.tensor(name).float()
        if is_vector(origin.shape):
            exact[name] = own
            continue
        u, s, vh = truncated_svd(as_matrix(own - origin), rank, f"{recipe.seed}:{recipe.names[index]}:{name}")
        factors[name] = (u * s, vh)
    return exact, factors
