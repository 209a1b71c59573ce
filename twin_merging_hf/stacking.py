"""
An artifact's tensors as stacks over experts: one expert is taken out or put in, every other byte stays as it is.

Stored tensors are cut and joined along the rank axis (of sparse deltas, the entries; of vectors, the experts) as they
are, whatever their type: nothing is multiplied out, unpacked, widened or rounded. int4 packs along the other axis.
"""

import copy
from dataclasses import dataclass, field, replace

import torch

from twin_merging_hf.modeling.deltas_twin_merging import delta_key

from .artifact import exact_key
from .coverage import with_item, without_item
from .errors import TwinMergingError
from .separation import Separation


# Which axis of a delta's stored tensors counts ranks, or entries.
_AXIS = {"up": 1, "down": 0, "scale": 0, "values": 0, "indices": 0}


@dataclass(frozen=True)
class Stack:
    """
    All of an artifact but its router.

    entries: config entries of the experts, in order.
    head_modules, ranks, exact, sparse: as in the config.
    state: tensors by state-dict key (`shared.*`, `deltas.*`).
    coverage: what became of each tensor, as `tensors` in report.json.
    """

    entries: list[dict]
    head_modules: list[str]
    ranks: dict[str, list[int]]
    exact: list[str]
    state: dict[str, torch.Tensor]
    coverage: dict[str, dict]
    sparse: dict[str, list[int]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [entry["name"] for entry in self.entries]


def without_expert(stack: Stack, position: int) -> Stack:
    """The stack without the expert at `position`; a delta that no other expert has goes altogether."""
    result = _copied(stack)
    name = stack.names[position]
    for sizes, kept in ((stack.ranks, result.ranks), (stack.sparse, result.sparse)):
        for tensor, counts in sizes.items():
            rest = [*counts[:position], *counts[position + 1 :]]
            start, stop = sum(counts[:position]), sum(counts[: position + 1])
            for key, axis in _stored_tensors(stack.state, tensor).items():
                value = result.state.pop(key)
                if any(rest):
                    before, after = value.narrow(axis, 0, start), value.narrow(axis, stop, value.shape[axis] - stop)
                    result.state[key] = torch.cat([before, after], dim=axis).contiguous()
            if any(rest):
                kept[tensor] = rest
            else:
                del kept[tensor]
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
    coverage = {key: without_item(value, position, len(stack.entries)) for key, value in coverage.items()}
    return replace(result, coverage=coverage)


def with_expert(stack: Stack, separation: Separation, entry: dict, position: int) -> Stack:
    """
    The stack with one more expert at `position`.

    Args:
        separation: the new expert's alone, from the stack's shared model.
        entry: its config entry.

    Raises:
        TwinMergingError: its deltas are stored in another form than the stack's.
    """
    result = _copied(stack)
    count = len(stack.entries)
    if (stack.ranks and separation.sparse) or (stack.sparse and separation.ranks):
        raise TwinMergingError(
            f"the artifact's deltas are stored as {'factors' if stack.ranks else 'single entries'}, those of "
            f"{entry['name']!r} by this recipe's `exclusive.method` are not; give a recipe with the artifact's method"
        )
    for old, new, joined in (
        (stack.ranks, separation.ranks, result.ranks),
        (stack.sparse, separation.sparse, result.sparse),
    ):
        for tensor in dict.fromkeys([*old, *new]):
            counts = old.get(tensor, [0] * count)
            joined[tensor] = [*counts[:position], *new.get(tensor, [0]), *counts[position:]]
            start = sum(counts[:position])
            for key, axis in _stored_tensors(separation.state, tensor).items():
                result.state[key] = _joined(stack.state.get(key), separation.state[key], axis, start)
    for tensor in list(dict.fromkeys([*stack.exact, *separation.exact])):
        before, own = (part.state.get(exact_key(tensor)) for part in (stack, separation))
        if before is None:
            assert own is not None
            before = own.new_zeros(count, *own.shape[1:])
            result.exact.append(tensor)
        own = before.new_zeros(1, *before.shape[1:]) if own is None else own
        result.state[exact_key(tensor)] = _joined(before, own, 0, position)
    _move_heads(result.state, stack, {i: i + (i >= position) for i in range(count)})
    for module in stack.head_modules:
        prefix = f"shared.{module}.heads.0."
        for key in [key for key in separation.state if key.startswith(prefix)]:
            result.state[f"shared.{module}.heads.{position}.{key.removeprefix(prefix)}"] = separation.state[key]
    result.entries.insert(position, entry)
    coverage = {
        key: with_item(stack.coverage.get(key), separation.coverage.get(key), position, count)
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
        dict(stack.sparse),
    )


def _stored_tensors(state: dict[str, torch.Tensor], tensor: str) -> dict[str, int]:
    """State-dict keys of a delta's stored tensors, with the axis that counts ranks or entries."""
    prefix = f"deltas.{delta_key(tensor)}."
    found = {}
    for key in [key for key in state if key.startswith(prefix)]:
        part = key.removeprefix(prefix)
        if part not in _AXIS:
            raise TwinMergingError(
                f"the deltas of {tensor!r} are stored with {part!r}, which cannot be cut by expert; build the artifact again"
            )
        found[key] = _AXIS[part]
    return found


def _joined(old: torch.Tensor | None, new: torch.Tensor, axis: int, start: int) -> torch.Tensor:
    """Put `new` into `old` at index `start` of an axis; both keep their values, in the type of `old`."""
    if old is None:
        return new
    floats = old.is_floating_point() and new.is_floating_point()
    if not floats and old.dtype != new.dtype:
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
