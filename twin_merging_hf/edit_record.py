"""What an edited artifact says about itself: provenance, row hashes, report, verdict."""

import copy
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace

from . import builder
from .artifact import LAYOUT, Storage, storage, tensor_sizes
from .coverage import sums, with_bytes
from .drift import Drift
from .edit_router import EditedRouter
from .edit_source import Source
from .preflight import Inputs
from .row_hashes import RowHashes, read_hashes, recorded_hashes
from .stacking import Stack
from .verdict import Verdict, expert_score


REMOVE = "remove-expert"


def put_provenance(config: TwinMergingConfig, source: Source, what: str, name: str, text: str, alone: Inputs | None):
    """Say in the config where the edited artifact came from; `provenance.edits` grows by one."""
    provenance = config.provenance
    provenance["recipe_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    provenance["shared_experts"] = source.built_from
    provenance["versions"] = builder.versions()
    old = provenance.get("sources", {})
    sources = {n: s for n, s in old.items() if n not in source.stack.names}
    for expert in config.expert_names:
        if alone is not None and expert == name:
            sources[expert] = builder.source_of(alone.experts[0])
        elif expert in old:
            sources[expert] = old[expert]
    provenance["sources"] = sources
    provenance["edits"] = [*provenance.get("edits", []), {"what": what, "name": name}]


def edited_hashes(source: Source, inputs: Inputs | None, alone: Inputs | None) -> RowHashes:
    """
    Hashes of the rows that the edited artifact was made with: the old ones, those of an expert that left included, as the
    shared model still holds what it learned; and of every row that this edit read.
    """
    path = source.folder / LAYOUT.rows
    listed = LAYOUT.rows in source.config.provenance.get("companions", [])
    hashes = read_hashes(path) if listed or path.is_file() else {}
    used = [alone] if alone is not None else []
    if inputs is not None and inputs.rows is not None:
        used.append(inputs)
    for part in used:
        _unite(hashes, recorded_hashes(part.recipe, part.entries, source.kind))
    return hashes


def _unite(hashes: RowHashes, more: RowHashes) -> None:
    for name, parts in more.items():
        own = hashes.setdefault(name, {})
        for part, values in parts.items():
            own[part] = sorted({*own.get(part, []), *values})


def edited_labels(source: Source, stack: Stack) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Labels of the edited artifact in id order, and those that got another id: name -> (old, new)."""
    before, after = source.config.label_names, list(LabelSpace.of(stack.entries).labels)
    moved = {label: (before.index(label), i) for i, label in enumerate(after) if label in before}
    return after, {label: ids for label, ids in moved.items() if ids[0] != ids[1]}


def edit_entry(
    source: Source, what: str, name: str, stack: Stack, router: EditedRouter, drift: Drift | None, notes: list[str]
) -> dict:
    """One item of `edits` in report.json."""
    before = source.config.label_names
    labels, moved = edited_labels(source, stack)
    return {
        "what": what,
        "name": name,
        "labels": {
            "added": [label for label in labels if label not in before],
            "removed": [label for label in before if label not in labels],
            "moved": {label: list(ids) for label, ids in moved.items()},
        },
        "router": router.how,
        "drift": asdict(drift) if drift is not None else None,
        "notes": [*notes, *router.notes],
        "versions": builder.versions(),
    }


def edited_verdict(source: Source, stack: Stack, edit: dict, verdict: Verdict, alone: Inputs | None) -> dict:
    """
    The verdict, or, where agreement was not measured, a stale one that keeps the experts' own scores.

    Args:
        alone: the newcomer with its rows, whose own score is measured then.
    """
    if verdict.agreement is not None:
        return asdict(verdict)
    name = edit["name"]
    scores = dict((source.report.get("verdict") or {}).get("expert_scores") or {})
    if alone is not None:
        scores.pop(name, None)
        own = expert_score(alone, 0)
        if own is not None:
            scores[name] = own
    kept = {expert: scores[expert] for expert in stack.names if expert in scores}
    content = asdict(replace(verdict, expert_scores=kept or None))
    return {**content, "stale": f"not measured again after {edit['what']} {name}"}


def edited_report(
    source: Source,
    folder: Path,
    config: TwinMergingConfig,
    stack: Stack,
    inputs: Inputs | None,
    alone: Inputs | None,
    router: EditedRouter,
    difference: float,
    edit: dict,
) -> dict:
    """Content of report.json, but for the verdict. Args: inputs: with rows, if they were read; difference: the probe's."""
    old, name = source.report, edit["name"]
    stale = f"not measured again after {edit['what']} {name}"
    sizes: Storage = storage(folder, config)
    coverage = with_bytes(stack.coverage, tensor_sizes(folder))
    figures: dict[str, Any] = {"type": config.router_type, "temperature": config.router_temperature, "held_out_rows": 0}
    figures = {**figures, "stale": stale} if router.report is None else asdict(router.report)
    exclusive = {**copy.deepcopy(old.get("exclusive", {})), "bytes": sizes.deltas}
    found = sums(coverage, sizes.deltas)
    exclusive = {**exclusive, "stale": stale} if found is None else {**exclusive, **found}
    replaced = f"expert {name!r}" if edit["what"] != "add-expert" else None
    notes = [note for note in old.get("notes", []) if replaced is None or not note.startswith(replaced)]
    return {
        **old,
        "experts": stack.entries,
        "labels": list(LabelSpace.of(stack.entries).labels),
        "storage": {**asdict(sizes), "total": sizes.total, "ratio": round(sizes.ratio, 4)},
        "exclusive": exclusive,
        "router": figures,
        "probe": {"largest_relative_difference": float(f"{difference:.1e}")},
        "data": _data(old, stack, inputs, alone, name),
        "notes": [*notes, *edit["notes"]],
        "edits": [*old.get("edits", []), edit],
        "tensors": coverage,
    }


def _data(old: dict, stack: Stack, inputs: Inputs | None, alone: Inputs | None, name: str) -> dict:
    """Figures of the rows: of all that were read now, else as they were, with the newcomer's."""
    if inputs is not None and inputs.rows is not None:
        return builder.data_report(inputs)
    found = {expert: rows for expert, rows in old.get("data", {}).items() if expert in stack.names}
    if alone is not None:
        found.pop(name, None)
        found |= builder.data_report(alone)
    return {expert: found[expert] for expert in stack.names if expert in found}
