"""What merge methods are told, and which coefficients a method has."""

from dataclasses import dataclass

import torch


PIECE = 1 << 18
"""Entries that methods which look at each entry by itself merge at a time, so that T experts take T pieces of memory."""


@dataclass(frozen=True)
class MethodDefaults:
    """
    A method's coefficients where nobody gives others; None: it has no such coefficient.

    needs_base: it merges task vectors theta_t - theta_0, so there must be a theta_0.
    """

    needs_base: bool
    scaling: float | None
    density: float | None
    normalize: bool | None


@dataclass(frozen=True)
class MergeSettings:
    """
    Everything but tensors that a merge of one parameter depends on.

    weights: one coefficient a_t for each expert.
    scaling: lambda. density: the share of a task vector's entries that is kept.
    normalize: divide by the weights (see each method).
    names, seed, tensor: what the random masks of DARE are drawn from.
    start: entry of the tensor at which the piece begins that is merged, a multiple of `PIECE`; 0 for whole tensors.
    thresholds: for each expert, the smallest magnitude that TIES keeps (`trim_thresholds`).
    """

    weights: tuple[float, ...]
    scaling: float = 1.0
    density: float = 1.0
    normalize: bool = True
    names: tuple[str, ...] = ()
    seed: int = 0
    tensor: str = ""
    start: int = 0
    thresholds: tuple[float, ...] | None = None

    def weights_like(self, experts: torch.Tensor) -> torch.Tensor:
        """The weights as [expert, 1, ...], in the type and number of dimensions of experts [expert, *shape]."""
        weights = torch.tensor(self.weights, dtype=experts.dtype)
        return weights.reshape(-1, *([1] * (experts.dim() - 1)))


def settings_for(
    defaults: MethodDefaults,
    weights: tuple[float, ...],
    scaling: float | None = None,
    density: float | None = None,
    normalize: bool | None = None,
) -> MergeSettings:
    """Settings of a method: the values that are given, else its defaults; a coefficient it does not have is 1."""
    chosen_scaling = defaults.scaling if scaling is None else scaling
    chosen_density = defaults.density if density is None else density
    chosen_normalize = defaults.normalize if normalize is None else normalize
    return MergeSettings(
        weights,
        1.0 if defaults.scaling is None or chosen_scaling is None else chosen_scaling,
        1.0 if defaults.density is None or chosen_density is None else chosen_density,
        bool(defaults.normalize is not None and chosen_normalize),
    )


def task_vectors(experts: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """What each expert changed, theta_t - theta_0 [expert, *shape]. Raises ValueError without a base."""
    if base is None:
        raise ValueError("this merge method needs the base model's tensor")
    return experts - base
