"""The matrix in which a parameter's delta is factored."""

import torch


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the matrix in which a delta is factored: tables lose their leading 1, kernels are flattened."""
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], shape[1:].numel())


def as_matrix(delta: torch.Tensor) -> torch.Tensor:
    """A parameter's delta as the matrix [m, n] of `matrix_shape`."""
    return delta.reshape(matrix_shape(delta.shape))
