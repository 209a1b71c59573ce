"""The alignment stage of a build: experts of different initialisation are read in one order of units from here on."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .alignment import AlignmentResult, Layout, Permutation, align, checked_layout
from .checkpoints import Checkpoint
from .data import read_calibration_rows
from .errors import TwinMergingError
from .evaluation import accuracy, checkpoint_model, merged_backbone, model_outputs, pearson, with_backbone
from .inference import batches
from .initialisation import describe_strangers
from .preflight import Inputs, share_statistics
from .progress import Progress, no_loading_bars
from .recipe import AlignmentSettings


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weight shares that `search` tries."""


@dataclass
class AlignedCheckpoint(Checkpoint):
    """
    An expert whose units are read in the reference's order; its files stay as they are.

    whole: the expert as it stands, a full checkpoint or an adapter on its base.
    """

    whole: Checkpoint = field(default=None)  # type: ignore[assignment]
    permutation: Permutation = field(default=None)  # type: ignore[assignment]

    @classmethod
    def of(cls, whole: Checkpoint, permutation: Permutation) -> "AlignedCheckpoint":
        """An expert seen through a permutation."""
        own = {f.name: getattr(whole, f.name) for f in fields(Checkpoint)}
        return cls(**own, whole=whole, permutation=permutation)

    def stored(self, name: str) -> torch.Tensor:
        """Read one tensor and move its units."""
        return self.permutation.align(name, self.whole.tensor(name))

    def load_model(self) -> PreTrainedModel:
        model = self.whole.load_model()
        self.permutation.apply(model)
        return model

    def fingerprint(self) -> str:
        return self.whole.fingerprint()

    @property
    def adapter_of(self) -> str | None:
        return self.whole.adapter_of

    @property
    def processing_paths(self) -> list[Path]:
        return self.whole.processing_paths

    def close(self) -> None:
        self.whole.close()


def align_inputs(inputs: Inputs, progress: Progress) -> Inputs:
    """
    Align the experts as the recipe says: everything that is read of them afterwards is in the reference's order.

    Raises:
        TwinMergingError: the architecture's symmetries are not known, or the calibration file does not fit.
    """
    settings = inputs.recipe.alignment
    if not needs_alignment(inputs) or settings is None:
        return inputs
    with no_loading_bars():
        aligned = view_aligned(inputs, settings, progress)
    if inputs.base is not None and inputs.recipe.merge_method == "linear" and inputs.shared is not inputs.base:
        inputs.notes.append("the base model was left aside: aligned experts have moved away from it")
        inputs.base.close()
        aligned = replace(aligned, base=None)
    return aligned


def needs_alignment(inputs: Inputs) -> bool:
    """Whether the recipe has its experts aligned; what their weights say about it goes into the notes."""
    settings, experts = inputs.recipe.alignment, inputs.experts
    strangers = describe_strangers(experts) if len(experts) > 1 else []
    if settings is not None and (settings.method != "auto" or strangers):
        inputs.notes += [f"{sentence}, so they are aligned first" for sentence in strangers]
        return True
    inputs.notes += [f"{sentence}; `alignment: auto` brings their units into one order first" for sentence in strangers]
    if settings is not None:
        inputs.notes.append("alignment: auto: all experts are of one initialisation, so nothing is aligned")
    return False


def view_aligned(inputs: Inputs, settings: AlignmentSettings, progress: Progress) -> Inputs:
    """Align the experts and return the inputs as seen through it, the report included. Raises as `align_inputs`."""
    for expert in inputs.experts:
        if expert.adapter_of is not None:
            raise TwinMergingError(
                f"{expert.role} is a LoRA adapter, and moving units would part it from its base: leave `alignment` out (LoRAs of "
                "one base need none), or merge it in PEFT (`merge_and_unload`) and give the full checkpoint"
            )
    reference = inputs.recipe.names.index(settings.reference) if settings.reference else 0
    model = checkpoint_model(inputs.experts[reference])
    try:
        layout = checked_layout(model)
    except TwinMergingError:
        raise
    except ValueError as error:
        raise TwinMergingError(f"{inputs.experts[reference].role} cannot be aligned: {error}") from error
    rows = calibration_rows(inputs, settings)
    shares = [settings.weight_share] if settings.weight_share is not None else list(SHARES)
    tried: list[tuple[float, Inputs]] = []
    for share in shares:
        results: list[AlignmentResult | None] = [None] * len(inputs.experts)
        for index, expert in enumerate(inputs.experts):
            if index != reference:
                results[index] = _align_one(model, expert, rows, share, settings, inputs, layout, progress)
        experts = [_view(e, r) for e, r in zip(inputs.experts, results, strict=True)]
        candidate = replace(inputs, experts=experts)
        _share_statistics_again(candidate)
        candidate.alignment = _report(inputs, reference, results, rows)
        tried.append((_score(candidate) if len(shares) > 1 else 0.0, candidate))
    best = max(tried, key=lambda each: each[0])[1]
    if len(shares) > 1:
        assert best.alignment is not None
        best.alignment["search"] = {
            f"{share:g}": round(score, 4) for share, (score, _) in zip(shares, tried, strict=True)
        }
    return best


def _align_one(
    model: Any, expert: Checkpoint, rows: list[dict], share: float, settings: AlignmentSettings, inputs: Inputs,
    layout: Layout, progress: Progress,
) -> AlignmentResult:  # fmt: skip
    progress.say(f"aligning {expert.role}")
    bar = progress.counter("matching blocks of units", len(layout.roots) * (1 + settings.max_sweeps))
    seed = inputs.recipe.seed if settings.seed is None else settings.seed
    inputs_of_rows = None
    if rows:
        assert inputs.processing is not None
        inputs_of_rows = (batch for _, batch in batches(rows, inputs.processing))
    try:
        return align(
            model,
            checkpoint_model(expert),
            inputs_of_rows,
            weight_share=share,
            max_sweeps=settings.max_sweeps,
            seed=seed,
            layout=layout,
            tick=lambda block: bar.update(),
        )
    finally:
        bar.close()


def align_newcomer(alone: Inputs, built: Checkpoint, progress: Progress) -> Inputs:
    """
    Align one expert that joins a finished artifact with the artifact's shared model, as the artifact's recipe says.

    Args:
        alone: inputs of the new expert by itself.
        built: the artifact's shared model.

    Raises:
        TwinMergingError: as `align_inputs`.
    """
    settings, expert = alone.recipe.alignment, alone.experts[0]
    if settings is None or (settings.method == "auto" and not describe_strangers([built, expert])):
        return alone
    # The shared model has no head of its own; under the newcomer's, only its backbone tells them apart.
    reference = checkpoint_model(expert)
    state = reference.state_dict()
    for name in built.backbone:
        state[name].copy_(built.tensor(name))
    rows = calibration_rows(alone, settings)
    share = 0.5 if settings.weight_share is None else settings.weight_share
    with no_loading_bars():
        result = _align_one(reference, expert, rows, share, settings, alone, checked_layout(reference), progress)
    alone.notes.append(
        f"{expert.role} was aligned with the shared model: similarity of matched units {result.report.objective:.3f} "
        f"(as they stood {result.report.identity_objective:.3f})"
    )
    return replace(alone, experts=[_view(expert, result)])


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Type of an expert's floating-point weights, as stored."""
    types = (checkpoint.tensor(name).dtype for name in checkpoint.backbone)
    return next(dtype for dtype in types if dtype.is_floating_point)


def _view(expert: Checkpoint, result: AlignmentResult | None) -> Checkpoint:
    return expert if result is None else AlignedCheckpoint.of(expert, result.permutation)


def _share_statistics_again(candidate: Inputs) -> None:
    """Batch norms' common statistics are those of channels in the reference's order now, and lie in no other model."""
    ready = candidate.shared
    others = [each for each in (candidate.base, ready) if each is not None]
    share_statistics([*candidate.experts, *others], candidate.experts if ready is None else [ready], candidate.recipe)


def calibration_rows(inputs: Inputs, settings: AlignmentSettings) -> list[dict]:
    """Rows whose activations are compared: of a file, or as many of each expert's training rows; none: weights alone."""
    if isinstance(settings.calibration, Path):
        if inputs.processing is None:
            raise TwinMergingError(
                "`alignment.calibration` names a file, but no checkpoint has a tokenizer or processor"
            )
        return read_calibration_rows(settings.calibration, inputs.kind)
    if inputs.rows is None or settings.calibration == 0:
        inputs.notes.append("aligned by weights alone: no rows to compare activations on")
        return []
    each = max(1, settings.calibration // len(inputs.rows))
    return [row for rows in inputs.rows for row in rows.train[:each]]


def _score(candidate: Inputs) -> float:
    """Mean over experts of the aligned average's score on held-out rows, each under the expert's own head."""
    assert candidate.rows is not None and candidate.processing is not None
    backbone = merged_backbone(candidate, "linear")
    scores = []
    for index, rows in enumerate(candidate.rows):
        outputs = model_outputs(with_backbone(candidate, index, backbone), rows.held_out, candidate.processing)
        if candidate.entries[index]["problem_type"] == "regression":
            scores.append(pearson(outputs[:, 0], torch.tensor([row["label"] for row in rows.held_out])))
        else:
            scores.append(accuracy(outputs, rows.held_out))
    return sum(scores) / len(scores)


def _report(inputs: Inputs, reference: int, results: list[AlignmentResult | None], rows: list[dict]) -> dict[str, Any]:
    names = inputs.recipe.names
    return {
        "method": "mudsc",
        "reference": names[reference],
        "calibration_rows": len(rows),
        "experts": {name: r.report.to_dict() for name, r in zip(names, results, strict=True) if r is not None},
    }
