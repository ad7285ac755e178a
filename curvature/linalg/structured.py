"""Operators whose structure makes questions exact and cheap."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import Space


class Dense(LinearOperator):
    """A matrix that is held whole.

    `symmetric` is found out by looking (to rounding) unless given; `psd` is taken on trust.
    """

    def __init__(self, matrix: Float[Tensor, "m n"], *, symmetric: bool | None = None, psd: bool = False) -> None:
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise TypeError(f"Dense holds a real matrix, but got {tuple(matrix.shape)} of {matrix.dtype}.")
        m, n = matrix.shape
        self.matrix = matrix
        self.domain, self.codomain = (Space(size, matrix.dtype, matrix.device) for size in (n, m))
        self.symmetric = psd or (_looks_symmetric(matrix) if symmetric is None else symmetric)
        self.psd = psd
        self.source = {"operator": "Dense"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return rows @ self.matrix.T

    def adjoint(self) -> LinearOperator:
        if self.symmetric or self.adjoint_of is not None:
            return self.adjoint_of or self
        other = Dense(self.matrix.T, symmetric=False)
        other.adjoint_of = self
        return other


class Diagonal(LinearOperator):
    """A diagonal matrix, held as the vector of its entries."""

    symmetric = True

    def __init__(self, entries: Float[Tensor, " n"]) -> None:
        if entries.ndim != 1 or not entries.is_floating_point():
            raise TypeError(f"Diagonal holds a real vector, but got {tuple(entries.shape)} of {entries.dtype}.")
        self.entries = entries
        self.domain = self.codomain = Space(len(entries), entries.dtype, entries.device)
        self.psd = bool((entries >= 0).all())
        self.source = {"operator": "Diagonal"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return rows * self.entries


def _looks_symmetric(matrix: Tensor) -> bool:
    if matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        return False
    tolerance = 100 * torch.finfo(matrix.dtype).eps * matrix.abs().max()
    return bool((matrix - matrix.T).abs().max() <= tolerance)
