"""Symmetric operators whose eigenvalues are known: what the linear algebra is tested on."""

from __future__ import annotations

import torch
from torch import Tensor

import curvature as cv


def linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rotated(values: Tensor, *, seed: int = 987_654_321) -> Tensor:
    """The dense symmetric matrix with these eigenvalues and random eigenvectors, in float64.

    With a seed that no test gives a question: probes of the same seed would be rows of what the eigenvectors are made
    of, and not independent of them.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def free(matrix: Tensor) -> cv.MatrixFree:
    """A symmetric matrix of which only the products are known."""
    return cv.MatrixFree(lambda rows: rows @ matrix, cv.Space(len(matrix), matrix.dtype), symmetric=True)


def scaling(values: Tensor) -> cv.MatrixFree:
    """The diagonal matrix of which only the products are known: cheap, and with exact multiplicities.

    Probes from the sphere cannot tell it from `free(rotated(values))`; signs can.
    """
    return cv.MatrixFree(lambda rows: rows * values, cv.Space(len(values), values.dtype), symmetric=True)


class Stopping:
    """A progress callback, or the function of an operator, that is interrupted at its n-th call."""

    def __init__(self, after: int, function=lambda rows: None):
        self.left, self.function = after, function

    def __call__(self, rows):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.function(rows)
