"""`router: auto`: every type at every depth on the same features, and the cheapest of those that do best."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from twin_merging_hf.modeling.routing_twin_merging import (
    CentroidRouter,
    LexicalRouter,
    LinearRouter,
    MLPRouter,
    NeighbourRouter,
)

from .recipe import Recipe
from .router_training import RouterData, router_report, train_router


_MOST_LAYERS = 6
NEIGHBOUR_DIMENSION = 64
# The paper's network grows with the square of its input: shown for comparison where that is cheap.
_WIDEST_MLP = 1024


@dataclass(frozen=True)
class Candidate:
    """
    One router that could be built.

    layers: reads the states before these layers; a `full` pass reads the last state too.
    """

    type: str
    layers: tuple[int, ...]
    router_pass: str

    def select(self, data: RouterData, available: tuple[int, ...], width: int) -> RouterData:
        """
        Cut this candidate's features out of those of all layers.

        Args:
            available: the layers whose states stand in the features side by side, each `width` wide; then the last
                state.
        """
        places = [available.index(layer) for layer in self.layers]
        if self.router_pass == "full":
            places.append(len(available))
        columns = torch.cat([torch.arange(place * width, (place + 1) * width) for place in places])
        return replace(data, train=data.train[:, columns], held_out=data.held_out[:, columns])


def candidate_layers(count: int) -> tuple[int, ...]:
    """At most six layers spread evenly over a model's `count`, from the first on."""
    steps = min(count, _MOST_LAYERS)
    return tuple(sorted({step * count // steps for step in range(steps)}))


def candidates(layers: tuple[int, ...], width: int, text: bool) -> list[Candidate]:
    """What `auto` compares: each layer alone, all layers up to it, with tokens for text, and the last state (the paper's)."""
    found = []
    for end, layer in enumerate(layers):
        found += [Candidate(kind, (layer,), "prefix") for kind in ("linear", "centroid")]
        if end > 0:
            found += [Candidate(kind, layers[: end + 1], "prefix") for kind in ("centroid", "knn")]
        if text:
            found.append(Candidate("lexical", layers[: end + 1], "prefix"))
    found += [Candidate(kind, (), "full") for kind in ("linear", "centroid")]
    if width <= _WIDEST_MLP:
        found.append(Candidate("mlp", (), "full"))
    return found


def choose(
    data: RouterData, layers: tuple[int, ...], width: int, vocabulary: int, recipe: Recipe, say: Callable[[str], None]
) -> tuple[Candidate, list[dict]]:
    """
    Fit every candidate on train rows and compare them on held-out rows.

    The winner is the one whose pass is shortest among those within one standard error of the best held-out accuracy
    (Breiman's rule), then the most accurate. A `full` pass, which runs the shared model twice, wins only where no other
    is possible.

    Returns:
        The winner, and the figures of all (type, layers, pass, accuracy, negative log-likelihood, temperature).
    """
    measured: list[tuple[Candidate, dict]] = []
    text = data.train_tokens is not None
    for candidate in candidates(layers, width, text):
        part = candidate.select(data, layers, width)
        router = _new(candidate, part, recipe, vocabulary)
        train_router(router, part, recipe.router, recipe.seed)
        figures = asdict(router_report(router.eval(), part, candidate.type, recipe.router.temperature))
        shown = {key: round(figures[key], 4) for key in ("accuracy", "negative_log_likelihood", "temperature")}
        entry = {"type": candidate.type, "layers": list(candidate.layers), "pass": candidate.router_pass, **shown}
        measured.append((candidate, entry))
        say(f"router {candidate.type}, layers {list(candidate.layers) or 'last'}: {shown['accuracy']:.1%} held out")
    winner = _winner(measured, len(data.held_out))
    return winner, [{**entry, "chosen": candidate is winner} for candidate, entry in measured]


def _winner(measured: list[tuple[Candidate, dict]], rows: int) -> Candidate:
    cheap = [item for item in measured if item[0].router_pass == "prefix"] or measured
    best = max(entry["accuracy"] for _, entry in cheap)
    error = (best * (1 - best) / rows) ** 0.5
    good = [item for item in cheap if item[1]["accuracy"] >= best - error]
    shallowest = min(max(candidate.layers, default=0) for candidate, _ in good)
    level = [item for item in good if max(item[0].layers, default=0) == shallowest]
    return max(level, key=lambda item: (item[1]["accuracy"], -item[1]["negative_log_likelihood"]))[0]


def _new(candidate: Candidate, data: RouterData, recipe: Recipe, vocabulary: int) -> nn.Module:
    settings, size, experts = recipe.router, data.train.shape[1], int(data.train_experts.max()) + 1
    if candidate.type == "knn":
        dimension = min(settings.rank or NEIGHBOUR_DIMENSION, size)
        return NeighbourRouter(size, experts, dimension, settings.exemplars, settings.neighbours)
    if candidate.type == "centroid":
        return CentroidRouter(size, list(data.centres))
    if candidate.type == "lexical":
        return LexicalRouter(size, list(data.centres), vocabulary)
    return (MLPRouter if candidate.type == "mlp" else LinearRouter)(size, experts)
