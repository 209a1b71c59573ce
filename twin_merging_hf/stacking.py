"""
An artifact's tensors as stacks over experts: one expert is taken out or put in, every other byte stays as it is.

Stored tensors are cut and joined along the rank axis (or the expert axis) as they are, whatever their type: nothing is
multiplied out, widened or rounded.
"""

import copy
from dataclasses import dataclass, replace

import torch

from twin_merging_hf.modeling.deltas_twin_merging import delta_key

from .artifact import exact_key
from .errors import TwinMergingError
from .separation import Separation


# Which axis of a factored delta's stored tensors counts ranks.
_RANK_AXIS = {"up": 1, "down": 0, "scale": 0}


@dataclass(frozen=True)
class Stack:
    """
    All of an artifact but its router.

    entries: config entries of the experts, in order.
    head_modules, ranks, exact: as in the config.
    state: tensors by state-dict key (`shared.*`, `deltas.*`).
    coverage: what became of each tensor, as `tensors` in report.json.
    """

    entries: list[dict]
    head_modules: list[str]
    ranks: dict[str, list[int]]
    exact: list[str]
    state: dict[str, torch.Tensor]
    coverage: dict[str, dict]

    @property
    def names(self) -> list[str]:
        return [entry["name"] for entry in self.entries]


def without_expert(stack: Stack, position: int) -> Stack:
    """The stack without the expert at `position`; a delta that no other expert has goes altogether."""
    result = _copied(stack)
    name = stack.names[position]
    for tensor, ranks in stack.ranks.items():
        rest = [*ranks[:position], *ranks[position + 1 :]]
        start, stop = sum(ranks[:position]), sum(ranks[: position + 1])
        for key, axis in _factor_tensors(stack.state, tensor).items():
            value = result.state.pop(key)
            if any(rest):
                before, after = value.narrow(axis, 0, start), value.narrow(axis, stop, value.shape[axis] - stop)
                result.state[key] = torch.cat([before, after], dim=axis).contiguous()
        if any(rest):
            result.ranks[tensor] = rest
        else:
            del result.ranks[tensor]
    for tensor in stack.exact:
        value = stack.state[exact_key(tensor)]
        value = torch.cat([value[:position], value[position + 1 :]]).contiguous()
        result.state[exact_key(tensor)] = value
        if not bool(value.any()):
            del result.state[exact_key(tensor)]
            result.exact.remove(tensor)
    _move_heads(result.state, stack, {i: i - (i > position) for i in range(len(stack.entries)) if i != position})
    result.entries.pop(position)
    coverage = {key: value for key, value in stack.coverage.items() if not key.startswith(f"{name}:")}
    coverage = {key: _without_item(value, position, len(stack.entries)) for key, value in coverage.items()}
    return replace(result, coverage=_without_delta(result, coverage))


def with_expert(stack: Stack, separation: Separation, entry: dict, position: int) -> Stack:
    """
    The stack with one more expert at `position`.

    Args:
        separation: the new expert's alone, from the stack's shared model.
        entry: its config entry.
    """
    result = _copied(stack)
    count = len(stack.entries)
    for tensor in list(dict.fromkeys([*stack.ranks, *separation.ranks])):
        ranks = stack.ranks.get(tensor, [0] * count)
        result.ranks[tensor] = [*ranks[:position], *separation.ranks.get(tensor, [0]), *ranks[position:]]
        start = sum(ranks[:position])
        for key, axis in _factor_tensors(separation.state, tensor).items():
            new = separation.state[key]
            result.state[key] = _joined(stack.state.get(key), new, axis, start)
    for tensor in list(dict.fromkeys([*stack.exact, *separation.exact])):
        old, new = (part.state.get(exact_key(tensor)) for part in (stack, separation))
        if old is None:
            assert new is not None
            old = new.new_zeros(count, *new.shape[1:])
            result.exact.append(tensor)
        new = old.new_zeros(1, *old.shape[1:]) if new is None else new
        result.state[exact_key(tensor)] = _joined(old, new, 0, position)
    _move_heads(result.state, stack, {i: i + (i >= position) for i in range(count)})
    for module in stack.head_modules:
        own = f"shared.{module}.heads.0."
        for key in [key for key in separation.state if key.startswith(own)]:
            result.state[f"shared.{module}.heads.{position}.{key.removeprefix(own)}"] = separation.state[key]
    result.entries.insert(position, entry)
    coverage = {
        key: _with_item(stack.coverage.get(key), separation.coverage.get(key), position, count)
        for key in dict.fromkeys([*stack.coverage, *separation.coverage])
    }
    return replace(result, coverage=coverage)


def _copied(stack: Stack) -> Stack:
    return Stack(
        copy.deepcopy(stack.entries),
        list(stack.head_modules),
        dict(stack.ranks),
        list(stack.exact),
        dict(stack.state),
        {},
    )


def _factor_tensors(state: dict[str, torch.Tensor], tensor: str) -> dict[str, int]:
    """State-dict keys of a factored delta's stored tensors, with their rank axis."""
    prefix = f"deltas.{delta_key(tensor)}."
    found = {}
    for key in [key for key in state if key.startswith(prefix)]:
        part = key.removeprefix(prefix)
        if part not in _RANK_AXIS:
            raise TwinMergingError(
                f"the deltas of {tensor!r} are stored with {part!r}, which cannot be cut by expert; build the artifact again"
            )
        found[key] = _RANK_AXIS[part]
    return found


def _joined(old: torch.Tensor | None, new: torch.Tensor, axis: int, start: int) -> torch.Tensor:
    """Put `new` into `old` at index `start` of an axis; both keep their values, in the type of `old`."""
    if old is None:
        return new
    if old.is_floating_point() != new.is_floating_point():
        raise TwinMergingError("the new expert's deltas are stored in another form than the artifact's; build it again")
    parts = [old.narrow(axis, 0, start), new.to(old.dtype), old.narrow(axis, start, old.shape[axis] - start)]
    return torch.cat(parts, dim=axis).contiguous()


def _move_heads(state: dict[str, torch.Tensor], stack: Stack, places: dict[int, int]) -> None:
    """Renumber the experts' heads: old index -> new index; heads that `places` lacks go."""
    for module in stack.head_modules:
        prefix = f"shared.{module}.heads."
        moved = {}
        for key in [key for key in state if key.startswith(prefix)]:
            index, _, rest = key.removeprefix(prefix).partition(".")
            value = state.pop(key)
            if int(index) in places:
                moved[f"{prefix}{places[int(index)]}.{rest}"] = value
        state.update(moved)


def _without_item(entry: dict, position: int, count: int) -> dict:
    """A coverage entry without one expert's item in lists that have one for each."""
    return {
        key: [*value[:position], *value[position + 1 :]] if isinstance(value, list) and len(value) == count else value
        for key, value in entry.items()
    }


def _without_delta(stack: Stack, coverage: dict[str, dict]) -> dict[str, dict]:
    """Tensors whose deltas went are the same for all experts that are left."""
    gone = {
        key
        for key, entry in coverage.items()
        if (entry["treatment"] == "factored" and key not in stack.ranks)
        or (entry["treatment"] == "exact" and key not in stack.exact)
    }
    return {key: {"treatment": "equal"} if key in gone else entry for key, entry in coverage.items()}


def _with_item(old: dict | None, new: dict | None, position: int, count: int) -> dict:
    """A coverage entry with the new expert's item in lists that have one for each."""
    if old is None or new is None:
        return new or old or {}
    if old["treatment"] == new["treatment"] == "excluded":
        return {**old, "dropped_energy": old["dropped_energy"] + new["dropped_energy"]}
    if old["treatment"] == "equal" and new["treatment"] == "excluded":
        return new
    if new["treatment"] in ("equal", "excluded"):
        nothing = {"ranks": [0], "energy_kept": [1.0]}
        new = {key: nothing.get(key, [0]) for key, value in old.items() if isinstance(value, list)}
    elif old["treatment"] == "equal":
        nothing_yet = {"ranks": 0, "energy_kept": 1.0}
        lists = {key: [nothing_yet.get(key, 0)] * count for key, value in new.items() if isinstance(value, list)}
        old = {**new, **lists}
    merged = dict(old)
    if new["treatment"] in ("factored", "exact"):
        merged["treatment"] = new["treatment"]
    for key, value in old.items():
        if isinstance(value, list) and len(value) == count and len(new.get(key, [])) == 1:
            merged[key] = [*value[:position], *new[key], *value[position:]]
    return merged


def trimmed(separation: Separation, ranks: dict[str, int]) -> Separation:
    """One expert's separation, cut to its leading directions: at most `ranks[tensor]` of each factored tensor."""
    state, kept, coverage = dict(separation.state), dict(separation.ranks), dict(separation.coverage)
    for tensor, (rank,) in separation.ranks.items():
        short = min(rank, ranks[tensor])
        keys = _factor_tensors(separation.state, tensor)
        energies = torch.ones(rank, dtype=torch.float64)
        for key, axis in keys.items():
            squares = separation.state[key].double().pow(2)
            energies *= squares.sum(dim=1 - axis) if squares.dim() == 2 else squares
            state[key] = separation.state[key].narrow(axis, 0, short).contiguous()
        # Directions of a truncated SVD are orthogonal, so their energies add up.
        share = float(energies[:short].sum() / energies.sum()) if rank else 1.0
        kept[tensor] = [short]
        entry = coverage[tensor]
        coverage[tensor] = {
            **entry,
            "ranks": [short],
            "energy_kept": [round(value * share, 6) for value in entry["energy_kept"]],
        }
    return replace(separation, state=state, ranks=kept, coverage=coverage)
