"""The router of a build: where it reads, what it is trained on, and how it does on held-out rows."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from twin_merging_hf.modeling.routing_twin_merging import ProjectionRouter, new_router

from .checkpoints import Checkpoint
from .closed_form import fit_novelty
from .data import READ_AS_TEXT
from .deferred import empty_model
from .errors import TwinMergingError
from .inference import run_over, token_ids
from .preflight import Inputs
from .probe import random_inputs
from .progress import Progress
from .recipe import Recipe
from .router_choice import Candidate, candidate_layers, choose
from .router_training import RouterData, RouterReport, centre_groups, router_report, subspace, train_router
from .separation import Separation, delta_from_base


_PROJECTION_RANK = 32
_NEIGHBOUR_DIMENSION = 64


def router_type(inputs: Inputs) -> str:
    """The type that the recipe asks for; `auto` without data is `projection`, with data it is decided by held-out rows."""
    wanted = inputs.recipe.router.type
    return "projection" if wanted == "auto" and inputs.rows is None else wanted


def routing_fields(first: Checkpoint, inputs: Inputs, candidate: Candidate | None = None) -> dict[str, Any]:
    """
    Config fields that say what the router is and where it reads.

    Args:
        candidate: what `auto` chose; None, with `auto`: a router that reads everything that may be chosen.
    """
    settings, kind = inputs.recipe.router, router_type(inputs)
    layers, router_pass = settings.layers, settings.router_pass
    if candidate is not None:
        kind, layers, router_pass = candidate.type, candidate.layers, candidate.router_pass
    elif kind == "auto":
        reads_all = "late" if router_pass == "late" else "full"
        kind, layers, router_pass = "linear", _auto_layers(first, inputs), reads_all
    elif layers is None:
        layers = (first.layer_count // 2,) if router_pass == "prefix" else ()
    stops = router_pass in ("prefix", "late")
    widths = state_widths(first, layers)
    fields: dict[str, Any] = {
        "router_type": kind,
        "router_pass": router_pass,
        "router_layer": layers[-1] if stops else None,
        "router_layers": list(layers[:-1] if stops else layers),
        "router_input_size": sum(widths[: len(layers)] if stops else widths),
        "router_top_k": settings.top_k,
    }
    if kind == "projection":
        layer = projected_layer(layers[-1], router_pass)
        readers = readers_of_layer(first, f"{first.layers_path}.{layer}")
        # In a small model, fewer: a subspace that is everything tells nothing apart.
        size = state_widths(first, (layer,))[0]
        width = min(settings.rank or min(_PROJECTION_RANK, size // 2), size)
        # Shares of energy are no probabilities: unless told otherwise, the largest takes the row.
        top_k = settings.top_k if settings.top_k is not None else 1
        fields |= {"router_site": readers[0], "router_rank": width, "router_top_k": top_k}
    if kind in ("centroid", "lexical"):
        fields["router_centres"] = list(row_centres(inputs)[1])
    if kind == "knn":
        fields["router_rank"] = min(settings.rank or _NEIGHBOUR_DIMENSION, fields["router_input_size"])
        fields |= {"router_exemplars": settings.exemplars, "router_neighbours": settings.neighbours}
    if settings.none is not None:
        fields["router_none_distance"] = 1.0  # until it is measured
    return fields


def projected_layer(layer: int, router_pass: str) -> int:
    """The layer inside which `projection` reads: `late` must have read before experts act, which they do from `layer` on."""
    return layer - 1 if router_pass == "late" else layer


def _auto_layers(first: Checkpoint, inputs: Inputs) -> tuple[int, ...]:
    if inputs.recipe.router.router_pass == "full":
        return ()
    return inputs.recipe.router.layers or candidate_layers(first.layer_count)


def state_widths(first: Checkpoint, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Widths of the states before each of `layers`, and then of the last state."""
    same = getattr(first.config, "hidden_size", None)
    if same is not None:  # OPT may bring its last state back to the width of its embeddings
        return (*(same,) * len(layers), getattr(first.config, "word_embed_proj_dim", same))
    *before, last = first.map_widths
    return (*(before[layer] for layer in layers), last)


@torch.no_grad()
def readers_of_layer(first: Checkpoint, layer: str) -> list[str]:
    """
    Names of the modules of a layer that read one and the same first state (query, key, value; or the convolutions at its
    entrance), found by a run.
    """
    model: Any = empty_model(lambda: first.task_class(first.config))  # what it computes does not matter
    calls: list[tuple[str, torch.Tensor]] = []
    for name, module in model.get_submodule(layer).named_modules():
        if type(module) in (nn.Linear, Conv1D) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            path = f"{layer}.{name}"
            module.register_forward_pre_hook(lambda m, args, path=path: calls.append((path, args[0])))
    model(**random_inputs(model, 2, 0))
    if not calls:
        raise TwinMergingError(
            f"{layer} has no linear module and no convolution, so `projection` cannot route there; use another layer or router"
        )
    return [path for path, state in calls if state is calls[0][1]]


def make_router(
    assemble: Callable[[dict[str, Any]], Any], separation: Separation, inputs: Inputs, progress: Progress
) -> tuple[Any, RouterReport | None]:
    """
    Assemble the model and train or build its router.

    Args:
        assemble: makes the model from the config fields of routing.

    Returns:
        The model, and its router's figures on held-out rows, if there are any.
    """
    first, recipe = inputs.experts[0], inputs.recipe
    model = assemble(routing_fields(first, inputs))
    if isinstance(model.router, ProjectionRouter):
        _fit_projection(model, separation, inputs)
        model.config.router_temperature = recipe.router.temperature or 1.0
    if inputs.rows is None:
        return model, None
    data = router_data(model, inputs, progress)
    if router_type(inputs) != "auto":
        return model, fit_router(model, data, inputs, progress)
    layers = _auto_layers(first, inputs)
    widths = state_widths(first, layers)
    known = {"experts": inputs.entries, "vocab_size": model.config.vocab_size or 0}
    plain = {"router_none_distance": None, "router_none_dimension": None}

    def make(candidate: Candidate) -> nn.Module:
        return new_router(SimpleNamespace(**known, **{**routing_fields(first, inputs, candidate), **plain}))

    choice = choose(data, layers, widths, make, recipe, progress.say)
    inputs.notes += [choice.note] if choice.note else []
    del model  # two at once would double the memory
    model = assemble(routing_fields(first, inputs, choice.candidate))
    model.router.load_state_dict(choice.router.state_dict(), strict=False)  # a `none` route is learned next
    report = settle_router(model, choice.candidate.select(data, layers, widths), recipe)
    return model, replace(report, comparison=choice.comparison)


def fit_router(model: Any, data: RouterData, inputs: Inputs, progress: Progress) -> RouterReport:
    """Train a model's router of the type that its config says (`projection` has nothing to train), and settle it."""
    if model.config.router_type != "projection":
        recipe = inputs.recipe
        train_router(model.router, data, recipe.router, recipe.seed, progress.say)
    return settle_router(model, data, inputs.recipe)


def settle_router(model: Any, data: RouterData, recipe: Recipe) -> RouterReport:
    """Fit a finished router's temperature and its `none` route, in place, and measure it on held-out rows."""
    config, settings = model.config, recipe.router
    given = config.router_temperature if config.router_type == "projection" else settings.temperature
    model.router.eval()
    report = router_report(model.router, data, config.router_type, given)
    config.router_temperature = report.temperature
    none_share = None
    if settings.none is not None:
        distance = fit_novelty(model.router.novelty, data.train, data.train_experts, data.held_out, settings.none)
        config.router_none_distance = distance
        with torch.no_grad():
            none_share = float((model.router.novelty(data.held_out) > distance).float().mean())
    return replace(report, layers=config.state_layers, none_share=none_share)


def _fit_projection(model: Any, separation: Separation, inputs: Inputs) -> None:
    config, recipe = model.config, inputs.recipe
    layer = projected_layer(config.router_layer, config.router_pass)
    readers = readers_of_layer(inputs.experts[0], f"{config.layers_path}.{layer}")
    bases = []
    for name, expert in zip(recipe.names, inputs.experts, strict=True):
        seed_text = f"{recipe.seed}:{name}:projection"
        bases.append(expert_subspace(expert, readers, inputs.base, separation, config.router_rank, seed_text))
    with torch.no_grad():
        model.router.basis.copy_(torch.stack(bases))


def expert_subspace(
    expert: Checkpoint,
    readers: list[str],
    base: Checkpoint | None,
    separation: Separation,
    rank: int,
    seed_text: str,
) -> torch.Tensor:
    """Subspace [rank, hidden] of what an expert changed in the modules `readers`, which read the routing state."""
    matrices = []
    for reader in readers:
        delta = delta_from_base(expert, base, separation.state, f"{reader}.weight")
        module = expert.skeleton.get_submodule(reader)
        if isinstance(module, nn.Conv2d):  # each place of the kernel reads the same channels
            delta = delta.reshape(len(delta), module.in_channels, -1).transpose(1, 2).reshape(-1, module.in_channels)
        matrices.append(delta.T if type(module) is Conv1D else delta)
    return subspace(matrices, rank, seed_text)


def row_centres(inputs: Inputs) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The centre that each train row belongs to, and how many each expert has; as `centre_groups`."""
    return centre_groups([[row.get("label") for row in rows.train] for rows in inputs.rows or []])


def router_data(
    model: Any, inputs: Inputs, progress: Progress, needed: tuple[str, ...] = ("train", "held_out")
) -> RouterData:
    """Routing features of every expert's rows; parts that are not `needed` are empty."""
    assert inputs.rows is not None and inputs.processing is not None
    tokens: dict[str, list[torch.Tensor]] = {"train": [], "held_out": []}
    parts: dict[str, list[torch.Tensor]] = {"train": [], "held_out": []}
    experts: dict[str, list[int]] = {"train": [], "held_out": []}
    # What tokens say is put behind the states later, once it is known (`with_tokens`).
    states = slice(model.config.router_input_size if model.config.router_type == "lexical" else None)
    step: Callable[[dict], torch.Tensor] = lambda batch: model.routing_features(**batch)[:, states]  # noqa: E731
    bar = progress.counter("router features", sum(len(getattr(r, part)) for r in inputs.rows for part in needed))
    for index, rows in enumerate(inputs.rows):
        for part in needed:
            chosen = getattr(rows, part)
            parts[part].append(run_over(model, chosen, inputs.processing, step, bar.update))
            experts[part] += [index] * len(chosen)
            if inputs.processing.kind in READ_AS_TEXT:
                tokens[part] += token_ids(chosen, inputs.processing)
    bar.close()
    empty = torch.zeros(0, model.config.router_input_size)
    features = {part: torch.cat(found) if found else empty for part, found in parts.items()}
    owners = {part: torch.tensor(found, dtype=torch.long) for part, found in experts.items()}
    groups, centres = row_centres(inputs) if "train" in needed else (None, ())
    return RouterData(
        features["train"],
        owners["train"],
        features["held_out"],
        owners["held_out"],
        train_groups=groups,
        centres=centres,
        train_tokens=tokens["train"] or None,
        held_out_tokens=tokens["held_out"] or None,
    )
