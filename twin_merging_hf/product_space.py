"""
The split of LoRA experts in product space: shared tensor and deltas of one parameter, deltas as products where possible.

lora_t - lora_shared is a sum of products, and stays one: factors side by side, never A or B alone (Twin-Merging, appendix A,
has the equation for products; what is done to A and B apart depends on the arbitrary basis in which they were trained).
"""

import torch

from twin_merging_hf.modeling.deltas_twin_merging import is_vector

from .adapted import AdaptedCheckpoint
from .checkpoints import Checkpoint
from .low_rank import Delta, LowRank, combine
from .preflight import Inputs
from .shapes import matrix_shape
from .shared_merge import merge_settings


def product_deltas(inputs: Inputs, name: str) -> tuple[torch.Tensor, list[Delta]] | None:
    """
    Shared tensor, in the recipe's type of computing, and each expert's delta from it; None where that takes dense tensors.

    Products remain where the shared model is the base (for every LoRA expert), and where it is the mean or the task
    arithmetic of LoRA experts alone. Everything else (TIES, DARE, a mean with full checkpoints) mixes entries, not products.
    """
    base = inputs.base
    if base is None or name not in base.places:
        return None
    stored = base.tensor(name)
    if not stored.is_floating_point() or not any(isinstance(expert, AdaptedCheckpoint) for expert in inputs.experts):
        return None
    compute = stored.to(getattr(torch, inputs.recipe.dtype))
    if inputs.shared is base:
        return compute, [_from_base(expert, name, stored) for expert in inputs.experts]
    shares = merge_shares(inputs)
    if shares is None:
        return None
    shape = torch.Size(matrix_shape(stored.shape))
    products = [expert.low_rank(name) for expert in inputs.experts if isinstance(expert, AdaptedCheckpoint)]
    terms = [(share, product) for share, product in zip(shares, products, strict=True) if product is not None]
    if not terms:
        return compute, [_nothing(stored) for _ in products]
    shared = compute + combine(terms, shape).dense(compute.dtype).reshape(stored.shape)
    return shared, [_minus_mean(t, products, shares, shape) for t in range(len(products))]


def merge_shares(inputs: Inputs) -> list[float] | None:
    """c_i such that the shared model is base + sum_i c_i lora_i; None where it is not."""
    recipe = inputs.recipe
    if inputs.shared is not None or not all(isinstance(expert, AdaptedCheckpoint) for expert in inputs.experts):
        return None
    settings = merge_settings(recipe)
    total = sum(settings.weights)
    if recipe.merge_method == "linear" and settings.normalize:
        return [weight / total for weight in settings.weights]
    if recipe.merge_method == "task_arithmetic":
        scaling = settings.scaling / total if settings.normalize else settings.scaling
        return [scaling * weight for weight in settings.weights]
    return None


def rank_bounds(inputs: Inputs, name: str) -> list[int] | None:
    """The most that the rank of each expert's delta can be, from shapes alone; None where deltas are dense."""
    base = inputs.base
    if base is None or not any(isinstance(expert, AdaptedCheckpoint) for expert in inputs.experts):
        return None
    by_reference, shares = inputs.shared is base, merge_shares(inputs)
    if not by_reference and shares is None:
        return None
    full = min(matrix_shape(base.shape(name)))
    own = [expert.rank_of(name) if isinstance(expert, AdaptedCheckpoint) else full for expert in inputs.experts]
    if by_reference:
        return [min(rank, full) for rank in own]
    return [min(sum(own), full)] * len(own)


def _from_base(expert: Checkpoint, name: str, stored: torch.Tensor) -> Delta:
    """What an expert changed, from the base."""
    if not isinstance(expert, AdaptedCheckpoint):
        return expert.tensor(name).to(torch.float32) - stored.to(torch.float32)
    return expert.low_rank(name) or _nothing(stored)


def _minus_mean(t: int, products: list[LowRank | None], shares: list[float], shape: torch.Size) -> LowRank:
    """lora_t - sum_i c_i lora_i; each adapter once, so that what cancels is gone and not a small rest."""
    coefficients = [(1.0 if i == t else 0.0) - share for i, share in enumerate(shares)]
    return combine([(c, p) for c, p in zip(coefficients, products, strict=True) if p is not None], shape)


def _nothing(stored: torch.Tensor) -> Delta:
    """A delta of zero: of a vector as itself, of a matrix as a product of no directions."""
    if is_vector(stored.shape):
        return torch.zeros(stored.shape)
    return combine([], torch.Size(matrix_shape(stored.shape)))
