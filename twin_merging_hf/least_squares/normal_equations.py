"""
Least squares with a ridge toward a start, from samples that are seen once: only sums over samples are kept, in float64.

    minimise over W: sum_i a_i |y_i - W x_i|^2 + ridge * mean diagonal of (sum_i a_i x_i x_i^T) * |W - start|^2
"""

import torch


class NormalEquations:
    """
    The sums for a matrix W [m, n].

    Args:
        start: where the ridge pulls to, and the answer where there are no samples.
    """

    def __init__(self, start: torch.Tensor):
        self.start = start.double()
        size = self.start.shape[1]
        self.gram = self.start.new_zeros(size, size)
        self.cross = torch.zeros_like(self.start)
        self.energy = self.start.new_zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: float = 1.0) -> None:
        """Add samples x [sample, n] and targets y [sample, m], each with this weight."""
        x = x.double()
        left = y.double() - x @ self.start.T
        self.gram += weight * (x.T @ x)
        self.cross += weight * (left.T @ x)
        self.energy += weight * left.pow(2).sum()

    def solve(self, ridge: float) -> torch.Tensor:
        """W [m, n], float64, for a `ridge` above 0."""
        unit = self.gram.diagonal().mean()
        if not bool(unit > 0):
            return self.start
        identity = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        factor = torch.linalg.cholesky(self.gram + ridge * unit * identity)
        return self.start + torch.cholesky_solve(self.cross.T, factor).T

    def loss(self, solution: torch.Tensor) -> float:
        """sum_i a_i |y_i - W x_i|^2."""
        step = solution - self.start
        return float(self.energy - 2 * (step * self.cross).sum() + ((step @ self.gram) * step).sum())


class ChannelEquations:
    """As `NormalEquations`, for a scale and shift of each channel: y_c = w_c x_c + b_c, W = [channel, 2]."""

    def __init__(self, start: torch.Tensor):
        self.start = start.double()
        self.gram = self.start.new_zeros(len(start), 2, 2)
        self.cross = torch.zeros_like(self.start)
        self.energy = self.start.new_zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: float = 1.0) -> None:
        """Add samples and targets, [sample, channel] both."""
        x, y = x.double(), y.double()
        left = y - (x * self.start[:, 0] + self.start[:, 1])
        design = torch.stack([x, torch.ones_like(x)], dim=-1)  # [sample, channel, 2]
        self.gram += weight * torch.einsum("sci,scj->cij", design, design)
        self.cross += weight * torch.einsum("sc,sci->ci", left, design)
        self.energy += weight * left.pow(2).sum()

    def solve(self, ridge: float) -> torch.Tensor:
        """W [channel, 2], float64, for a `ridge` above 0."""
        unit = self.gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        identity = torch.eye(2, dtype=self.gram.dtype, device=self.gram.device)
        # A channel without samples keeps its start: its equations read 0 = 0.
        unit = torch.where(unit > 0, unit * ridge, torch.ones_like(unit))
        return self.start + torch.linalg.solve(self.gram + unit[:, None, None] * identity, self.cross)

    def loss(self, solution: torch.Tensor) -> float:
        """sum_i a_i |y_i - (w x_i + b)|^2, over all channels."""
        step = solution - self.start
        squares = torch.einsum("ci,cij,cj->", step, self.gram, step)
        return float(self.energy - 2 * (step * self.cross).sum() + squares)
