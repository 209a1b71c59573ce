"""
Assignment of an expert's units to the reference's: Hungarian, and two-level for heads, key-value groups and GroupNorm.

A block's similarity comes in contributions by path: `values[path]` is [composite unit of the reference, of the expert], one
array for a positive and, where signs are free, one for a negative sign. A leaf's similarity is their sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import require_extra
from .permutation import Permutation
from .spec import Layout, Path


Values = Mapping[Path, tuple[torch.Tensor, torch.Tensor | None]]
_ROUNDS = 4
"""How often coupled inner sites are matched again, each with the others as found; they settle after two or three."""
# Ties, such as those of dead units, go to the unit that is there already.
_STAY = 1e-7


@dataclass
class _Pair:
    """Inner assignments of one unit of the root in the reference with one in the expert, and what they are worth."""

    index: dict[str, np.ndarray]
    sign: dict[str, np.ndarray]
    worth: float


def assign(scores: np.ndarray) -> np.ndarray:
    """Column for each row, all different, with the largest sum."""
    solve = require_extra("scipy.optimize", "align").linear_sum_assignment
    return solve(scores + _STAY * np.eye(len(scores), dtype=scores.dtype), maximize=True)[1]


def match_block(layout: Layout, root: str, values: Values, permutation: Permutation) -> None:
    """Assign a block's root site and its children to maximise the sum of similarities; the result goes into `permutation`."""
    if not values:
        return  # nothing tells its units apart
    children = layout.children(root)
    if not children:
        _match_flat(layout, root, values, permutation)
        return
    size = layout.sites[root].size
    blocks = {path: _as_blocks(pair, layout.shape(path)) for path, pair in values.items()}
    if layout.sites[root].fixed:
        pairs = {(j, j): _match_pair(layout, children, blocks, j, j) for j in range(size)}
        order = np.arange(size)
    else:
        pairs = {(j, k): _match_pair(layout, children, blocks, j, k) for j in range(size) for k in range(size)}
        order = assign(np.array([[pairs[j, k].worth for k in range(size)] for j in range(size)]))
    permutation.index[root] = torch.from_numpy(order.copy())
    for name in children:
        chosen = [pairs[j, int(order[j])] for j in range(size)]
        permutation.index[name] = torch.from_numpy(np.stack([pair.index[name] for pair in chosen]))
        if layout.sites[name].signed:
            permutation.sign[name] = torch.from_numpy(np.stack([pair.sign[name] for pair in chosen]).astype(np.float32))


def _match_flat(layout: Layout, root: str, values: Values, permutation: Permutation) -> None:
    site = layout.sites[root]
    (positive, negative) = values[(root,)]
    scores, flips = _with_signs(positive.numpy(), None if negative is None else negative.numpy())
    index = np.arange(site.size) if site.fixed else assign(scores)
    permutation.index[root] = torch.from_numpy(index.copy())
    if site.signed:
        permutation.sign[root] = torch.from_numpy(np.where(flips[np.arange(site.size), index], -1.0, 1.0)).float()


def _with_signs(positive: np.ndarray, negative: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The better of both signs, and where that is the negative one."""
    if negative is None:
        return positive, np.zeros(positive.shape, dtype=bool)
    flips = negative > positive
    return np.where(flips, negative, positive), flips


def _as_blocks(pair: tuple[torch.Tensor, torch.Tensor | None], shape: tuple[int, ...]) -> list[np.ndarray]:
    """[root's unit of the reference, of the expert, inner sizes of the reference ..., of the expert ...], by sign."""
    inner = len(shape) - 1
    order = (0, inner + 1, *range(1, inner + 1), *range(inner + 2, 2 * inner + 2))
    return [each.view(*shape, *shape).permute(order).numpy() for each in pair if each is not None]


def _match_pair(layout: Layout, children: list[str], blocks: dict[Path, list[np.ndarray]], j: int, k: int) -> _Pair:
    """Match the inner sites of one unit of the root with those of another, each in turn with the others as found so far."""
    own = {path[1:]: [each[j, k] for each in signs] for path, signs in blocks.items()}
    sites = {name: layout.sites[name] for name in children}
    identity = {name: np.arange(site.size) for name, site in sites.items()}
    index = {name: identity[name] for name, site in sites.items() if site.fixed}
    sign = {name: np.ones(site.size) for name, site in sites.items()}
    open_sites = [name for name in children if name not in index]
    coupled = any(sum(name in open_sites for name in path) > 1 for path in own)
    for _ in range(_ROUNDS if coupled else 1):
        before = {name: index.get(name, np.empty(0)) for name in open_sites}
        # Sites that depend on nothing open come first, so that a start needs no guess where there is a way around one.
        for name in sorted(open_sites, key=lambda name: _open_partners(own, name, index)):
            scores, flips = _scores(own, name, sites, index, sign)
            index[name] = assign(scores)
            if sites[name].signed:
                sign[name] = np.where(flips[identity[name], index[name]], -1.0, 1.0)
        if all(np.array_equal(before[name], index[name]) for name in open_sites):
            break
    return _Pair(index, sign, _worth(own, index, sign))


def _open_partners(own: Mapping[Path, list], name: str, index: dict) -> int:
    """How many of a site's paths lead through other sites without an assignment, less those that do not."""
    paths = [path for path in own if name in path]
    blocked = [path for path in paths if any(other != name and other not in index for other in path)]
    return 2 * len(blocked) - len(paths)


def _scores(
    own: Mapping[Path, list[np.ndarray]], name: str, sites: dict, index: dict, sign: dict
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities [reference's unit, expert's unit] of one inner site under the others' assignments."""
    size = sites[name].size
    paths = [path for path in own if name in path]
    free = [path for path in paths if all(other == name or other in index for other in path)]
    by_sign = [np.zeros((size, size)) for _ in range(2 if sites[name].signed else 1)]
    for path in free or paths:
        for number, total in enumerate(by_sign):
            total += _contracted(own[path], path, name, index, sign, flip=number == 1)
    return _with_signs(by_sign[0], by_sign[1] if len(by_sign) > 1 else None)


def _contracted(values: list[np.ndarray], path: Path, name: str, index: dict, sign: dict, flip: bool) -> np.ndarray:
    """Sum one path's contributions over its other sites' matched units; unassigned ones count as they stand."""
    if len(path) == 1:
        return values[1 if flip else 0]
    # At most two sites lie between root and leaf.
    keep = path.index(name)
    other = path[1 - keep]
    size = values[0].shape[1 - keep]
    places = index.get(other, np.arange(size))
    signs = sign[other] * (-1 if flip else 1) if len(values) > 1 else np.ones(size)
    total = np.zeros((values[0].shape[keep],) * 2)
    for unit in range(size):
        chosen = values[0 if signs[unit] > 0 else 1]
        total += chosen[:, unit, :, places[unit]] if keep == 0 else chosen[unit, :, places[unit], :]
    return total


def _worth(own: Mapping[Path, list[np.ndarray]], index: dict, sign: dict) -> float:
    total = 0.0
    for path, values in own.items():
        if not path:
            total += float(values[0])
            continue
        name = path[-1]
        size = len(index[name])
        positive = _contracted(values, path, name, index, sign, flip=False)
        negative = _contracted(values, path, name, index, sign, flip=True) if len(values) > 1 else positive
        own_sign = sign[name]
        matched = np.where(own_sign > 0, positive[np.arange(size), index[name]], negative[np.arange(size), index[name]])
        total += float(matched.sum())
    return total
