"""`init`: look at checkpoints, tell which fit together and why not, and write a starter recipe."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from twin_merging_hf.modeling.configuration_twin_merging import RESERVED_EXPERT_NAMES

from .adapted import AdaptedCheckpoint, adapter_base, open_expert
from .checkpoints import Checkpoint, open_checkpoint
from .data import EXAMPLES
from .errors import TwinMergingError
from .initialisation import describe_strangers
from .preflight import checkpoint_processing, compare_backbones, input_kind
from .processing import Processing, differing_parts


@dataclass(frozen=True)
class Look:
    """What `init` found out about one checkpoint, and why it does not fit to the first (empty: it does)."""

    name: str
    source: str
    checkpoint: Checkpoint
    processing: Processing | None
    misfits: list[str]
    is_base: bool = False
    trained_on: str | None = None
    """For a LoRA adapter whose own base is not to be had here: the base that the user says it has."""


def look_at(models: list[str], base: str | None, folder: Path) -> list[Look]:
    """
    Open each checkpoint and compare it with the first.

    Raises:
        TwinMergingError: one cannot be opened.
    """
    looks: list[Look] = []
    names = _names(models)
    bases = [adapter_base(source, folder, f"expert {name!r}") for name, source in zip(names, models, strict=True)]
    stated, base = base, base or next((_within(folder, found) for found in bases if found is not None), None)
    for name, source in zip(names, models, strict=True):
        checkpoint, misfits, trained_on = _open(f"expert {name!r}", source, folder, base, stated)
        look = _look(name, source, checkpoint, looks[0] if looks else None)
        looks.append(replace(look, misfits=[*misfits, *look.misfits], trained_on=trained_on))
    if base is not None:
        checkpoint = open_checkpoint(base, folder, "base model", like=looks[0].checkpoint)
        looks.append(_look("base", base, checkpoint, looks[0], is_base=True))
    return looks


def _within(folder: Path, source: str) -> str:
    """A base that lies in `folder`, as a path from there: a recipe that moves with its folder keeps it."""
    path = Path(source)
    inside = path.is_absolute() and path.is_relative_to(folder.resolve())
    return str(path.relative_to(folder.resolve())) if inside else source


def _open(
    role: str, source: str, folder: Path, base: str | None, stated: str | None
) -> tuple[Checkpoint, list[str], str | None]:
    """An expert, why it is not one of `base`, and what a user's statement of the base settles."""
    try:
        return open_expert(source, folder, role, base), [], None
    except TwinMergingError as error:
        try:
            return open_expert(source, folder, role), [str(error)], None  # it is one, but of another base
        except TwinMergingError:
            if stated is None or adapter_base(source, folder, role) is None:
                raise error from None
    return open_expert(source, folder, role, stated, stated), [], stated


def _look(name: str, source: str, checkpoint: Checkpoint, first: Look | None, is_base: bool = False) -> Look:
    processing = checkpoint_processing(checkpoint, input_kind(checkpoint))
    misfits: list[str] = []
    if first is not None:
        if checkpoint.task_class is not first.checkpoint.task_class:
            theirs = first.checkpoint.task_class.__name__
            misfits.append(f"it is a {checkpoint.task_class.__name__}, {first.name} is a {theirs}")
        else:
            misfits += compare_backbones(checkpoint, first.checkpoint)
            if processing is not None and first.processing is not None:
                only = ("vocabulary",) if is_base else None
                parts = differing_parts(processing, first.processing, only)
                misfits += [f"tokenizer or image processor differs in {', '.join(parts)}"] if parts else []
    return Look(name, source, checkpoint, processing, misfits, is_base)


def _names(models: list[str]) -> list[str]:
    names: list[str] = []
    for model in models:
        stem = model.split("@")[0].rstrip("/").split("/")[-1] or "expert"
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", stem)
        taken = {taken.lower() for taken in names} | set(RESERVED_EXPERT_NAMES)
        candidates = (name, *(f"{name}-{number}" for number in range(2, len(models) + 2)))
        names.append(next(candidate for candidate in candidates if candidate.lower() not in taken))
    return names


def describe_look(look: Look) -> list[str]:
    """Lines for people about one checkpoint."""
    checkpoint = look.checkpoint
    numbers = sum(shape.numel() for shape in checkpoint.backbone.values())
    labels = list((checkpoint.config.id2label or {}).values())
    has_labels = not look.is_base and not checkpoint.is_language_model
    head = f", {len(labels)} labels: {', '.join(map(str, labels[:6]))}" if has_labels else ""
    fits = "fits" if not look.misfits else "does not fit"
    kind = checkpoint.task_class.__name__ + (f", LoRA on {checkpoint.adapter_of}" if checkpoint.adapter_of else "")
    return [
        f"{look.name}: {kind}, {numbers / 1e6:.1f}M backbone parameters{head} - {fits}",
        *(f"    {misfit}" for misfit in look.misfits),
    ]


def starter_recipe(looks: list[Look], recipe_folder: Path) -> str:
    """
    YAML of a recipe for the checkpoints that fit, with comments on what may be added.

    Raises:
        TwinMergingError: fewer than one expert is left.
    """
    fitting = [look for look in looks if not look.misfits and not look.is_base]
    base = next((look for look in looks if look.is_base and not look.misfits), None)
    if not fitting:
        raise TwinMergingError("no checkpoint is left to build from")
    content: dict = {}
    if base is not None:
        content["base_model"] = _relative(base.source, recipe_folder)
    adapters = [look.checkpoint for look in fitting if isinstance(look.checkpoint, AdaptedCheckpoint)]
    exclusive: dict = {"method": "svd", "rank": 16, "dtype": "int4"}
    if len(adapters) == len(fitting):  # LoRAs on their base are kept exactly, in their own bytes
        content["shared_model"] = "base"
        exclusive = {"method": "svd", "rank": max(lora.rank_of(name) for lora in adapters for name in lora.pairs)}
    else:
        content["merge_method"] = "linear"
    content["experts"] = [_entry(look, recipe_folder) for look in fitting]
    content["exclusive"] = exclusive
    content["router"] = "auto"
    strangers = describe_strangers([look.checkpoint for look in fitting]) if len(fitting) > 1 else []
    if strangers:
        content["alignment"] = "auto"
    lines = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    first = fitting[0].checkpoint
    names = "# and readable names for labels that are called LABEL_0, ...:\n#   labels: [negative, positive]\n"
    return (
        "# Each expert may have rows of its task, from which the router is trained (without them, `router: auto` needs none\n"
        "# but chooses worse):\n"
        f"#   data: rows.jsonl        one {EXAMPLES[input_kind(first)]} a line; or {{train: ..., validation: ..., test: ...}}\n"
        f"{'' if first.is_language_model else names}"
        f"{''.join(f'# {sentence}.{_NEW_LINE}' for sentence in strangers)}"
        f"{lines}"
    )


_NEW_LINE = "\n"


def _entry(look: Look, folder: Path) -> dict:
    entry = {"name": look.name, "model": _relative(look.source, folder)}
    return entry | ({"base_model": _relative(look.trained_on, folder)} if look.trained_on else {})


def _relative(source: str, folder: Path) -> str:
    path = Path(source)
    if not path.exists():
        return source
    return source if path.is_absolute() else os.path.relpath(path, folder)
