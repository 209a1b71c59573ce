"""Static merges of one parameter: how the shared model is made."""

from .dare import dare_linear, dare_ties
from .methods import DEFAULTS, MERGE_METHODS, WHOLE_MATRICES
from .selection import kth_largest_magnitude, trim_thresholds
from .settings import PIECE, MergeSettings, MethodDefaults, settings_for
from .sums import linear, task_arithmetic
from .ties import ties
from .tsv import tsv_m


__all__ = [
    "DEFAULTS",
    "MERGE_METHODS",
    "PIECE",
    "WHOLE_MATRICES",
    "MergeSettings",
    "MethodDefaults",
    "dare_linear",
    "dare_ties",
    "kth_largest_magnitude",
    "linear",
    "settings_for",
    "task_arithmetic",
    "ties",
    "trim_thresholds",
    "tsv_m",
]
