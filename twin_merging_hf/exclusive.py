"""What is stored of one parameter's exclusive deltas: factors in floats or integers, or sparse entries, and what is lost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twin_merging_hf.modeling.factors_twin_merging import INTEGER_BITS, pack_nibbles

from .artifact import factor_keys, scale_key, sparse_keys
from .compression import compress, named_generator
from .errors import TwinMergingError
from .low_rank import Delta, squared_distance
from .quantisation import quantise
from .sparsification import largest_entries, random_entries


@dataclass(frozen=True)
class Stored:
    """
    One parameter's deltas as they are stored.

    tensors: by state-dict key. sizes: rank or number of entries of each expert. energies, kept, lost: for each expert the
    squared Frobenius norm of the delta, of the part that the truncation keeps, and of the delta minus what is stored.
    """

    tensors: dict[str, torch.Tensor]
    sizes: list[int]
    energies: list[float]
    kept: list[float]
    lost: list[float]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def coverage(self, treatment: str, sizes: str) -> dict:
        """Entry of the report."""
        pairs = [
            (max(e, 1e-300), k, max(lost, 0.0)) for e, k, lost in zip(self.energies, self.kept, self.lost, strict=True)
        ]
        zero = [e == 0 for e in self.energies]
        return {
            "treatment": treatment,
            sizes: self.sizes,
            "energy": [shown(e) for e in self.energies],
            "energy_kept": [1.0 if z else round(k / e, 6) for z, (e, k, _) in zip(zero, pairs, strict=True)],
            "relative_error": [
                0.0 if z else round((lo / e) ** 0.5, 6) for z, (e, _, lo) in zip(zero, pairs, strict=True)
            ],
            "bytes": self.bytes,
        }


def shown(energy: float) -> float:
    """An energy as reports give it."""
    return float(f"{energy:.8g}")


def direction_bytes(m: int, n: int, storage: str, model_dtype: torch.dtype) -> int:
    """Bytes of one rank direction of an [m, n] matrix: a column of `up`, a row of `down`, the scale if there is one."""
    bits = INTEGER_BITS.get(storage)
    if bits is None:
        return (m + n) * getattr(torch, storage).itemsize
    each = 8 // bits
    return -(-m // each) + -(-n // each) + model_dtype.itemsize


def store_factors(
    name: str,
    matrices: Sequence[Delta],
    ranks: Sequence[int],
    seed_texts: Sequence[str],
    storage: str,
    model_dtype: torch.dtype,
) -> Stored:
    """
    Truncate each expert's delta [m, n] of one parameter to its rank, and store the factors side by side.

    Args:
        seed_texts: name each expert's matrix for the randomised SVD.
        storage: `float32`, `bfloat16`, `float16`, `int8` or `int4`.
    """
    bits = INTEGER_BITS.get(storage)
    ups, downs, scales = [], [], []
    energies, kept, lost = [], [], []
    for matrix, rank, text in zip(matrices, ranks, seed_texts, strict=True):
        factors = compress(matrix, rank, text)
        if bits is None:
            up, down = (part.to(getattr(torch, storage)) for part in (factors.up, factors.down))
            stored = up.float(), down.float()
        else:
            quantised = quantise(matrix, factors.up, factors.down, bits, model_dtype)
            up, down, stored = quantised.up, quantised.down, quantised.floats()
            scales.append(quantised.scale)
        ups.append(up)
        downs.append(down)
        energies.append(factors.total)
        kept.append(factors.kept)
        lost.append(squared_distance(matrix, *stored))
    up_key, down_key = factor_keys(name)
    tensors = {up_key: torch.cat(ups, dim=1).contiguous(), down_key: torch.cat(downs, dim=0).contiguous()}
    if bits == 4:
        tensors = {up_key: pack_nibbles(tensors[up_key], 0), down_key: pack_nibbles(tensors[down_key], 1)}
    if bits is not None:
        tensors[scale_key(name)] = torch.cat(scales)
    return Stored(tensors, [up.shape[1] for up in ups], energies, kept, lost)


def store_entries(
    name: str, deltas: Sequence[torch.Tensor], method: str, ratio: float, seed_texts: Sequence[str], storage: str
) -> Stored:
    """
    Store single entries of each expert's delta (any shape) of one parameter: the largest, or random ones.

    Raises:
        TwinMergingError: the tensor has more entries than int32 places can name.
    """
    if deltas[0].numel() > torch.iinfo(torch.int32).max:
        raise TwinMergingError(
            f"tensor {name!r} has {deltas[0].numel()} entries, more than `exclusive.method: {method}` can index; use svd"
        )
    values, indices, energies, kept, lost = [], [], [], [], []
    for delta, text in zip(deltas, seed_texts, strict=True):
        found = largest_entries(delta, ratio) if method == "magnitude" else _random(delta, ratio, text)
        stored = found.values.to(getattr(torch, storage))
        flat, places = delta.flatten().clone(), found.indices.long()
        energies.append(float(flat.double().pow(2).sum()))
        kept.append(float(flat[places].double().pow(2).sum()))
        flat[places] -= stored.float()
        lost.append(float(flat.double().pow(2).sum()))
        values.append(stored)
        indices.append(found.indices)
    values_key, indices_key = sparse_keys(name)
    tensors = {values_key: torch.cat(values), indices_key: torch.cat(indices)}
    return Stored(tensors, [len(v) for v in values], energies, kept, lost)


def _random(delta: torch.Tensor, ratio: float, text: str):
    return random_entries(delta, ratio, named_generator(text))
