"""A legal permutation of one model's units, with signs where they are free: how it is drawn, composed and applied."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .spec import Axis, Layout, Path


@dataclass
class Permutation:
    """
    Which unit of the expert stands at each place of the reference.

    index: by site, [unit], or [unit of the parent, unit] for sites with a parent, by the parent's *reference* unit.
    sign: by signed site, +1 or -1 in the same shape.
    """

    layout: Layout
    index: dict[str, torch.Tensor] = field(default_factory=dict)
    sign: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def identity(layout: Layout) -> "Permutation":
        """Everything where it was."""
        found = Permutation(layout)
        for name, site in layout.sites.items():
            rows = (1,) if site.parent is None else (layout.sites[site.parent].size, 1)
            found.index[name] = torch.arange(site.size).repeat(rows)
            if site.signed:
                found.sign[name] = torch.ones_like(found.index[name], dtype=torch.float32)
        return found

    @staticmethod
    def random(layout: Layout, seed: int) -> "Permutation":
        """A random legal permutation, with random signs where they are free."""
        generator = torch.Generator().manual_seed(seed)
        found = Permutation.identity(layout)
        for name, site in layout.sites.items():
            index = found.index[name]
            if not site.fixed:
                found.index[name] = torch.rand(index.shape, generator=generator).argsort(-1)
            if site.signed:
                found.sign[name] = torch.randint(0, 2, index.shape, generator=generator) * 2.0 - 1
        return found

    def copy(self) -> "Permutation":
        """A copy that may be changed by itself."""
        return Permutation(self.layout, dict(self.index), dict(self.sign))

    def flat(self, path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gather index [n] into an axis laid out along a path, and signs [n] (None: all positive)."""
        index, sign = self.index[path[0]], self.sign.get(path[0])
        for name in path[1:]:
            inner, size = self.index[name], self.layout.sites[name].size
            shape = (inner.shape[0], *[1] * (index.dim() - 1), size)
            index = index.unsqueeze(-1) * size + inner.view(shape)
            inner_sign = self.sign.get(name)
            if sign is not None or inner_sign is not None:
                outer = torch.ones(index.shape) if sign is None else sign.unsqueeze(-1).expand(index.shape)
                sign = outer * (1.0 if inner_sign is None else inner_sign.view(shape))
        return index.flatten(), None if sign is None else sign.flatten()

    def along(self, axis: Axis) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gather index and signs of a whole axis, slab by slab."""
        indices, signs, start = [], [], 0
        for path in axis.slabs:
            index, sign = self.flat(path)
            indices.append(index + start)
            signs.append(torch.ones(len(index)) if sign is None or axis.role == "*" else sign)
            start += len(index)
        sign = torch.cat(signs)
        return torch.cat(indices), None if bool((sign == 1).all()) else sign

    def align(self, name: str, tensor: torch.Tensor, without: int | None = None) -> torch.Tensor:
        """
        Move one tensor of the expert to the reference's places: exact, values are only moved and negated.

        Args:
            without: an axis that stays as it is.
        """
        for dim, axis in enumerate(self.layout.axes[name]):
            if axis is None or dim == without:
                continue
            index, sign = self.along(axis)
            tensor = tensor.index_select(dim, index.to(tensor.device))
            if sign is not None:
                tensor = tensor * sign.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.dim())])
        return tensor

    def state_dict(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of the expert, moved."""
        return {name: self.align(name, tensor) for name, tensor in state.items()}

    @torch.no_grad()
    def apply(self, model: torch.nn.Module) -> None:
        """Move all tensors of the expert in place; tied ones stay tied."""
        done = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in done:
                tensor.copy_(self.align(name, tensor.detach()))
            done.add(id(tensor))

    def block_key(self, roots: set[str]) -> bytes:
        """The state of some blocks, for comparison."""
        parts = []
        for root in sorted(roots):
            for name in (root, *self.layout.children(root)):
                parts.append(self.index[name].numpy().tobytes())
                if name in self.sign:
                    parts.append(self.sign[name].numpy().tobytes())
        return b"".join(parts)

    def moved(self, name: str) -> float:
        """Share of a site's units that left their place."""
        index = self.index[name]
        return float((index != torch.arange(index.shape[-1])).float().mean())

    def negative(self, name: str) -> float:
        """Share of a site's units whose sign is flipped."""
        return float((self.sign[name] < 0).float().mean()) if name in self.sign else 0.0

    @property
    def is_identity(self) -> bool:
        """True where nothing moves."""
        return all(self.moved(name) == 0 and self.negative(name) == 0 for name in self.layout.sites)
