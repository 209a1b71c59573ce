"""The folder of an edited artifact: companions, weights, probe, report, card; whole at the end, as after a build."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twin_merging_hf.hub_upload.model_card import write_card

from . import builder
from .artifact import LAYOUT, check_files, write_json
from .drift import Drift
from .edit_record import edit_entry, edited_hashes, edited_report, edited_verdict, put_provenance
from .edit_router import EditedRouter
from .edit_source import Source
from .errors import TwinMergingError
from .pictures import draw_confusion
from .preflight import Inputs
from .probe import probe
from .progress import Progress
from .row_hashes import write_hashes
from .stacking import Stack
from .verdict import Verdict, reach_verdict


@dataclass(frozen=True)
class Edited:
    """
    An edit's result in memory.

    text: the new recipe. inputs: rows of all experts, if they were read. full: all experts as for a build, if they are
    there. alone: the newcomer.
    """

    what: str
    name: str
    source: Source
    model: Any
    stack: Stack
    text: str
    inputs: Inputs | None
    full: Inputs | None
    alone: Inputs | None
    router: EditedRouter
    drift: Drift | None
    notes: list[str]


def write_edited(folder: Path, edited: Edited, progress: Progress) -> tuple[dict, Verdict]:
    """
    Write all files of an edited artifact into a staging folder. Returns its report and verdict.

    Raises:
        TwinMergingError: a file of the old artifact is missing, or the new one does not pass probe and checks.
    """
    source, stack, router, config = edited.source, edited.stack, edited.router, edited.model.config
    put_provenance(config, source, edited.what, edited.name, edited.text, edited.alone)
    _write_companions(folder, edited)
    builder.save_weights(edited.model, folder)
    loaded = type(edited.model).from_pretrained(folder, config=config, dtype=torch.float32).eval()
    progress.say("probing: a batch that mixes experts against dense models")
    difference = probe(loaded, config.provenance.get("seed", 0))
    verdict = Verdict(None, None, None, None, None)
    if edited.full is not None:
        verdict = reach_verdict(loaded, edited.full, router.report, progress.counter)
    config = loaded.config
    edit = edit_entry(source, edited.what, edited.name, stack, router, edited.drift, edited.notes)
    report = edited_report(source, folder, config, stack, edited.inputs, edited.alone, router, difference, edit)
    report["verdict"] = edited_verdict(source, stack, edit, verdict, edited.alone)
    config.provenance["verdict"] = report["verdict"]
    write_json(folder / LAYOUT.report, report)
    if LAYOUT.confusion in config.provenance["companions"]:
        assert router.report is not None
        draw_confusion(folder / LAYOUT.confusion, stack.names, router.report.confusion)
    write_card(folder / LAYOUT.card, config, report, edited.text, source.kind)
    config.dtype = config.shared_config.dtype = source.dtype
    (folder / LAYOUT.unfinished_config).write_text(config.to_json_string(), encoding="utf-8")
    problems = check_files(folder, config)
    if problems:
        raise TwinMergingError("the edited artifact is not whole: " + "; ".join(problems))
    return report, verdict


def _write_companions(folder: Path, edited: Edited) -> None:
    """Copy what no edit changes, write recipe and row hashes; the list of companions goes into the config."""
    source = edited.source
    written = {LAYOUT.report, LAYOUT.card, LAYOUT.recipe, LAYOUT.confusion, LAYOUT.rows}
    companions = set(source.config.provenance.get("companions", [])) - written
    for name in companions:
        if Path(name).name != name or not (source.folder / name).is_file():
            raise TwinMergingError(f"{source.folder}: {name} is missing; `twin-merging check` tells what else is")
        shutil.copyfile(source.folder / name, folder / name)
    (folder / LAYOUT.recipe).write_text(edited.text, encoding="utf-8")
    companions |= {LAYOUT.report, LAYOUT.card, LAYOUT.recipe}
    hashes = edited_hashes(source, edited.inputs, edited.alone)
    if hashes:
        write_hashes(folder / LAYOUT.rows, hashes)
        companions.add(LAYOUT.rows)
    if edited.router.report is not None and builder.can_draw():
        companions.add(LAYOUT.confusion)
    edited.model.config.provenance["companions"] = sorted(companions)
