"""`router: auto`: every type at every depth on the same features, and the cheapest of those that do best."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from .recipe import Recipe
from .router_training import RouterData, router_report, train_router


_MOST_LAYERS = 6
# The paper's network grows with the square of its input: shown for comparison where that is cheap.
_WIDEST_MLP = 1024
# Held-out accuracy that a `full` pass, which runs the shared model twice, must add to any shorter one.
_WORTH_A_PASS = 0.02


@dataclass(frozen=True)
class Candidate:
    """
    One router that could be built.

    layers: reads the states before these layers; a `full` pass reads the last state too. router_pass: `prefix`, `full`, or
    `late`, whose last layer is given.
    """

    type: str
    layers: tuple[int, ...]
    router_pass: str

    def select(self, data: RouterData, available: tuple[int, ...], widths: tuple[int, ...]) -> RouterData:
        """
        Cut this candidate's features out of those of all layers.

        Args:
            available: the layers whose states stand in the features side by side; then the last state.
            widths: of all these states.
        """
        places = [available.index(layer) for layer in self.layers]
        if self.router_pass == "full":
            places.append(len(available))
        starts = [sum(widths[:place]) for place in places]
        columns = torch.cat([torch.arange(s, s + widths[p]) for s, p in zip(starts, places, strict=True)])
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


def _open_candidates(layers: tuple[int, ...], width: int, text: bool, recipe: Recipe) -> list[Candidate]:
    """What the recipe's pass leaves to choose from: in a `late` one experts act from the last layer on, whoever routes."""
    found = candidates(layers, width, text)
    if recipe.router.router_pass != "late":
        return found
    return [replace(one, router_pass="late") for one in found if one.layers and one.layers[-1] == layers[-1]]


@dataclass(frozen=True)
class Choice:
    """
    What `auto` took.

    router: of the winner, fitted. comparison: the figures of all candidates (type, layers, pass, accuracy, negative
    log-likelihood, temperature, chosen). note: what a reader of the report should know, or None.
    """

    candidate: Candidate
    router: nn.Module
    comparison: list[dict]
    note: str | None


def choose(
    data: RouterData,
    layers: tuple[int, ...],
    widths: tuple[int, ...],
    make: Callable[[Candidate], nn.Module],
    recipe: Recipe,
    say: Callable[[str], None],
) -> Choice:
    """
    Fit every candidate on train rows and compare them on held-out rows.

    The winner is the one whose pass is shortest among those within one standard error of the best held-out accuracy
    (Breiman's rule), then the most accurate. A `full` pass, which runs the shared model twice, wins only where it finds
    clearly more rows than any shorter one: by two standard errors, and by two rows of a hundred.

    Args:
        make: gives a candidate's router, not yet fitted.
    """
    measured: list[tuple[Candidate, dict]] = []
    routers: list[nn.Module] = []
    text = data.train_tokens is not None
    for candidate in _open_candidates(layers, widths[-1], text, recipe):
        part, router = candidate.select(data, layers, widths), make(candidate)
        train_router(router, part, recipe.router, recipe.seed)
        figures = asdict(router_report(router.eval(), part, candidate.type, recipe.router.temperature))
        shown = {key: round(figures[key], 4) for key in ("accuracy", "negative_log_likelihood", "temperature")}
        entry = {"type": candidate.type, "layers": list(candidate.layers), "pass": candidate.router_pass, **shown}
        measured.append((candidate, entry))
        routers.append(router)
        say(f"router {candidate.type}, layers {list(candidate.layers) or 'last'}: {shown['accuracy']:.1%} held out")
    winner = _winner(measured, len(data.held_out))
    comparison = [{**entry, "chosen": candidate is winner} for candidate, entry in measured]
    place = next(index for index, entry in enumerate(comparison) if entry["chosen"])
    return Choice(winner, routers[place], comparison, _note(winner, measured))


def _best(measured: list[tuple[Candidate, dict]], router_pass: str) -> float | None:
    return max(
        (entry["accuracy"] for candidate, entry in measured if candidate.router_pass == router_pass), default=None
    )


def _winner(measured: list[tuple[Candidate, dict]], rows: int) -> Candidate:
    taken = measured[0][0].router_pass  # of the short ones, which come first
    prefix, full = _best(measured, taken), _best(measured, "full")
    if full is not None and (prefix is None or full - prefix > max(_WORTH_A_PASS, 2 * _standard_error(full, rows))):
        taken = "full"
    open_to = [item for item in measured if item[0].router_pass == taken]
    best = max(entry["accuracy"] for _, entry in open_to)
    good = [item for item in open_to if item[1]["accuracy"] >= best - _standard_error(best, rows)]
    shallowest = min(max(candidate.layers, default=0) for candidate, _ in good)
    level = [item for item in good if max(item[0].layers, default=0) == shallowest]
    return max(level, key=lambda item: (item[1]["accuracy"], -item[1]["negative_log_likelihood"]))[0]


def _standard_error(share: float, rows: int) -> float:
    return (share * (1 - share) / rows) ** 0.5


def _note(winner: Candidate, measured: list[tuple[Candidate, dict]]) -> str | None:
    prefix, full = _best(measured, "prefix"), _best(measured, "full")
    if winner.router_pass != "full" or prefix is None:
        return None
    return (
        f"`router: auto` took a `full` pass, which runs the shared model twice: its last state finds {full:.1%} of held-out "
        f"rows, no earlier one more than {prefix:.1%}; name `router.type` and `router.layer` for a shorter pass"
    )
