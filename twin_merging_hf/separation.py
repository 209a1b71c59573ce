"""
The split of Twin-Merging: experts -> shared tensors + exclusive deltas, one tensor at a time (section 4.1, 4.2).

Tensors are split by several workers; each has one shared tensor and one expert's delta of it in memory, however many
experts there are, and what is done goes to a journal on disk where there is one. Deltas of LoRA experts stay products
where the merge allows. A budget takes two passes: one for the shared tensors and all singular values, one that truncates
to the ranks that the budget gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from twin_merging_hf.modeling.deltas_twin_merging import is_vector
from twin_merging_hf.modeling.factors_twin_merging import INTEGER_BITS

from .artifact import exact_key
from .budget import Candidate, allocate
from .checkpoints import Checkpoint
from .compression import FIRST_CAP, Spectrum, rank_for_energy, spectrum
from .errors import TwinMergingError
from .exclusive import Stored, direction_bytes, shown, store_entries, store_factors
from .journal import Journal
from .late import WHY
from .low_rank import Delta, LowRank, Remade, energy_of
from .preflight import Inputs, uncovered
from .product_space import product_deltas, rank_bounds
from .recipe import Recipe
from .shapes import as_matrix, matrix_shape
from .shared_merge import merge_tensor, prepare_merge
from .workers import each


@dataclass
class Separation:
    """
    Result of the split.

    state: tensors of the artifact by state-dict key (`shared.*`, `deltas.*`).
    ranks, exact, sparse: as in the config.
    coverage: what became of each tensor: treatment, energy kept, bytes.
    energy, kept, lost: squared Frobenius norms over all tensors and experts: of the deltas, of what their truncation keeps,
        and of the deltas minus what is stored (excluded tensors included).
    spectra: each expert's singular values, by tensor, where a budget has still to choose the ranks.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    sparse: dict[str, list[int]] = field(default_factory=dict)
    coverage: dict[str, dict] = field(default_factory=dict)
    energy: float = 0.0
    kept: float = 0.0
    lost: float = 0.0
    spectra: dict[str, list[Spectrum]] = field(default_factory=dict)

    def take_in(self, part: "Separation") -> None:
        """Add what another split holds, of other tensors or of what is still open here."""
        self.exact += part.exact
        self.state.update(part.state)
        self.ranks.update(part.ranks)
        self.sparse.update(part.sparse)
        self.coverage.update(part.coverage)
        self.spectra.update(part.spectra)
        self.energy += part.energy
        self.kept += part.kept
        self.lost += part.lost

    @property
    def delta_bytes(self) -> int:
        return sum(tensor.nbytes for key, tensor in self.state.items() if key.startswith("deltas."))

    @property
    def shared_bytes(self) -> int:
        """Bytes of the shared backbone (no heads)."""
        return sum(self.state[f"shared.{name}"].nbytes for name in self.coverage if f"shared.{name}" in self.state)

    def summary(self) -> dict:
        """Energy kept, relative error and bytes of all deltas together."""
        whole = self.energy or 1.0
        return {
            "energy_kept": round(self.kept / whole, 6) if self.energy else 1.0,
            "relative_error": round((max(self.lost, 0.0) / whole) ** 0.5, 6),
            "bytes": self.delta_bytes,
        }


def separate(
    inputs: Inputs,
    tick: Callable[[str], None] = lambda name: None,
    ranks: Mapping[str, list[int]] | None = None,
    journal: Journal | None = None,
    workers: int | None = None,
) -> Separation:
    """
    Merge all backbone tensors and compress what each expert has beyond the shared model; heads are copied exactly.

    Args:
        tick: called with the name of each tensor that is done.
        ranks: of each expert's factors, by tensor, where they are decided already; they come before the recipe's.
        journal: takes the tensors, and gives those that an earlier run has left; without one, they are in memory.
        workers: tensors that are worked on at a time; None: one for each core. The result does not depend on it.

    Raises:
        TwinMergingError: a non-zero delta that no rule can apply, with the `exclude` line that would drop it; a budget
            that does not even hold the vectors.
    """
    first = inputs.experts[0]
    names = list(first.backbone)
    prepare_merge(inputs)
    without_rule = frozenset(uncovered(first, names))
    split = partial(_split_tensor, inputs=inputs, without_rule=without_rule, ranks=ranks or {})
    result = Separation()
    for part in _parts("split", split, names, inputs, journal, workers, tick):
        result.take_in(part)
    if result.spectra:
        _spend_budget(result, inputs, journal, workers)
    _copy_heads(result, inputs, model_dtype(inputs))
    return result


def _parts(
    step: str,
    make: Callable[[str], Separation],
    names: Sequence[str],
    inputs: Inputs,
    journal: Journal | None,
    workers: int | None,
    tick: Callable[[str], Any] = lambda name: None,
) -> list[Separation]:
    """What `make` gives for each tensor; with a journal it is made only where that lacks it, and lies there afterwards."""
    backbone = inputs.experts[0].backbone
    numbers = {name: number for number, name in enumerate(backbone)}

    def part(name: str) -> Separation:
        if journal is None:
            return make(name)
        key = f"{step}-{numbers[name]:05d}"
        if (found := journal.read(key)) is None:
            journal.write(key, *_written(make(name)))
            found = journal.read(key)
            assert found is not None
        return _read(*found)

    return each(part, names, workers, lambda name: backbone[name].numel(), tick)


def _written(part: Separation) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A part as tensors and as what JSON can hold."""
    tensors = {f"state.{key}": tensor for key, tensor in part.state.items()}
    spectra = {}
    for name, known in part.spectra.items():
        tensors |= {f"spectrum.{t}": each.squares for t, each in enumerate(known)}
        spectra[name] = [(each.total, each.complete) for each in known]
    rest = {key: value for key, value in vars(part).items() if key not in ("state", "spectra")}
    return tensors, {**rest, "spectra": spectra}


def _read(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> Separation:
    """The part that `_written` took apart."""
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    spectra = {
        name: [Spectrum(tensors[f"spectrum.{t}"], *known) for t, known in enumerate(all_known)]
        for name, all_known in record["spectra"].items()
    }
    return Separation(**{**record, "state": state, "spectra": spectra})


def _split_tensor(
    name: str, inputs: Inputs, without_rule: frozenset[str], ranks: Mapping[str, list[int]]
) -> Separation:
    """The split of one backbone tensor; with a budget, the singular values in place of the factors."""
    recipe, dtype = inputs.recipe, model_dtype(inputs)
    result = Separation()
    if not inputs.experts[0].dtype(name).is_floating_point:
        result.state[f"shared.{name}"] = _equal_integers(name, inputs)
        result.coverage[name] = {"treatment": "equal"}
        return result
    shared, deltas = _split(name, inputs, dtype)
    result.state[f"shared.{name}"] = shared
    energies = [energy_of(delta) for delta in deltas]
    if not _needs_compression(result, name, deltas, energies, name in without_rule, inputs):
        return result
    if name in ranks:
        _store(result, name, deltas, inputs, ranks[name])
    elif recipe.exclusive.budget is not None:
        seeds = _seeds(recipe, name)
        result.spectra[name] = [spectrum(_matrix(deltas[t]), seed) for t, seed in enumerate(seeds)]
        result.coverage[name] = {}  # keeps the order of the report; filled when the ranks are chosen
    else:
        _store(result, name, deltas, inputs, _ranks(name, deltas, energies, inputs))
    return result


def _split(
    name: str, inputs: Inputs, dtype: torch.dtype, shared: torch.Tensor | None = None
) -> tuple[torch.Tensor, Sequence[Delta]]:
    """Shared tensor (the given one, if any) and deltas of one parameter; those of LoRA experts as products if possible."""
    products = product_deltas(inputs, name)
    if products is not None:
        return products[0].to(dtype).contiguous(), products[1]
    if shared is None:
        shared = _shared_tensor(name, inputs, dtype)
    return shared, Remade(len(inputs.experts), lambda t: _delta(inputs.experts[t].tensor(name), shared))


def _delta(expert: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    if expert.dtype == torch.float32:
        return expert - shared.to(torch.float32)
    return expert.to(torch.float32).sub_(shared)  # in place, for there may be no room for another one


def _matrix(delta: Delta) -> Delta:
    return delta if isinstance(delta, LowRank) else as_matrix(delta)


def _dense(matrix: Delta) -> torch.Tensor:
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def _equal_integers(name: str, inputs: Inputs) -> torch.Tensor:
    tensors = [checkpoint.tensor(name) for checkpoint in inputs.experts]
    if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
        raise TwinMergingError(f"tensor {name!r} holds integers that differ between experts; that cannot be merged")
    return tensors[0]


def _seeds(recipe: Recipe, name: str) -> list[str]:
    return [f"{recipe.seed}:{expert}:{name}" for expert in recipe.names]


def model_dtype(inputs: Inputs) -> torch.dtype:
    """Type of the artifact: the recipe's `out_dtype`, else that of the first expert's weights."""
    if inputs.recipe.out_dtype:
        return getattr(torch, inputs.recipe.out_dtype)
    first = inputs.experts[0]
    return next(t for t in (first.dtype(name) for name in first.backbone) if t.is_floating_point)


def factor_dtype(inputs: Inputs) -> str:
    """
    Storage type of the factors: the recipe's; of floats the model's own where that is as narrow (loading casts to it).
    """
    wanted, model = inputs.recipe.exclusive.dtype, model_dtype(inputs)
    if wanted in INTEGER_BITS or getattr(torch, wanted).itemsize < model.itemsize:
        return wanted
    return str(model).removeprefix("torch.")


@dataclass(frozen=True)
class PlannedBytes:
    """Bytes that a split will need; `note` says so where `deltas` is only an estimate."""

    shared: int
    deltas: int
    note: str | None


def planned_bytes(inputs: Inputs) -> PlannedBytes:
    """Bytes of the shared tensors and the deltas, from shapes alone."""
    recipe, dtype, storage = inputs.recipe, model_dtype(inputs), factor_dtype(inputs)
    how, experts = recipe.exclusive, len(recipe.experts)
    shared = deltas = 0
    for name, shape in inputs.experts[0].backbone.items():
        shared += shape.numel() * dtype.itemsize
        if not inputs.gets_delta(name):
            continue
        if is_vector(shape):
            deltas += experts * shape.numel() * dtype.itemsize
        elif how.method != "svd":
            count = max(1, round((how.ratio or 0) * shape.numel()))
            deltas += experts * count * (getattr(torch, storage).itemsize + torch.int32.itemsize)
        else:
            m, n = matrix_shape(shape)
            rank = min(m, n) if how.energy or how.budget else how.rank_of(m, n)
            ranks = [min(rank, bound) for bound in rank_bounds(inputs, name) or [rank] * experts]
            deltas += sum(ranks) * direction_bytes(m, n, storage, dtype)
    if how.budget is not None:
        deltas = min(deltas, int(how.budget * shared))
        return PlannedBytes(shared, deltas, "`exclusive.budget`: the ranks are decided in the build, within the budget")
    if how.energy is not None:
        return PlannedBytes(
            shared, deltas, "`exclusive.energy`: the ranks are decided in the build; the size is that of full rank"
        )
    if how.method == "bernoulli":
        return PlannedBytes(
            shared, deltas, "`bernoulli`: the number of entries is random; the size is the expected one"
        )
    return PlannedBytes(shared, deltas, None)


def _shared_tensor(name: str, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    if inputs.shared is not None:
        return inputs.shared.tensor(name).to(dtype)
    return merge_tensor(inputs, name).to(dtype).contiguous()


def _needs_compression(
    result: Separation, name: str, deltas: Sequence[Delta], energies: list[float], no_rule: bool, inputs: Inputs
) -> bool:
    """Settle tensors that are equal, excluded or vectors; true for those whose deltas are to be compressed."""
    energy, listed = sum(energies), [shown(e) for e in energies]
    if energy == 0:
        result.coverage[name] = {"treatment": "equal"}
        return False
    result.energy += energy
    if not inputs.gets_delta(name):
        why = {"why": WHY} if name in inputs.before_routing else {}
        result.coverage[name] = {"treatment": "excluded", "dropped_energy": sum(listed), "energy": listed, **why}
        result.lost += energy
        return False
    if no_rule:
        raise TwinMergingError(
            f"tensor {name!r} differs between experts, but no rule can apply a delta of it per row; to drop what the "
            f"experts have there on purpose, add to the recipe: exclude: ['{name}']"
        )
    if not is_vector(inputs.experts[0].backbone[name]):
        return True
    vectors: list[Any] = list(deltas)
    result.exact.append(name)
    # Vectors weigh nothing and norms react to rounding, so they keep the model's own precision.
    result.state[exact_key(name)] = torch.stack(vectors).to(model_dtype(inputs))
    result.coverage[name] = {"treatment": "exact", "energy": listed, "bytes": result.state[exact_key(name)].nbytes}
    result.kept += energy
    return False


def _ranks(name: str, deltas: Sequence[Delta], energies: list[float], inputs: Inputs) -> list[int]:
    """Rank of each expert's factors of one matrix, by the recipe's `energy`, `rank` or `ratio`; none for sparse deltas."""
    how = inputs.recipe.exclusive
    if how.method != "svd":
        return []
    if how.energy is not None:
        seeds = _seeds(inputs.recipe, name)
        return [rank_for_energy(_matrix(delta), how.energy, seed) for delta, seed in zip(deltas, seeds, strict=True)]
    rank = how.rank_of(*matrix_shape(inputs.experts[0].backbone[name]))
    return [rank if energy > 0 else 0 for energy in energies]


def _store(result: Separation, name: str, deltas: Sequence[Delta], inputs: Inputs, ranks: list[int]) -> None:
    """Compress the deltas of one matrix by the recipe's method, by SVD to `ranks`."""
    how, seeds = inputs.recipe.exclusive, _seeds(inputs.recipe, name)
    dtype, storage = model_dtype(inputs), factor_dtype(inputs)
    matrices = Remade(len(deltas), lambda t: _matrix(deltas[t]))
    if how.method != "svd":
        entries: Sequence[Any] = Remade(len(deltas), lambda t: _dense(matrices[t]))
        stored = store_entries(name, entries, how.method, how.ratio or 0, seeds, storage)
        _add(result, name, stored, result.sparse, "sparse", "entries")
        return
    stored = store_factors(name, matrices, ranks, seeds, storage, dtype)
    _add(result, name, stored, result.ranks, "factored", "ranks")


def _add(result: Separation, name: str, stored: Stored, sizes: dict, treatment: str, unit: str) -> None:
    result.kept += sum(stored.kept)
    result.lost += sum(stored.lost)
    if any(stored.sizes):
        result.state.update(stored.tensors)
        sizes[name] = stored.sizes
    else:  # nothing was worth its bytes: the shared model's alone, and reported
        treatment = "dropped"
    result.coverage[name] = stored.coverage(treatment, unit)
    if treatment == "dropped":
        result.coverage[name]["dropped_energy"] = sum(result.coverage[name]["energy"])


def _spend_budget(result: Separation, inputs: Inputs, journal: Journal | None, workers: int | None) -> None:
    """Second pass of a budget: choose the ranks, read the experts again, truncate."""
    budget = inputs.recipe.exclusive.budget or 0
    limit, vectors = int(budget * result.shared_bytes), result.delta_bytes
    if vectors > limit:
        raise TwinMergingError(
            f"`exclusive.budget` is {budget}: {limit} bytes, but the vectors' deltas alone, which are kept exactly, take "
            f"{vectors}; give at least {vectors / result.shared_bytes:.4f} (or `exclude` vectors)"
        )
    ranks = _budget_ranks(result, limit - vectors, inputs)
    result.spectra = {}

    def truncated(name: str) -> Separation:
        part = Separation()
        deltas = _split(name, inputs, model_dtype(inputs), result.state[f"shared.{name}"])[1]
        _store(part, name, deltas, inputs, ranks[name])
        return part

    for part in _parts("truncate", truncated, list(ranks), inputs, journal, workers):
        result.take_in(part)


def _budget_ranks(result: Separation, limit: int, inputs: Inputs) -> dict[str, list[int]]:
    """Ranks by tensor and expert within `limit` bytes; where one takes all values known of a matrix, more are computed."""
    dtype, storage, spectra = model_dtype(inputs), factor_dtype(inputs), result.spectra
    places = [(name, t) for name in spectra for t in range(len(inputs.experts))]
    costs = {n: direction_bytes(*matrix_shape(result.state[f"shared.{n}"].shape), storage, dtype) for n in spectra}
    while True:
        candidates = [Candidate(spectra[name][t].squares, costs[name]) for name, t in places]
        ranks = allocate(candidates, limit)
        capped = [
            place
            for place, rank in zip(places, ranks, strict=True)
            if rank == len(spectra[place[0]][place[1]].squares) and not spectra[place[0]][place[1]].complete
        ]
        if not capped:
            break
        for name, t in capped:
            delta = _delta(inputs.experts[t].tensor(name), result.state[f"shared.{name}"])
            cap = max(FIRST_CAP, 4 * len(spectra[name][t].squares))
            spectra[name][t] = spectrum(as_matrix(delta), _seeds(inputs.recipe, name)[t], cap)
    chosen: dict[str, list[int]] = {name: [] for name in spectra}
    for (name, _), rank in zip(places, ranks, strict=True):
        chosen[name].append(rank)
    return chosen


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
