"""
What may be permuted in an architecture without changing its function: a specification as frozen data.

A *site* is an index set of hidden units, such as the residual stream or one layer's feed-forward units. A *rule* says, for
each axis of a tensor, which site indexes it:

- `None`: the axis is never permuted (vocabulary, labels, pixels, kernel positions);
- `"+res"`: the tensor produces the site's units (rows of the layer before, biases, columns of an embedding);
- `"-res"`: it consumes them;
- `"*res"`: it scales or describes each unit by itself (gains of norms, running statistics, a gate): it moves with the units,
  but has no part in their signs;
- `"+h.{i}/qk.{i}"`: row-major (head, dimension), where `qk.{i}` has `h.{i}` as its parent: a permutation for each head;
- `"+h.{i}/qk.{i} | h.{i}/qk.{i} | h.{i}/vo.{i}"`: slabs side by side on one axis.

`{i}` stands for every layer, `{a,b}` for each of the names. A rule for `x.weight` holds for `x.bias`, `x.running_mean` and
`x.running_var` too, which lie along the axis that produces (`None` where the weight produces nothing).
"""

import itertools
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch


_BESIDE_WEIGHT = ("bias", "running_mean", "running_var")
Path = tuple[str, ...]
"""Sites along one axis, outermost first: the root, then sites whose parent is the root."""


@dataclass(frozen=True)
class Site:
    """
    Units that are permuted together.

    parent: the site for each unit of which there is a permutation of its own (heads, groups of a GroupNorm).
    fixed: only the identity is legal, as for query and key dimensions under rotary positions.
    signed: a unit's sign may be flipped too.
    zips: merging duplicate units is exact here (nothing normalises over these units, nothing multiplies two of them);
        `why_not` says what is in the way.
    """

    name: str
    size: int
    parent: str | None = None
    fixed: bool = False
    signed: bool = False
    zips: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Rule:
    """One expression for each axis of the tensors that a template names; `compared`: whether they count in similarities."""

    tensors: str
    axes: tuple[str | None, ...]
    compared: bool = True


@dataclass(frozen=True)
class Hook:
    """Where a site's activations are read: at the input (`in`) or output (`out`) of a module, last or channel dimension."""

    side: str
    module: str
    path: str


@dataclass(frozen=True)
class Spec:
    """The permutations that leave an architecture's function unchanged; `layers`: what `{i}` counts."""

    sites: tuple[Site, ...]
    rules: tuple[Rule, ...]
    hooks: tuple[Hook, ...] = ()
    layers: int = 0


def rule(tensors: str, *axes: str | None, compared: bool = True) -> Rule:
    """A `Rule`, shorter."""
    return Rule(tensors, axes, compared)


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor: its role (`+`, `-`, `*`) and the sites of each of its equally placed slabs."""

    role: str
    slabs: tuple[Path, ...]


@dataclass(frozen=True)
class Entry:
    """A slab of a tensor's axis that belongs to a block: rows `start` to `start + length` along `dim`."""

    tensor: str
    dim: int
    start: int
    length: int
    path: Path
    role: str


@dataclass(frozen=True)
class Layout:
    """A specification, worked out for one model: every tensor's axes, every block's tensors."""

    sites: dict[str, Site]
    axes: dict[str, tuple[Axis | None, ...]]
    entries: dict[str, list[Entry]]
    """By root site: where it occurs in tensors that are compared, tied ones once."""
    hooks: list[Hook]
    slabs: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Paths side by side along a hook's features, by their text."""

    @property
    def roots(self) -> list[str]:
        """Sites without parent; each is a *block* with its children, matched as a whole."""
        return [name for name, site in self.sites.items() if site.parent is None]

    def children(self, root: str) -> list[str]:
        """Sites that have a permutation for each unit of a root."""
        return [name for name, site in self.sites.items() if site.parent == root]

    def shape(self, path: Path) -> tuple[int, ...]:
        """Sizes along a path."""
        return tuple(self.sites[name].size for name in path)

    def roots_of(self, tensor: str, without: int) -> set[str]:
        """Root sites on all axes of a tensor but one."""
        axes = [axis for dim, axis in enumerate(self.axes[tensor]) if dim != without and axis is not None]
        return {path[0] for axis in axes for path in axis.slabs}


def work_out(spec: Spec, model: Any) -> Layout:
    """
    Work a specification out for a model (a task model, whose backbone is called by its `base_model_prefix`).

    Raises:
        ValueError: a tensor is not covered, or an axis is as long as its sites are not; tied tensors differ in their rules.
    """
    sites = {site.name: site for site in _sites(spec)}
    state = model.state_dict()
    axes, compared = _axes(spec, state)
    problems = [*_site_problems(sites), *_cover_problems(axes, state, sites), *_tie_problems(axes, state)]
    if problems:
        raise ValueError(f"the permutation spec does not fit {type(model).__name__}: " + "; ".join(problems[:5]))
    modules = {name for name, _ in model.named_modules()}
    templates = {(h.side, m, p) for h in spec.hooks for m, p in _pairs(h.module, h.path, spec.layers)}
    hooks = [Hook(*each) for each in sorted(templates) if each[1] in modules]
    layout = Layout(sites, axes, {}, hooks, {hook.path: _slabs(hook.path) for hook in hooks})
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.is_meta:
            _enter(layout, name, tensor.shape, compared)
        seen.add(tensor.data_ptr())
    return layout


def _sites(spec: Spec) -> list[Site]:
    found = []
    for site in spec.sites:
        for i in range(spec.layers) if "{i}" in site.name else [0]:
            parent = None if site.parent is None else site.parent.replace("{i}", str(i))
            name = site.name.replace("{i}", str(i))
            found.append(replace(site, name=name, parent=parent))
    return found


def _pairs(first: str, second: str, layers: int) -> list[tuple[str, str]]:
    """Two templates, `{i}` and `{a,b}` filled in; alternatives stand in the first only."""
    return [
        (name, second.replace("{i}", str(i)))
        for i in (range(layers) if "{i}" in first else [0])
        for name in _alternatives(first.replace("{i}", str(i)))
    ]


def _alternatives(template: str) -> list[str]:
    parts = [part.split(",") for part in re.split(r"[{}]", template)]
    # Every second part stood in braces; commas elsewhere do not occur in names of tensors.
    return ["".join(choice) for choice in itertools.product(*parts)]


def _axes(spec: Spec, state: dict) -> tuple[dict[str, tuple[Axis | None, ...]], set[str]]:
    axes: dict[str, tuple[Axis | None, ...]] = {}
    compared = set()
    for each in spec.rules:
        for i in range(spec.layers) if "{i}" in each.tensors else [0]:
            parsed = tuple(_parse(None if text is None else text.replace("{i}", str(i))) for text in each.axes)
            produced = next((axis for axis in parsed if axis is not None and axis.role in "+*"), None)
            for name in _alternatives(each.tensors.replace("{i}", str(i))):
                stem = name.removesuffix("weight")
                also = {f"{stem}{kind}": (produced,) for kind in _BESIDE_WEIGHT} if stem != name else {}
                for tensor, its_axes in ({name: parsed} | also).items():
                    if tensor in state and tensor not in axes:
                        axes[tensor] = its_axes
                        # Running statistics follow from the weights and the data; they are moved, not compared.
                        if each.compared and not tensor.endswith(_BESIDE_WEIGHT[1:]):
                            compared.add(tensor)
    for name, tensor in state.items():
        if tensor.dim() == 0:
            axes.setdefault(name, ())
    return axes, compared


def _parse(text: str | None) -> Axis | None:
    if text is None:
        return None
    return Axis(text[0], _slabs(text[1:]))


def _slabs(text: str) -> tuple[Path, ...]:
    return tuple(tuple(part.strip().split("/")) for part in text.split("|"))


def _site_problems(sites: dict[str, Site]) -> list[str]:
    return [
        f"site {site.name!r} has parent {site.parent!r}, which is no site without parent"
        for site in sites.values()
        if site.parent is not None and (site.parent not in sites or sites[site.parent].parent is not None)
    ]


def _cover_problems(axes: dict, state: dict, sites: dict[str, Site]) -> list[str]:
    problems = [f"no rule covers tensor {name!r}" for name in state if name not in axes]
    for name, its_axes in axes.items():
        shape = state[name].shape
        if len(its_axes) != len(shape):
            problems.append(f"{name!r} has {len(shape)} axes {list(shape)}, its rule {len(its_axes)}")
            continue
        for dim, axis in enumerate(its_axes):
            if axis is not None:
                problems += _axis_problems(name, dim, axis, shape[dim], sites)
    return problems


def _axis_problems(name: str, dim: int, axis: Axis, size: int, sites: dict[str, Site]) -> list[str]:
    if axis.role not in "+-*":
        return [f"{name!r}: an expression starts with +, - or *, got {axis.role!r}"]
    for path in axis.slabs:
        unknown = [site for site in path if site not in sites]
        if unknown:
            return [f"{name!r}: there is no site {unknown[0]!r}"]
        if any(sites[site].parent != path[0] for site in path[1:]) or sites[path[0]].parent is not None:
            return [f"{name!r}: {'/'.join(path)} must be a site without parent, then sites of that parent"]
    lengths = [_product(sites[site].size for site in path) for path in axis.slabs]
    if sum(lengths) != size:
        return [f"{name!r}: axis {dim} has {size} entries, its sites {sum(lengths)}"]
    return []


def _product(sizes: Any) -> int:
    return int(torch.Size(sizes).numel())


def _tie_problems(axes: dict, state: dict) -> list[str]:
    first: dict[tuple, str] = {}
    problems = []
    for name, tensor in state.items():
        if tensor.is_meta or name not in axes or tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.shape)
        other = first.setdefault(key, name)
        # An output layer consumes what the embedding produces: roles differ, places must not.
        if [a and a.slabs for a in axes[other]] != [a and a.slabs for a in axes[name]]:
            problems.append(f"{name!r} and {other!r} are one tensor, but their rules differ")
    return problems


def _enter(layout: Layout, name: str, shape: torch.Size, compared: set[str]) -> None:
    if name not in compared:
        return
    for dim, axis in enumerate(layout.axes[name]):
        start = 0
        for path in axis.slabs if axis is not None else ():
            length = _product(layout.shape(path))
            assert axis is not None
            layout.entries.setdefault(path[0], []).append(Entry(name, dim, start, length, path, axis.role))
            start += length
