"""Whether checkpoints were trained from one initialisation: what merging them as they are takes for granted."""

import torch

from .checkpoints import Checkpoint


_SAMPLE = 8
"""So many matrices, spread over the model, tell as well as all of them."""
_PIECE = 1 << 18
SHARED = 0.3
"""
Cosine of two checkpoints' weights above which they are taken for relatives. Fine-tuned models keep 0.9 and more of a common
start; independent ones are at 0, for their weights are random to each other.
"""


def cosines(checkpoints: list[Checkpoint]) -> dict[tuple[int, int], float]:
    """Cosine similarity of the weights of every two checkpoints, over a sample of their backbones' matrices."""
    first = checkpoints[0]
    names = [
        name for name, shape in first.backbone.items() if len(shape) > 1 and all(name in c.places for c in checkpoints)
    ]
    chosen = sorted({names[round(i * (len(names) - 1) / (_SAMPLE - 1))] for i in range(_SAMPLE)}) if names else []
    found: dict[tuple[int, int], list[float]] = {}
    for name in chosen:
        gram = _gram([checkpoint.tensor(name) for checkpoint in checkpoints])
        norms = gram.diagonal().sqrt().clamp(min=1e-12)
        for i in range(len(checkpoints)):
            for j in range(i):
                found.setdefault((j, i), []).append(float(gram[i, j] / (norms[i] * norms[j])))
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def _gram(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Inner products [T, T] of T tensors of one shape, float64; a piece of each is in memory at a time."""
    gram = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for pieces in zip(*(tensor.reshape(-1).split(_PIECE) for tensor in tensors), strict=True):
        stacked = torch.stack([piece.double() for piece in pieces])
        gram += stacked @ stacked.T
    return gram


def describe_strangers(checkpoints: list[Checkpoint]) -> list[str]:
    """A sentence for each two checkpoints whose weights have nothing in common; empty if all are relatives."""
    return [
        f"{checkpoints[i].role} and {checkpoints[j].role} look like different initialisations (cosine of their weights "
        f"{cosine:.2f}, relatives have 0.9)"
        for (i, j), cosine in cosines(checkpoints).items()
        if cosine < SHARED
    ]
