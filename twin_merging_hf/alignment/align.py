"""Align one expert, or several, with a reference: the package's front."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .activations import Batches, activation_similarities
from .permutation import Permutation
from .registry import layout_of, verify_spec
from .report import AlignmentReport, make_report
from .spec import Layout
from .sweep import DualSpace, search
from .weights import WeightSpace


@dataclass(frozen=True)
class AlignmentResult:
    """
    An expert's units in the reference's order; its function is unchanged.

    permutation: `.align(name, tensor)` moves one tensor of the expert (by its state-dict name).
    report: what was matched, and how well.
    """

    permutation: Permutation
    report: AlignmentReport

    def apply(self, model: torch.nn.Module) -> None:
        """Move all tensors of the expert in place; class, config and ties stay."""
        self.permutation.apply(model)

    def state_dict(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The expert's tensors, moved."""
        return self.permutation.state_dict(state)


def align(
    reference: Any,
    expert: Any,
    batches: Batches | None = None,
    *,
    weight_share: float = 0.5,
    similarity: str = "pearson",
    max_sweeps: int = 20,
    patience: int = 5,
    seed: int = 0,
    layout: Layout | None = None,
    tick: Callable[[str], Any] = lambda what: None,
) -> AlignmentResult:
    """
    Find the permutation (and signs, where free) that brings an expert's units to the places of a reference's (MuDSC).

    Args:
        reference, expert: task models of one class, such as two BertForSequenceClassification; neither is changed.
        batches: model inputs for activations, without labels; None: weights alone, whatever `weight_share`.
        weight_share: share of weights in the similarity; 0: activations alone, as in ZipIt; 1: weights alone, as in Git
            Re-Basin, still from a start by activations if there are batches.
        similarity: of weights, `pearson` or `cosine`.
        max_sweeps, patience: at most so many sweeps, and no more than `patience` without a better objective.
        layout: the specification, worked out and verified already (by `checked_layout`).
        tick: called for each block that was matched.

    Raises:
        TwinMergingError: the models' type is not known here.
        ValueError: a specification that fails its verification,
            models that do not fit together, or a share outside [0, 1].
    """
    if not 0 <= weight_share <= 1:
        raise ValueError(f"`weight_share` must be between 0 and 1, got {weight_share!r}")
    if similarity not in ("pearson", "cosine"):
        raise ValueError(f"`similarity` must be 'pearson' or 'cosine', got {similarity!r}")
    layout = layout or checked_layout(reference)
    tensors = [dict(model.state_dict()) for model in (reference, expert)]
    _check_pair(layout, *tensors)
    activations = {} if batches is None else activation_similarities(reference, expert, layout, batches)
    weights = WeightSpace(layout, tensors[0].__getitem__, tensors[1].__getitem__, similarity)
    space = DualSpace(layout, weights, activations, weight_share if activations else 1.0)
    found = search(space, max_sweeps, patience, seed, tick)
    return AlignmentResult(found.best, make_report(space, found))


def align_all(
    models: Sequence[Any], batches: Batches | None = None, *, reference: int = 0, **options: Any
) -> list[AlignmentResult | None]:
    """
    Align every model with one of them, each by itself, so that their order changes nothing; None for the reference.

    Args:
        options: as in `align`.
    """
    if batches is not None:
        batches = list(batches)
    layout = options.pop("layout", None) or checked_layout(models[reference])
    return [
        None if i == reference else align(models[reference], model, batches, layout=layout, **options)
        for i, model in enumerate(models)
    ]


def checked_layout(model: Any) -> Layout:
    """Verify the specification of a model and work it out. Raises as `align`."""
    verify_spec(model)
    return layout_of(model)


def _check_pair(layout: Layout, reference: dict, expert: dict) -> None:
    if reference.keys() != expert.keys():
        raise ValueError(f"the models differ in their tensors: {sorted(reference.keys() ^ expert.keys())[:3]}")
    for name, axes in layout.axes.items():
        one, other = reference[name].shape, expert[name].shape
        differing = [d for d, axis in enumerate(axes) if axis is not None and one[d] != other[d]]
        if differing or len(one) != len(other):
            raise ValueError(f"tensor {name!r} is {list(one)} in the reference, but {list(other)} in the expert")
