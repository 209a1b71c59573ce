"""
Similarity of units by their weights (MuDSC, Git Re-Basin): correlation of everything that is attached to a unit.

The vectors of a unit's weights are never put together (a residual channel of a large model has millions): cross-products,
sums and squares are added up tensor by tensor. A flipped sign turns the entries that a unit produces or consumes, and
not the gains that scale it, so products are kept apart as `odd` and `even`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .permutation import Permutation
from .spec import Entry, Layout, Path


Read = Callable[[str], torch.Tensor]
_DEAD = 1e-12


@dataclass
class Products:
    """What is added up along one path: products [a's unit, b's unit] (or of matched units alone, [unit]), sums, squares."""

    odd: torch.Tensor
    even: torch.Tensor | None = None
    count: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, a: torch.Tensor, b: torch.Tensor, turns: bool, matched: bool) -> None:
        """Add a tensor's entries: [a's unit, entry], [b's unit, entry]."""
        product = (a * b).sum(1) if matched else a @ b.T
        if turns:
            self.odd += product
        else:
            self.even = product if self.even is None else self.even + product
        self.count += a.shape[1]
        for key, value in (
            ("a", a.sum(1)),
            ("b" if turns else "b_even", b.sum(1)),
            ("aa", a.pow(2).sum(1)),
            ("bb", b.pow(2).sum(1)),
        ):
            self.sums[key] = self.sums.get(key, 0) + value.double()

    def copy(self) -> "Products":
        even = None if self.even is None else self.even.clone()
        return Products(self.odd.clone(), even, self.count, dict(self.sums))

    def sum_of(self, key: str) -> torch.Tensor:
        return self.sums.get(key, self.odd.new_zeros(len(self.odd), dtype=torch.float64))


class WeightSpace:
    """
    Weight similarities between a reference and an expert.

    Args:
        reference, expert: read a tensor by name.
        kind: `pearson`, or `cosine` (the same without taking means off).
    """

    def __init__(self, layout: Layout, reference: Read, expert: Read, kind: str = "pearson"):
        self.layout, self.reference, self.expert, self.kind = layout, reference, expert, kind
        self._constant: dict[str, dict[Path, Products]] = {}

    def neighbours(self, root: str) -> set[str]:
        """Blocks on the other axes of a block's tensors: its similarity depends on their permutations."""
        return {other for e in self.layout.entries.get(root, []) for other in self.layout.roots_of(e.tensor, e.dim)}

    def similarity(
        self, root: str, permutation: Permutation, known: set[str] | None = None
    ) -> dict[Path, tuple[torch.Tensor, torch.Tensor | None]]:
        """
        Contributions to the correlation of a block's leaf units, with the other axes as permuted so far.

        Args:
            known: if given, only tensors whose other axes belong to these blocks.

        Returns:
            By path: [reference's units, expert's units] for positive and (where signs are free) negative sign. Summed over
            the units on the way to the leaf and over paths, they are Pearson correlations of the leaf's units.
        """
        products = {path: each.copy() for path, each in self._constant_part(root, permutation).items()}
        for entry in self.layout.entries.get(root, []):
            others = self.layout.roots_of(entry.tensor, entry.dim)
            if others and (known is None or others <= known):
                self._add(products, entry, permutation, matched=False)
        return self._normalised(products)

    def matched(self, root: str, permutation: Permutation) -> dict[str, torch.Tensor]:
        """Correlation of each leaf site's matched units [parent's unit, unit] or [unit] under a whole permutation."""
        products: dict[Path, Products] = {}
        for entry in self.layout.entries.get(root, []):
            self._add(products, entry, permutation, matched=True)
        found: dict[str, torch.Tensor] = {}
        for path, (value, _) in self._normalised(products, signs=False).items():
            per_leaf = _over_middle(value, self.layout.shape(path))
            found[path[-1]] = found[path[-1]] + per_leaf if path[-1] in found else per_leaf
        return found

    def _constant_part(self, root: str, permutation: Permutation) -> dict[Path, Products]:
        """Products of tensors without a permutation on any other axis (embeddings, biases): the same in every sweep."""
        if root not in self._constant:
            products: dict[Path, Products] = {}
            for entry in self.layout.entries.get(root, []):
                if not self.layout.roots_of(entry.tensor, entry.dim):
                    self._add(products, entry, permutation, matched=False)
            if not any(each.count > _WORTH_KEEPING for each in products.values()):
                return products
            self._constant[root] = products
        return self._constant[root]

    def _add(self, products: dict[Path, Products], entry: Entry, permutation: Permutation, matched: bool) -> None:
        a, b = self.reference(entry.tensor), self.expert(entry.tensor)
        if a.shape != b.shape:
            return  # heads for different label sets: nothing to compare
        b = permutation.align(entry.tensor, b, without=None if matched else entry.dim)
        units_a, units_b = (self._units(tensor, entry) for tensor in (a, b))
        size = (len(units_a),) if matched else (len(units_a), len(units_b))
        each = products.setdefault(entry.path, Products(torch.zeros(size, device=a.device)))
        each.add(units_a, units_b, turns=entry.role != "*", matched=matched)

    @staticmethod
    def _units(tensor: torch.Tensor, entry: Entry) -> torch.Tensor:
        units = tensor.narrow(entry.dim, entry.start, entry.length).movedim(entry.dim, 0)
        return units.reshape(entry.length, -1).float()

    def _normalised(
        self, products: dict[Path, Products], signs: bool = True
    ) -> dict[Path, tuple[torch.Tensor, torch.Tensor | None]]:
        """Turn products into contributions to correlations, in place of them."""
        found: dict[Path, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for leaf in {path[-1]: None for path in products}:
            paths = [path for path in products if path[-1] == leaf]
            positive = self._contributions(products, paths, 1.0)
            negative: list[torch.Tensor] | list[None] = [None] * len(paths)
            if signs and any(self.layout.sites[name].signed for path in paths for name in path):
                negative = self._contributions(products, paths, -1.0)
            for path, plus, minus in zip(paths, positive, negative, strict=True):
                found[path] = (plus.cpu(), None if minus is None else minus.cpu())
        return found

    def _contributions(self, products: dict[Path, Products], paths: list[Path], sign: float) -> list[torch.Tensor]:
        total = sum(products[p].count * _middle(self.layout.shape(p)) for p in paths)
        means, spreads = {}, {}
        for side in "ab":
            sums = [_over_middle(_side_sum(products[p], side, sign), self.layout.shape(p)) for p in paths]
            squares = [_over_middle(products[p].sum_of(side * 2), self.layout.shape(p)) for p in paths]
            mean = torch.stack(sums).sum(0) / total if self.kind == "pearson" else torch.zeros_like(sums[0])
            square = torch.stack(squares).sum(0) / total
            variance = square - mean.pow(2)
            dead = variance <= torch.maximum(square * 1e-9, square.max() * _DEAD)
            means[side], spreads[side] = mean, torch.where(dead, torch.inf, variance).sqrt()
        return [self._contribution(products[p], p, means, spreads, total, sign) for p in paths]

    def _contribution(
        self, each: Products, path: Path, means: dict, spreads: dict, total: int, sign: float
    ) -> torch.Tensor:
        shape = self.layout.shape(path)
        mean_a, mean_b = (_to_composite(means[side], shape).float() for side in "ab")
        spread_a, spread_b = (_to_composite(spreads[side], shape).float() for side in "ab")
        sum_a, sum_b = _side_sum(each, "a", sign).float(), _side_sum(each, "b", sign).float()
        value = each.odd * sign
        if each.even is not None:
            value += each.even
        if value.dim() == 1:
            value += each.count * mean_a * mean_b - mean_a * sum_b - sum_a * mean_b
            return value / (total * spread_a * spread_b)
        if self.kind == "pearson":
            value.addmm_(torch.stack([-mean_a, each.count * mean_a - sum_a], 1), torch.stack([sum_b, mean_b]))
        return value.div_((total * spread_a)[:, None]).div_(spread_b[None])


_WORTH_KEEPING = 64


def _side_sum(each: Products, side: str, sign: float) -> torch.Tensor:
    return each.sum_of("a") if side == "a" else each.sum_of("b") * sign + each.sum_of("b_even")


def _middle(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[1:-1]).numel()


def _over_middle(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sum [composite unit] over the sites between root and leaf: [root's unit, leaf's unit], or [unit]."""
    if len(shape) == 1:
        return value
    return value.view(shape[0], -1, shape[-1]).sum(1)


def _to_composite(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Repeat a leaf's [root's unit, leaf's unit] along the sites between: [composite unit]."""
    if len(shape) == 1:
        return value
    return value[:, None].expand(shape[0], _middle(shape), shape[-1]).reshape(-1)
