"""Static merges of one parameter: how the shared model is made."""

from .methods import MERGE_METHODS, linear, task_arithmetic


__all__ = ["MERGE_METHODS", "linear", "task_arithmetic"]
