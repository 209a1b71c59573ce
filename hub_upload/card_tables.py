"""Tables and sentences of a card."""

import re
from collections.abc import Sequence

from twin_merging_hf.modeling import TwinMergingConfig

from .card_scores import CardScores
from .licences import Licences


_KINDS = {"regression": "regression", "token_classification": "tags", "language_modeling": "language model"}
_UNSCORED = {"tokens": "taggers", "masked": "models that fill in words"}
_MOST_LABELS = 12
_LONGEST_CELL = 800


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; whatever the cells hold, it stays one."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(item) for item in line) + " |" for line in lines)


def cell(text: object) -> str:
    """One cell's text on one line; what is very long is cut."""
    line = re.sub(r"\s", " ", str(text)).replace("|", "\\|")
    # A cut must not leave half of an escaped bar.
    return line if len(line) <= _LONGEST_CELL else line[:_LONGEST_CELL].rstrip("\\") + " ..."


def fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def experts_table(config: TwinMergingConfig, report: dict) -> str:
    """Source, revision, rank, energy kept, bytes and labels of each expert."""
    sources = config.provenance.get("sources", {})
    rows = []
    for index, expert in enumerate(config.experts):
        source = sources.get(expert["name"], {})
        figures = _figures(report.get("tensors", {}), index, len(config.experts))
        kind = _KINDS.get(expert["problem_type"])
        labels = ", ".join(expert["labels"][:_MOST_LABELS]) + (" ..." if len(expert["labels"]) > _MOST_LABELS else "")
        name = source.get("model", expert.get("source", ""))
        rows.append(
            [expert["name"], _link(name, source), _revision(source), *figures, ": ".join(filter(None, [kind, labels]))]
        )
    return table(["expert", "source", "revision", "rank", "energy kept", "delta", "labels"], rows)


def _link(model: str, source: dict) -> str:
    repo_id = model.split("@")[0]
    return f"[{repo_id}](https://huggingface.co/{repo_id})" if source.get("from_hub") else f"`{model}`"


def _revision(source: dict) -> str:
    """The commit of a source from the Hub, else the start of its weights' digest."""
    if source.get("revision"):
        return f"`{source['revision'][:12]}`"
    return f"sha256 `{source['sha256'][:12]}`" if "sha256" in source else "unknown"


def _figures(tensors: dict, index: int, count: int) -> list[str]:
    """Largest rank (or entries), share of the delta's energy that is kept, and bytes, of one expert."""
    rank = entries = size = 0.0
    energy = kept = 0.0
    for entry in tensors.values():
        own = entry.get("energy")
        if own is None or len(own) != count:
            continue
        share = 1.0 if entry["treatment"] == "exact" else 0.0
        energy += own[index]
        kept += own[index] * entry.get("energy_kept", [share] * count)[index]
        parts = entry.get("ranks") or entry.get("entries") or [1] * count
        size += entry.get("bytes", 0) * parts[index] / (sum(parts) or 1)
        rank = max(rank, entry.get("ranks", [0] * count)[index])
        entries += entry.get("entries", [0] * count)[index]
    extent = f"{entries:.0f} entries" if entries else f"{rank:.0f}"
    return [extent, f"{kept / energy:.1%}" if energy else "all (no change)", f"{size / 1e6:.2f} MB"]


def routing_text(config: TwinMergingConfig, report: dict, picture: str | None) -> str:
    """How rows are routed, how well that went, and the confusion as picture and table."""
    text = _reads(config)
    router = report["router"]
    if router.get("held_out_rows"):
        text += (
            f" On {router['held_out_rows']} held-out rows it chose the right expert in {router['accuracy']:.1%} "
            f"(temperature {router['temperature']:.3g})."
        )
        if picture is not None:
            text += f"\n\n![Which expert held-out rows belong to, and which was chosen]({picture})"
        rows = [[name, *counts] for name, counts in zip(config.expert_names, router["confusion"], strict=True)]
        return f"{text}\n\n" + table(["belongs to \\ chosen", *config.expert_names], rows)
    if "stale" in router:
        return f"{text} Its accuracy was {router['stale']}."
    return f"{text} It was built from the experts' weights alone; its accuracy was not measured."


def _reads(config: TwinMergingConfig) -> str:
    layers = ", ".join(str(layer) for layer in config.state_layers)
    where = f"the states before layers {layers}" if len(config.state_layers) > 1 else f"the state before layer {layers}"
    where = "the shared model's last state" if config.router_pass == "full" else f"{where} of the shared model"
    tokens = " and the row's tokens" if config.router_type == "lexical" else ""
    text = f"A `{config.router_type}` router reads {where}{tokens}, once for each row."
    if config.router_pass == "late":
        text += (
            f" It does so in the answer's own pass: experts act from layer {config.router_layer} on, and what they learned "
            "below it is left out (`report.json` says how much)."
        )
    if config.router_none_distance is not None:
        text += " Rows unlike every expert's go to the shared model."
    return text


def agreement_text(report: dict) -> str:
    """How far the artifact answers like each expert, or why nobody knows."""
    verdict = report["verdict"]
    if verdict["agreement"] is None:
        stale = verdict.get("stale")
        return f"{stale.capitalize()}." if stale else "Not measured: the recipe gave no data."
    rows = [
        [name, verdict["rows"][name], f"{share:.1%}", f"{verdict['given'][name]:.1%}"]
        for name, share in verdict["agreement"].items()
    ]
    return (
        "Agreement with each expert's own answers on held-out rows (share of equal labels, of equal tags where tokens are "
        "tagged; Pearson correlation for a regression; of a language model the share of the completions' tokens at which both "
        "would write the same next): left to itself, and with the expert given.\n\n"
    ) + table(["expert", "rows", "routed", "given"], rows)


def scores_text(scores: CardScores | None, kind: str) -> str:
    """Raw and normalised scores beside the fine-tuned experts and static merges, and the worst task."""
    if scores is None and kind in _UNSCORED:
        return f"Not measured: `twin-merging evaluate` does not score {_UNSCORED[kind]}."
    if scores is None:
        return (
            "Not measured. `twin-merging evaluate ARTIFACT --data NAME=FILE --recipe recipe.yaml --merges "
            "linear,task_arithmetic -o ARTIFACT/evaluation.json` measures it, and the next upload's card shows it."
        )
    merges = list(dict.fromkeys(method for task in scores.tasks for method in task.merges))
    rows = []
    for task in scores.tasks:
        columns = [task.routed, task.given, *(task.merges.get(method) for method in merges)]
        own = "unknown" if task.own is None else f"{task.own:.3f}"
        rows.append([task.name, task.metric, task.rows, own, *(_score(task.normalised(s), s) for s in columns)])
    header = ["task", "metric", "rows", "expert itself", "routed", "expert given", *(f"static: {m}" for m in merges)]
    text = f"On {scores.rows}; in brackets the share of the expert's own score. A prediction outside the row's task is wrong."
    if merges:
        text += " Static merges are told the true task's head, which no user has."
    worst = [(task.normalised(task.routed), task.name) for task in scores.tasks]
    known = [pair for pair in worst if pair[0] is not None]
    text += f"\n\n{table(header, rows)}"
    if known:
        lowest, name = min(known)  # type: ignore[type-var]
        text += f"\n\nThe worst task is {cell(name)}, at {lowest:.1f}% of its expert's score."
    return text


def _score(normalised: float | None, score: float | None) -> str:
    if score is None:
        return "unknown"
    return f"{score:.3f}" + (f" ({normalised:.1f}%)" if normalised is not None else "")


def size_text(report: dict) -> str:
    """Bytes by part."""
    size = report["storage"]
    parts = ", ".join(f"{name} {size[name] / 1e6:.2f} MB" for name in ("shared", "deltas", "heads", "router"))
    return f"{size['total'] / 1e6:.2f} MB: {parts}; {size['ratio']:.2f} times the shared backbone alone."


def licences_text(licences: Licences) -> str:
    """The warning, and the licence of each source that has one."""
    if not licences.by_source:
        return licences.warning
    rows = [[name, ", ".join(found)] for name, found in licences.by_source.items()]
    return f"{licences.warning}\n\n" + table(["source", "licence"], rows)
