"""
The table of merge methods.

Each takes the experts' tensors stacked as [expert, *shape], the base's tensor (or None) and `MergeSettings`, and
returns the shared tensor. `least_squares` is among the defaults alone: it fits all tensors together (`fitted_merge`).
"""

from collections.abc import Callable

import torch

from .dare import dare_linear, dare_ties
from .settings import MergeSettings, MethodDefaults
from .sums import linear, task_arithmetic
from .ties import ties
from .tsv import tsv_m


MERGE_METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor | None, MergeSettings], torch.Tensor]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "tsv_m": tsv_m,
}

WHOLE_MATRICES = ("tsv_m",)
"""Methods that look at a matrix as a whole; all others merge each entry by itself, and so in pieces."""

# Task arithmetic: 0.3 as in Twin-Merging. TIES: lambda 1, top 20 % (its section 5 without validation data). DARE: its
# merges are task arithmetic's and TIES' own, its authors' code drops a tenth. TSV-M: lambda 1 (no tuning needed).
DEFAULTS: dict[str, MethodDefaults] = {
    "linear": MethodDefaults(needs_base=False, scaling=None, density=None, normalize=True),
    "task_arithmetic": MethodDefaults(needs_base=True, scaling=0.3, density=None, normalize=False),
    "ties": MethodDefaults(needs_base=True, scaling=1.0, density=0.2, normalize=True),
    "dare_linear": MethodDefaults(needs_base=True, scaling=0.3, density=0.9, normalize=False),
    "dare_ties": MethodDefaults(needs_base=True, scaling=1.0, density=0.9, normalize=True),
    "tsv_m": MethodDefaults(needs_base=True, scaling=1.0, density=None, normalize=None),
    "least_squares": MethodDefaults(needs_base=False, scaling=None, density=None, normalize=None),
}
