"""The closing verdict of a build: does the artifact, left to itself, answer like each expert on held-out rows?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoints import Checkpoint
from .evaluation import (
    ArtifactOutputs,
    accuracy,
    agreement,
    artifact_outputs,
    checkpoint_model,
    model_outputs,
    pearson,
    regression_values,
)
from .language_evaluation import predicted_tokens, token_agreement
from .preflight import Inputs
from .router_training import RouterReport


_ROWS = 200
# Of language models fewer: each row has many tokens to compare.
_LANGUAGE_ROWS = 50
# Below this agreement a verdict says what to do about it.
_POOR = 0.9


@dataclass(frozen=True)
class Verdict:
    """
    What a build says about its artifact, on held-out rows.

    Attributes:
        agreement: for each expert, how far the routed artifact answers like it on its held-out rows: share of equal labels, of
            equal tags where tokens are tagged; Pearson correlation for a regression; of a language model the share of the
            completions' tokens at which both would write the same next, the completion given up to there (of a model that
            fills masks, of the masked tokens that both fill alike).
        given: the same with the expert chosen by hand, so that the two together tell routing losses from compression losses.
            Both None without data.
        worst_confusion: the largest share of one expert's rows that went to one other: expert, chosen, share.
        expert_scores: how well each expert itself does on these rows (`metric`: accuracy, or pearson for a regression; `score`;
            `rows`): what later scores are relative to, where the experts are no longer at hand; None of language models.
        scores: how well the artifact does on these rows by the same metric, `routed` and `given`; a label of another expert's
            is wrong.
    """

    agreement: dict[str, float] | None
    given: dict[str, float] | None
    rows: dict[str, int] | None
    router_accuracy: float | None
    worst_confusion: dict | None
    expert_scores: dict[str, dict] | None = None
    scores: dict[str, dict] | None = None


def reach_verdict(
    model: Any, inputs: Inputs, router: RouterReport | None, counter: Callable[[str, int], Any]
) -> Verdict:
    """Compare the finished artifact with every expert itself, on held-out rows that no training saw."""
    if inputs.rows is None or router is None:
        return Verdict(None, None, None, None, None)
    assert inputs.processing is not None
    language = model.label_space.kind == "language"
    routed, given, counts = {}, {}, {}
    own: dict[str, dict] = {}
    scores: dict[str, dict] = {}
    most = _LANGUAGE_ROWS if language else _ROWS
    bar = counter("comparing with the experts", sum(3 * min(most, len(rows.held_out)) for rows in inputs.rows))
    for index, (name, checkpoint) in enumerate(zip(inputs.recipe.names, inputs.experts, strict=True)):
        rows = inputs.rows[index].held_out[:most]
        counts[name] = len(rows)
        if language:
            routed[name], given[name] = _language_agreement(model, checkpoint, name, rows, inputs, bar.update)
            continue
        reference = model_outputs(checkpoint_model(checkpoint, inputs.low_memory), rows, inputs.processing, bar.update)
        mean = mean_label(inputs.rows[index].train)
        by_itself = artifact_outputs(model, rows, inputs.processing, tick=bar.update)
        by_hand = artifact_outputs(model, rows, inputs.processing, name, tick=bar.update)
        if "tokens" not in rows[0]:  # tagged rows are scored by their own measures
            own[name] = _own_score(reference, rows, inputs.entries[index]["problem_type"] == "regression")
            figures = {
                how: _artifact_score(model, index, outputs, rows, mean)
                for how, outputs in (("routed", by_itself), ("given", by_hand))
            }
            scores[name] = {"metric": own[name]["metric"], **figures}
        routed[name] = round(agreement(model, index, by_itself, reference, mean), 4)
        given[name] = round(agreement(model, index, by_hand, reference, mean), 4)
    bar.close()
    worst = worst_confusion(inputs.recipe.names, router.confusion)
    figures_of = (None, None) if language else (own, scores)
    return Verdict(routed, given, counts, round(router.accuracy, 4), worst, *figures_of)


def _language_agreement(
    model: Any, checkpoint: Checkpoint, name: str, rows: list[dict], inputs: Inputs, tick: Callable
) -> tuple[float, float]:
    """Share of places at which the artifact would write the expert's own token: routed, and with the expert given."""
    assert inputs.processing is not None
    reference, _ = predicted_tokens(checkpoint_model(checkpoint, inputs.low_memory), rows, inputs.processing, tick=tick)
    by_itself, _ = predicted_tokens(model, rows, inputs.processing, routed=True, tick=tick)
    by_hand, _ = predicted_tokens(model, rows, inputs.processing, experts=name, tick=tick)
    return round(token_agreement(by_itself, reference), 4), round(token_agreement(by_hand, reference), 4)


def expert_score(inputs: Inputs, index: int) -> dict | None:
    """`expert_scores` of one expert, without an artifact; None without rows, and for rows without a label."""
    rows = inputs.rows[index].held_out[:_ROWS] if inputs.rows else []
    if not rows or "label" not in rows[0]:
        return None
    assert inputs.processing is not None
    outputs = model_outputs(checkpoint_model(inputs.experts[index]), rows, inputs.processing)
    return _own_score(outputs, rows, inputs.entries[index]["problem_type"] == "regression")


def _own_score(outputs: torch.Tensor, rows: list[dict], regression: bool) -> dict:
    if regression:
        labels = torch.tensor([row["label"] for row in rows])
        return {"metric": "pearson", "score": round(pearson(outputs[:, 0], labels), 6), "rows": len(rows)}
    return {"metric": "accuracy", "score": round(accuracy(outputs, rows), 6), "rows": len(rows)}


def _artifact_score(model: Any, expert: int, outputs: ArtifactOutputs, rows: list[dict], mean: float) -> float:
    """Score of an artifact's answers to rows of one expert's task, by the metric of `_own_score`."""
    if model.label_space.regression[expert]:
        labels = torch.tensor([row["label"] for row in rows])
        return round(pearson(regression_values(model, expert, outputs, mean), labels), 6)
    return round(accuracy(outputs.logits, rows, model.label_space.columns(expert)), 6)


def mean_label(rows: list[dict]) -> float:
    """Mean label of rows: what a regression row that another expert answers counts as, if these are its train rows."""
    return sum(row.get("label", 0.0) for row in rows) / len(rows)  # tagged rows have none, and need no mean


def worst_confusion(names: list[str], confusion: list[list[int]]) -> dict | None:
    """The pair (expert, chosen) with the largest share of an expert's held-out rows that went elsewhere, or None."""
    worst: dict | None = None
    largest = 0.0
    for i, row in enumerate(confusion):
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            if i != j and share > largest:
                largest = share
                worst = {"expert": names[i], "chosen": names[j], "share": round(share, 4)}
    return worst


def describe(verdict: Verdict) -> list[str]:
    """The verdict in lines for people."""
    if verdict.agreement is None or verdict.given is None or verdict.rows is None:
        return [
            "no held-out rows, so agreement with the experts was not measured; give `data` in the recipe to know it"
        ]
    lines = [f"{'expert':<20} {'rows':>5}  {'routed':>7}  {'given':>7}   (agreement with the expert itself)"]
    for name, share in verdict.agreement.items():
        lines.append(f"{name:<20} {verdict.rows[name]:>5}  {share:>7.1%}  {verdict.given[name]:>7.1%}")
    lines.append(f"router accuracy on held-out rows: {verdict.router_accuracy:.1%}")
    if verdict.worst_confusion:
        worst = verdict.worst_confusion
        lines.append(f"worst confusion: {worst['share']:.1%} of {worst['expert']}'s rows went to {worst['chosen']}")
    else:
        lines.append("no row of the held-out ones went to a wrong expert")
    for name, share in verdict.agreement.items():
        if verdict.given[name] < _POOR:
            lines.append(
                f"{name}: its delta is cut too short even with the expert given; keep more of it (in `exclusive`: a larger "
                "`rank`, `ratio`, `energy` or `budget`, or a finer `dtype`)"
            )
        elif verdict.given[name] - share > 1 - _POOR:
            lines.append(
                f"{name}: routing loses what the delta keeps; try `router: {{type: linear}}` with data, or another layer"
            )
    return lines
