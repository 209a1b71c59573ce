"""
A shared model fitted layer by layer to what the experts compute: closed-form least squares on inputs, without labels.

After PLeaS (arXiv 2407.02447) and RegMean (arXiv 2212.09849): `fit_layers` takes stock models and batches of model inputs.
"""

from .layers import is_fitted, new_fit
from .normal_equations import ChannelEquations, NormalEquations
from .walk import FitReport, fit_layers


__all__ = ["ChannelEquations", "FitReport", "NormalEquations", "fit_layers", "is_fitted", "new_fit"]
