"""
The search for a permutation (MuDSC, Algorithm 1): start from activations, then visit the blocks in random order, again and
again, each with its neighbours as they are.

Similarity is `weight_share * weights + (1 - weight_share) * activations`. The activation matrix stays fixed (as in the
authors' code; a literal reading of their Algorithm 1 would let it decay). The objective is the mean over leaf sites of
their matched units' similarity, measured on one whole permutation, so that numbers of different sweeps can be compared.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .matching import match_block
from .permutation import Permutation
from .spec import Layout, Path
from .weights import WeightSpace


_GAIN = 1e-9
"""Less is no improvement, but rounding."""


@dataclass
class Search:
    """What a search found: the best permutation, the objective after the start and each sweep, and that of the identity."""

    best: Permutation
    objective: float
    identity_objective: float
    objectives: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    kept_identity: bool = False


class DualSpace:
    """Similarities of a block in both spaces, weighed."""

    def __init__(
        self, layout: Layout, weights: WeightSpace, activations: Mapping[Path, torch.Tensor], weight_share: float
    ):
        self.layout, self.weights, self.activations, self.share = layout, weights, activations, weight_share
        self._units = {
            leaf: sum(_composites(layout, path) for path in activations if path[-1] == leaf)
            for leaf in {path[-1] for path in activations}
        }

    def block(self, root: str, permutation: Permutation | None, known: set[str] | None = None) -> dict:
        """Contributions by path, as `match_block` takes them; without a permutation: by activations alone."""
        found: dict[Path, tuple[torch.Tensor, torch.Tensor | None]] = {}
        share = 0.0 if permutation is None else self.share
        if permutation is not None and (share > 0 or not self._sees(root)):
            # Sites that no hook reads are matched by weights alone, whatever the share.
            for path, signs in self.weights.similarity(root, permutation, known).items():
                scale = share if path[-1] in self._units else 1.0
                if scale > 0:
                    found[path] = tuple(None if each is None else each.mul_(scale) for each in signs)  # type: ignore[assignment]
        for path, correlation in self.activations.items():
            if path[0] == root and share < 1:
                found[path] = self._with_activations(path, correlation, 1 - share, found.get(path))
        return found

    def _sees(self, root: str) -> bool:
        """Whether activations say something about every leaf of a block."""
        leaves = {entry.path[-1] for entry in self.layout.entries.get(root, [])}
        return all(leaf in self._units for leaf in leaves)

    def _with_activations(self, path: Path, correlation: torch.Tensor, share: float, weights: tuple | None) -> tuple:
        scaled = correlation * (share / self._units[path[-1]])
        positive = scaled if weights is None else weights[0].add_(scaled)
        signed = any(self.layout.sites[name].signed for name in path)
        if not signed:
            return positive, None
        return positive, -scaled if weights is None else weights[1].sub_(scaled)

    def matched(self, permutation: Permutation) -> dict[str, float]:
        """Mean similarity of the matched units of every leaf site, under one whole permutation."""
        by_activation: dict[str, float] = {}
        for path, correlation in self.activations.items():
            index, sign = permutation.flat(path)
            values = correlation[torch.arange(len(index)), index]
            mean = float((values if sign is None else values * sign).double().mean())
            weight = _composites(self.layout, path) / self._units[path[-1]]
            by_activation[path[-1]] = by_activation.get(path[-1], 0.0) + weight * mean
        by_weight: dict[str, float] = {}
        for root in self.layout.roots:
            if self.share > 0 or not self._sees(root):
                matched = self.weights.matched(root, permutation)
                by_weight |= {leaf: float(value.double().mean()) for leaf, value in matched.items()}
        found = {}
        for leaf in self.layout.sites:
            if leaf in by_activation and (self.share == 0 or leaf not in by_weight):
                found[leaf] = by_activation[leaf]
            elif leaf in by_activation:
                found[leaf] = self.share * by_weight[leaf] + (1 - self.share) * by_activation[leaf]
            elif leaf in by_weight:
                found[leaf] = by_weight[leaf]
        return found

    def objective(self, permutation: Permutation) -> float:
        """Mean over leaf sites of `matched`."""
        values = self.matched(permutation).values()
        return sum(values) / len(values)


def _composites(layout: Layout, path: Path) -> int:
    return torch.Size(layout.shape(path)[1:-1]).numel()


def search(
    space: DualSpace,
    max_sweeps: int,
    patience: int,
    seed: int,
    tick: Callable[[str], object] = lambda what: None,
) -> Search:
    """
    Find a permutation of the expert; the identity is kept where nothing better is found.

    Args:
        max_sweeps: 0 keeps what the start found.
        patience: stop after so many sweeps without a better objective.
        tick: called for each block that was matched.
    """
    layout = space.layout
    identity = Permutation.identity(layout)
    current = _start(space, tick)
    found = Search(current.copy(), space.objective(current), space.objective(identity))
    found.objectives.append(found.objective)
    found.accepted.append(True)
    generator = random.Random(seed)
    seen: dict[str, bytes] = {}
    failures = 0
    for _ in range(max_sweeps):
        before = current.copy()
        for root in generator.sample(layout.roots, len(layout.roots)):
            _visit(space, root, current, seen)
            tick(root)
        objective = space.objective(current)
        better = objective > found.objective + _GAIN
        found.objectives.append(objective)
        found.accepted.append(better)
        if better:
            found.best, found.objective, failures = current.copy(), objective, 0
        else:
            failures += 1
            settled = current.block_key(set(layout.roots)) == before.block_key(set(layout.roots))
            if failures >= patience or settled:
                break
            current = found.best.copy()
            seen.clear()
    if found.objective < found.identity_objective + _GAIN and not found.best.is_identity:
        found.best, found.objective, found.kept_identity = identity, found.identity_objective, True
    return found


def _start(space: DualSpace, tick: Callable[[str], object]) -> Permutation:
    """
    Match every block by activations; what they do not reach, by weights towards blocks that are matched already.

    Without any data the first block is thus the one whose weights lead to axes that are never permuted: the residual
    stream, by its embeddings.
    """
    layout, current = space.layout, Permutation.identity(space.layout)
    known = set()
    for root in layout.roots:
        if any(path[0] == root for path in space.activations) and space._sees(root):
            match_block(layout, root, space.block(root, None), current)
            known.add(root)
            tick(root)
    waiting = [root for root in layout.roots if root not in known]
    while waiting:
        root = max(waiting, key=lambda root: _anchored(space, root, known))
        match_block(layout, root, space.block(root, current, known if _anchored(space, root, known) else None), current)
        known.add(root)
        waiting.remove(root)
        tick(root)
    return current


def _anchored(space: DualSpace, root: str, known: set[str]) -> float:
    """Share of the weights at a block that lead to axes that are matched already or never permuted."""
    total = reachable = 0
    for entry in space.layout.entries.get(root, []):
        size = space.weights.reference(entry.tensor).numel()
        total += size
        reachable += size if space.layout.roots_of(entry.tensor, entry.dim) <= known else 0
    # A vector alone tells units apart badly: matrices decide.
    return reachable / total if total else 0.0


def _visit(space: DualSpace, root: str, current: Permutation, seen: dict[str, bytes]) -> None:
    """Match one block again, unless its neighbours stand as they stood at its last visit."""
    neighbours = space.weights.neighbours(root) if space.share > 0 or not space._sees(root) else set()
    key = current.block_key(neighbours | {root})
    if seen.get(root) == key:
        return
    match_block(space.layout, root, space.block(root, current), current)
    seen[root] = current.block_key(neighbours | {root})
