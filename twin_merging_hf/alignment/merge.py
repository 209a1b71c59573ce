"""One merged checkpoint of several models: plain average, average of aligned models, or zip; the baselines in one place."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import TwinMergingError
from .activations import Batches
from .align import AlignmentResult, align_all, checked_layout
from .batchnorm import has_batch_norm, reestimate_batch_norm
from .permutation import Permutation
from .spec import Layout
from .zip_space import Matrices, ZipSpace
from .zipping import memberships, zip_sites, zip_units


MODES = ("average", "align", "zip")


@dataclass(frozen=True)
class Merge:
    """
    A merge of several models.

    state: tensors of the merged model, by the reference's names and in its types. heads: of each model, the tensors of its
    own head, fitted to the merged backbone. matrices: by zipped site, of each model the memberships [unit, cluster] (or
    [head, unit, cluster]). alignments: what was found for each model (None for the reference, and for `average`).
    objectives: of a zip, the mean similarity within clusters after each sweep.
    """

    state: dict[str, torch.Tensor]
    heads: list[dict[str, torch.Tensor]]
    matrices: Matrices
    alignments: list[AlignmentResult | None]
    objectives: list[float] = field(default_factory=list)

    def apply(self, model: Any, batches: Batches | None = None) -> None:
        """
        Put the merge into a model of the reference's class, in place, and estimate its BatchNorm statistics anew.

        Raises:
            TwinMergingError: the model has BatchNorm, whose statistics do not follow from the weights, and there are no batches.
        """
        if has_batch_norm(model) and batches is None:
            raise TwinMergingError(
                "a merged model's BatchNorm statistics do not follow from its weights; give inputs to estimate them from"
            )
        model.load_state_dict(self.state)
        if batches is not None:
            reestimate_batch_norm(model, batches)


def merge_models(
    models: Sequence[Any],
    batches: Batches | None = None,
    *,
    mode: str = "align",
    weight_share: float = 0.5,
    reference: int = 0,
    heads: str = "average",
    sites: Sequence[str] | None = None,
    budget: float = 1.0,
    zip_sweeps: int = 2,
    max_sweeps: int = 20,
    seed: int = 0,
    tick: Callable[[str], Any] = lambda what: None,
) -> Merge:
    """
    Merge models into one of the same class and size.

    Args:
        models: task models of one class; they are not changed.
        mode: `average` (nothing is moved), `align` (mean of aligned models), `zip` (clusters of units, where that is exact).
        weight_share: as in `align`: 1 weights alone (Git Re-Basin, weight zip), 0 activations alone (ZipIt), between: MuDSC.
        heads: `average`, or `keep`: the merged model gets the reference's, all are in `Merge.heads`.
        sites, budget, zip_sweeps: of a zip: which sites (default: all where it is exact); share of merges within one model;
            how often sites are zipped again with their neighbours as zipped.

    Raises:
        TwinMergingError: heads of different sizes cannot be averaged; a site that cannot be zipped.
    """
    if mode not in MODES or heads not in ("average", "keep"):
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, `heads` average or keep; got {mode!r}, {heads!r}")
    layout = checked_layout(models[reference])
    states = [dict(model.state_dict()) for model in models]
    prefix = f"{models[reference].base_model_prefix}."
    own = _head_tensors(states[reference], prefix, heads, states)
    batches = None if batches is None else list(batches)
    results: list[AlignmentResult | None] = [None] * len(models)
    if mode != "average":
        options = {"weight_share": weight_share, "max_sweeps": max_sweeps, "seed": seed, "tick": tick}
        results = align_all(models, batches, reference=reference, layout=layout, **options)
    permutations = [result.permutation if result else Permutation.identity(layout) for result in results]
    chosen = [site for site in zip_sites(layout, sites) if not _in_heads(layout, site, own)] if mode == "zip" else []
    space = ZipSpace(layout, states, permutations, chosen, weight_share if batches else 1.0)
    matrices, objectives = _zip_all(space, models, batches, budget, zip_sweeps, seed) if chosen else ({}, [])
    merged = {}
    for name, tensor in states[reference].items():
        if name in own:
            merged[name] = space.seen(name, reference, matrices).to(tensor.dtype)
        elif tensor.is_floating_point():
            merged[name] = space.merged(name, matrices).to(tensor.dtype)
        else:
            merged[name] = tensor
    kept = [_fitted_head(space, model, matrices, own) for model in range(len(models))]
    return Merge(merged, kept, matrices, results, objectives)


def _head_tensors(state: Mapping, prefix: str, heads: str, states: Sequence[Mapping]) -> list[str]:
    """Tensors that are not merged: those of heads that are kept."""
    named = [name for name in state if not name.startswith(prefix)]
    if heads == "keep" and len(named) < len(state):
        return named
    differing = [name for name in state if len({each[name].shape for each in states}) > 1]
    if differing:
        raise TwinMergingError(
            f"tensor {differing[0]!r} is of different sizes in the models, so heads cannot be averaged; keep them per task"
        )
    return []


def _in_heads(layout: Layout, site: str, own: list[str]) -> bool:
    """Whether a site's units are produced in a head that is kept, such as the hidden layer of RoBERTa's classifier."""
    entries = layout.entries.get(layout.sites[site].parent or site, [])
    return any(e.tensor in own for e in entries if e.path[-1] == site and e.role in "+*")


def _fitted_head(space: ZipSpace, model: int, matrices: Matrices, own: list[str]) -> dict[str, torch.Tensor]:
    return {name: space.seen(name, model, matrices).to(space.states[model][name].dtype) for name in own}


def _zip_all(
    space: ZipSpace, models: Sequence[Any], batches: list | None, budget: float, sweeps: int, seed: int
) -> tuple[Matrices, list[float]]:
    """Zip every site: first with its neighbours as aligned, then with them as zipped; the best sweep counts."""
    if batches is not None:
        space.see(models, batches)
    matrices: Matrices = {}
    generator = random.Random(seed)
    best: tuple[float, Matrices] = (-2.0, {})
    objectives = []
    for sweep in range(1 + sweeps):
        cohesion = []
        found: Matrices = {} if sweep == 0 else matrices
        for site in generator.sample(space.sites, len(space.sites)):
            similarity = space.similarity(site, matrices)
            found[site], value = _zip_site(similarity, len(models), budget)
            cohesion.append(value)
        matrices = found
        objectives.append(sum(cohesion) / len(cohesion))
        if objectives[-1] > best[0]:
            best = (objectives[-1], dict(matrices))
    return best[1], objectives


def _zip_site(similarity: torch.Tensor, models: int, budget: float) -> tuple[list[torch.Tensor], float]:
    """Zip each group of a site; memberships of each model, and the mean similarity of units to their cluster's others."""
    grouped, cohesion = [], []
    for group in similarity:
        cluster = zip_units(group.numpy(), models, budget)
        grouped.append(memberships(cluster, models))
        whole = torch.cat(grouped[-1])
        sizes = whole.sum(0)
        inside = ((group @ whole) * whole).sum(0) - whole.T @ group.diagonal()
        pairs = sizes * (sizes - 1)
        cohesion.append(float(inside.sum() / pairs.sum()) if pairs.sum() else 1.0)
    stacked = [torch.stack([each[model] for each in grouped]) for model in range(models)]
    single = len(similarity) == 1
    return [matrix[0] if single else matrix for matrix in stacked], sum(cohesion) / len(cohesion)
