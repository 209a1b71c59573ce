"""
The split of Twin-Merging: experts -> shared tensors + exclusive deltas, one tensor at a time (section 4.1, 4.2).

Peak memory is one tensor of every expert, plus the result.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from twin_merging_hf.modeling.deltas_twin_merging import is_vector

from .artifact import exact_key, factor_keys
from .checkpoints import Checkpoint
from .compression import compress
from .errors import TwinMergingError
from .preflight import Inputs, uncovered
from .recipe import Recipe
from .shared_merge import merge_tensor


@dataclass
class Separation:
    """
    Result of the split.

    state: tensors of the artifact by state-dict key (`shared.*`, `deltas.*`).
    ranks, exact: as in the config.
    coverage: what became of each tensor: treatment, energy kept, bytes.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    coverage: dict[str, dict] = field(default_factory=dict)


def separate(inputs: Inputs, tick: Callable[[str], None] = lambda name: None) -> Separation:
    """
    Merge all backbone tensors and compress what each expert has beyond the shared model; heads are copied exactly.

    Raises:
        TwinMergingError: a non-zero delta that no rule can apply, with the `exclude` line that would drop it.
    """
    recipe, first = inputs.recipe, inputs.experts[0]
    names = list(first.backbone)
    not_covered = set(uncovered(first, names))
    dtypes = model_dtype(inputs), factor_dtype(inputs)
    result = Separation()
    for name in names:
        tick(name)
        experts = [checkpoint.tensor(name) for checkpoint in inputs.experts]
        shared = _shared_tensor(name, experts, inputs, dtypes[0])
        result.state[f"shared.{name}"] = shared
        if not shared.is_floating_point():
            if any(not torch.equal(expert, shared) for expert in experts):
                raise TwinMergingError(
                    f"tensor {name!r} holds integers that differ between experts; that cannot be merged"
                )
            result.coverage[name] = {"treatment": "equal"}
            continue
        deltas = [expert.to(torch.float32) - shared.to(torch.float32) for expert in experts]
        _add_deltas(result, name, deltas, name in not_covered, recipe, dtypes)
    _copy_heads(result, inputs, dtypes[0])
    return result


def model_dtype(inputs: Inputs) -> torch.dtype:
    """Type of the artifact: the recipe's `out_dtype`, else that of the first expert's weights."""
    if inputs.recipe.out_dtype:
        return getattr(torch, inputs.recipe.out_dtype)
    first = inputs.experts[0]
    return next(t for t in (first.tensor(name).dtype for name in first.backbone) if t.is_floating_point)


def factor_dtype(inputs: Inputs) -> torch.dtype:
    """Storage type of factors: the recipe's, or the model's own where that is as narrow (loading casts to it)."""
    wanted, model = getattr(torch, inputs.recipe.exclusive.dtype), model_dtype(inputs)
    return model if model.itemsize <= wanted.itemsize else wanted


def _shared_tensor(name: str, experts: list[torch.Tensor], inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    if not experts[0].is_floating_point():
        return experts[0]
    if inputs.shared is not None:
        return inputs.shared.tensor(name).to(dtype)
    return merge_tensor(inputs, name, experts=experts).to(dtype).contiguous()


def _add_deltas(
    result: Separation, name: str, deltas: list[torch.Tensor], no_rule: bool, recipe: Recipe, dtypes: tuple
) -> None:
    energy = sum(float(delta.double().pow(2).sum()) for delta in deltas)
    if energy == 0:
        result.coverage[name] = {"treatment": "equal"}
        return
    if not recipe.gets_delta(name):
        result.coverage[name] = {"treatment": "excluded", "dropped_energy": energy}
        return
    if no_rule:
        raise TwinMergingError(
            f"tensor {name!r} differs between experts, but no rule can apply a delta of it per row; to drop what the "
            f"experts have there on purpose, add to the recipe: exclude: ['{name}']"
        )
    if is_vector(deltas[0].shape):
        result.exact.append(name)
        # Vectors weigh nothing and norms react to rounding, so they keep the model's own precision.
        result.state[exact_key(name)] = torch.stack(deltas).to(dtypes[0])
        result.coverage[name] = {"treatment": "exact", "bytes": result.state[exact_key(name)].nbytes}
        return
    _add_factors(result, name, deltas, recipe, dtypes[1])


def _add_factors(result: Separation, name: str, deltas: list[torch.Tensor], recipe: Recipe, dtype: torch.dtype) -> None:
    matrices = [as_matrix(delta) for delta in deltas]
    rank = recipe.exclusive.rank_of(*matrices[0].shape)
    factors = []
    for expert, matrix in zip(recipe.names, matrices, strict=True):
        wanted = rank if bool(matrix.any()) else 0
        factors.append(compress(matrix, wanted, f"{recipe.seed}:{expert}:{name}"))
    up_key, down_key = factor_keys(name)
    result.state[up_key] = torch.cat([f.up for f in factors], dim=1).to(dtype).contiguous()
    result.state[down_key] = torch.cat([f.down for f in factors], dim=0).to(dtype).contiguous()
    result.ranks[name] = [f.up.shape[1] for f in factors]
    result.coverage[name] = {
        "treatment": "factored",
        "ranks": result.ranks[name],
        "energy_kept": [round(f.energy, 6) for f in factors],
        "bytes": result.state[up_key].nbytes + result.state[down_key].nbytes,
    }


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the matrix in which a delta is factored: tables lose their leading 1, kernels are flattened."""
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], shape[1:].numel())


def as_matrix(delta: torch.Tensor) -> torch.Tensor:
    """A parameter's delta as the matrix [m, n] of `matrix_shape`."""
    return delta.reshape(matrix_shape(delta.shape))


def _copy_heads(result: Separation, inputs: Inputs, dtype: torch.dtype) -> None:
    """Copy every expert's head tensors exactly."""
    for index, checkpoint in enumerate(inputs.experts):
        for name in checkpoint.head_tensors():
            module = next(head for head in checkpoint.head_modules if name.startswith(f"{head}."))
            rest = name.removeprefix(f"{module}.")
            key = f"shared.{module}.heads.{index}.{rest}"
            result.state[key] = checkpoint.tensor(name).to(dtype)
            result.coverage[f"{inputs.recipe.names[index]}:{name}"] = {
                "treatment": "head",
                "bytes": result.state[key].nbytes,
            }


def delta_from_base(checkpoint: Checkpoint, base: Checkpoint | None, state: dict, name: str) -> torch.Tensor:
    """What an expert changed in a matrix [m, n], float32: from the base if there is one, else from the shared model."""
    origin = base.tensor(name) if base is not None else state[f"shared.{name}"]
    return as_matrix(checkpoint.tensor(name).to(torch.float32) - origin.to(torch.float32))
