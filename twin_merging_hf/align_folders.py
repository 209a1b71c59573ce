"""`align`: MuDSC by itself. Writes aligned checkpoints, or one merged checkpoint, as folders of the stock class."""

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .align_experts import calibration_rows, stored_dtype, view_aligned
from .alignment import has_batch_norm, merge_models, reestimate_batch_norm
from .artifact import refuse_existing, staged, write_json
from .checkpoints import Checkpoint
from .errors import TwinMergingError
from .inference import batches
from .pictures import draw_alignment
from .preflight import Inputs, preflight
from .progress import Progress, no_loading_bars
from .recipe import AlignmentSettings, Recipe, load_recipe


MODES = ("align", "zip")
REPORT, PICTURE, MATRICES = "alignment.json", "alignment.png", "zip.safetensors"


@dataclass(frozen=True)
class Aligned:
    """What `align_recipe` wrote: the folder, and its report as in `alignment.json`."""

    folder: Path
    report: dict[str, Any]


def align_recipe(
    recipe: Recipe | str | Path,
    out: str | Path,
    mode: str = "align",
    heads: str = "keep",
    progress: Progress | None = None,
) -> Aligned:
    """
    Align a recipe's experts, whatever its `alignment` says about when (its other settings count).

    Args:
        out: must not exist. `align`: one folder for each expert, the same function as the expert's, the units in the
            reference's order. `zip`: one merged checkpoint; beside it the matrices by which each expert's units went into it.
        heads: of a zip: `keep` each expert's own, in `heads/NAME.safetensors` (the checkpoint gets the reference's), or
            `average` them.

    Raises:
        TwinMergingError: something in the inputs that the user can fix; nothing is written then.
    """
    if mode not in MODES:
        raise TwinMergingError(f"`--mode` must be {' or '.join(MODES)}, got {mode!r}")
    progress, out = progress or Progress(), Path(out)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    refuse_existing(out)
    settings = replace(recipe.alignment or AlignmentSettings(), method="mudsc")
    recipe = replace(recipe, alignment=settings)
    progress.say("checking recipe, checkpoints and data")
    inputs = preflight(recipe, progress.say)
    try:
        with staged(out, artifact=False) as folder, no_loading_bars():
            write = _write_aligned if mode == "align" else _write_zip
            report = write(folder, inputs, settings, progress, heads)
            report["notes"] = inputs.notes
            write_json(folder / REPORT, report)
            with suppress(TwinMergingError):  # without matplotlib there is no picture
                draw_alignment(folder / PICTURE, report["experts"])
    finally:
        inputs.close()
    return Aligned(out, report)


def _write_aligned(
    folder: Path, inputs: Inputs, settings: AlignmentSettings, progress: Progress, heads: str
) -> dict[str, Any]:
    aligned = view_aligned(inputs, settings, progress)
    for name, checkpoint in zip(inputs.recipe.names, aligned.experts, strict=True):
        _save(checkpoint.load_model(), checkpoint, folder / name)
        _save_processor(inputs, folder / name)
    return aligned.alignment or {}


def _write_zip(
    folder: Path, inputs: Inputs, settings: AlignmentSettings, progress: Progress, heads: str
) -> dict[str, Any]:
    if settings.weight_share is None:
        raise TwinMergingError("`weight_share: search` compares aligned averages; for a zip, give a number")
    names = inputs.recipe.names
    models = [checkpoint.load_model() for checkpoint in inputs.experts]
    rows = calibration_rows(inputs, settings)
    given = [batch for _, batch in batches(rows, inputs.processing)] if rows and inputs.processing else None
    if has_batch_norm(models[0]) and given is None:
        raise TwinMergingError(
            "these models have BatchNorm, whose statistics after a zip can only be estimated from inputs; give `data` or "
            "`alignment.calibration`"
        )
    for model in models if given else []:
        reestimate_batch_norm(model, given or [])
    reference = names.index(settings.reference) if settings.reference else 0
    progress.say(f"zipping {len(models)} models")
    bar = progress.counter("matching blocks of units", 0)
    merge = merge_models(
        models,
        given,
        mode="zip",
        weight_share=settings.weight_share,
        reference=reference,
        heads=heads,
        max_sweeps=settings.max_sweeps,
        seed=inputs.recipe.seed if settings.seed is None else settings.seed,
        tick=lambda block: bar.update(),
    )
    bar.close()
    merge.apply(models[reference], given)
    _save(models[reference], inputs.experts[reference], folder)
    _save_processor(inputs, folder)
    sidecar = {
        f"{name}.{site}": m for site, each in merge.matrices.items() for name, m in zip(names, each, strict=True)
    }
    permutations: dict[str, Any] = {}
    for name, result in zip(names, merge.alignments, strict=True):
        if result is not None:
            permutations |= {f"{name}.{site}.index": index for site, index in result.permutation.index.items()}
            permutations |= {f"{name}.{site}.sign": sign for site, sign in result.permutation.sign.items()}
    save_file({key: value.contiguous() for key, value in sidecar.items()}, folder / MATRICES)
    save_file({key: value.contiguous() for key, value in permutations.items()}, folder / "permutations.safetensors")
    if heads == "keep":
        (folder / "heads").mkdir()
        for name, head in zip(names, merge.heads, strict=True):
            save_file(
                {key: value.contiguous() for key, value in head.items()}, folder / "heads" / f"{name}.safetensors"
            )
    return {
        "method": "mudsc",
        "mode": "zip",
        "reference": names[reference],
        "heads": heads,
        "calibration_rows": len(rows),
        "zipped_sites": sorted(merge.matrices),
        "zip_objectives": merge.objectives,
        "experts": {n: r.report.to_dict() for n, r in zip(names, merge.alignments, strict=True) if r is not None},
    }


def _save(model: Any, source: Checkpoint, folder: Path) -> None:
    """Write a model in the type of the checkpoint that it comes from."""
    model.to(dtype=stored_dtype(source)).save_pretrained(folder)


def _save_processor(inputs: Inputs, folder: Path) -> None:
    if inputs.processing is not None:
        inputs.processing.processor.save_pretrained(folder)


def describe_alignment(report: dict[str, Any]) -> list[str]:
    """Lines for people: what was found for each expert, in one line and by kind of site."""
    lines = [f"reference: {report['reference']}; {report['calibration_rows']} calibration rows"]
    for name, found in report["experts"].items():
        kept = " (nothing better than leaving it as it is)" if found["kept_identity"] else ""
        lines.append(
            f"{name}: similarity of matched units {found['objective']:.3f} (as they stood {found['identity_objective']:.3f}), "
            f"{found['moved']:.0%} moved, {len(found['objectives']) - 1} sweeps{kept}"
        )
        for kind, (similarity, moved, negative) in _by_kind(found["sites"]).items():
            shown = "-" if similarity is None else f"{similarity:.3f}"
            lines.append(f"    {kind:<6} similarity {shown}, moved {moved:.0%}, negative {negative:.0%}")
    return lines


def _by_kind(sites: dict[str, dict]) -> dict[str, tuple[float | None, float, float]]:
    """Means over sites of one kind, such as all layers' feed-forward units."""
    kinds: dict[str, list[dict]] = {}
    for name, site in sites.items():
        kinds.setdefault(re.split(r"\.\d", name)[0], []).append(site)
    found = {}
    for kind, each in kinds.items():
        similar = [site["similarity"] for site in each if site["similarity"] is not None]
        mean = sum(similar) / len(similar) if similar else None
        moved, negative = (sum(site[key] for site in each) / len(each) for key in ("moved", "negative"))
        found[kind] = (mean, moved, negative)
    return found
