"""
Zip: merge the units of several models, within one and across, until each site is as wide as before (ZipIt, MuDSC).

It is exact for duplicates only where nothing normalises over the units and nothing multiplies two of them; specifications say
where (`Site.zips`). A zip cannot be undone, so it makes one merged checkpoint and no task vectors.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import TwinMergingError
from .spec import Layout


SHRINK = 0.5
"""What a merged cluster's similarities are multiplied by, so that large clusters grow slowly (`a` of ZipIt)."""


_MIXED = -1


def zip_sites(layout: Layout, wanted: Sequence[str] | None = None) -> list[str]:
    """
    Sites that are zipped: all where that is exact, or those that are asked for.

    Raises:
        TwinMergingError: a wanted site does not exist, or zipping is not exact there; the message says why. Or there is none.
    """
    for name in wanted or []:
        if name not in layout.sites:
            raise TwinMergingError(
                f"there is no site {name!r} to zip; there are {', '.join(list(layout.sites)[:8])}, ..."
            )
        if not layout.sites[name].zips:
            raise TwinMergingError(f"site {name!r} cannot be zipped: {_reason(layout, name)}; it is only permuted")
    found = [name for name, site in layout.sites.items() if site.zips and (wanted is None or name in wanted)]
    if not found:
        raise TwinMergingError("no site of this architecture can be zipped exactly; use `--mode align`")
    return found


def _reason(layout: Layout, name: str) -> str:
    site = layout.sites[name]
    if site.fixed:
        return "each of its dimensions has a frequency of its own (rotary positions), so none equals another"
    if layout.children(name):
        return "heads and groups are normalised one by one, so two do not add up to one"
    return site.why_not or "nothing says that merging duplicates there is exact"


def zip_units(similarity: np.ndarray, models: int, budget: float = 1.0, shrink: float = SHRINK) -> np.ndarray:
    """
    Merge `models * n` units into n clusters, always the most similar two, units of one model among themselves too.

    Args:
        similarity: [models * n, models * n], model by model.
        budget: share of the merges that each model may make among its own units (`b` of ZipIt; 1: the removed units over
            the number of models). A cluster with units of several models is nobody's own.

    Returns:
        Number of the cluster of each unit [models * n]. Clusters are ordered by their first unit, the first model's first.
    """
    total = len(similarity)
    size = total // models
    allowed = np.full(models, int((total - size) // models * budget))
    values = similarity.astype(np.float64, copy=True)
    np.fill_diagonal(values, -np.inf)
    model_of = np.arange(total) // size
    member = np.arange(total)
    for model in np.flatnonzero(allowed == 0):
        _forbid_within(values, model_of == model)
    best = values.max(1)
    for _ in range(total - size):
        i = int(best.argmax())
        j = int(values[i].argmax())
        i, j = min(i, j), max(i, j)
        _merge(values, best, i, j, shrink)
        member[member == j] = i
        if model_of[i] != model_of[j]:
            model_of[i] = _MIXED
        elif model_of[i] != _MIXED:
            allowed[model_of[i]] -= 1
            if allowed[model_of[i]] == 0:
                _forbid_within(values, model_of == model_of[i])
                best = values.max(1)
    return np.unique(member, return_inverse=True)[1]


def _forbid_within(values: np.ndarray, rows: np.ndarray) -> None:
    values[np.ix_(rows, rows)] = -np.inf


def _merge(values: np.ndarray, best: np.ndarray, i: int, j: int, shrink: float) -> None:
    """Merge cluster j into i, in place: a cluster is as similar as its least similar unit, and a little less."""
    merged = np.minimum(values[i], values[j])
    # A factor below 1 would make negative similarities larger.
    merged = np.where(merged > 0, merged * shrink, merged * (2 - shrink))
    before = values[:, [i, j]].max(1)
    values[i], values[:, i] = merged, merged
    values[j], values[:, j] = -np.inf, -np.inf
    values[i, i] = -np.inf
    stale = np.flatnonzero(before >= best)
    best[stale] = values[stale].max(1)
    best[[i, j]] = values[i].max(), -np.inf


def memberships(cluster: np.ndarray, models: int) -> list[torch.Tensor]:
    """0/1 matrices [unit, cluster] of each model: what a consumer's columns are summed by (`unmerge`)."""
    size = len(cluster) // models
    matrices = torch.nn.functional.one_hot(torch.from_numpy(cluster), size).float()
    return list(matrices.split(size))
