"""Matrices of few rows, known by what they do: to inner products with vectors, and to combinations of the rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator, MatrixFree
from curvature.linalg.space import Space

COLUMNS = 1 << 16  # upcast at a time
RUN = 256  # products that are summed in their own precision: the sums then lose less than the products have lost
SLAB = 1 << 20  # columns read at a time: so much of a vector stays in a cache
GROUP = 8  # rows read at a time: of more MKL takes a kernel that reads at half the bandwidth of a CPU


class Rows(LinearOperator):
    """A matrix (r, n) that maps vectors to r numbers in float64, and whose columns can be had: see Outer."""

    def __init__(self, count: int, space: Space) -> None:
        self.domain, self.codomain = space, Space(count, torch.float64, space.device)

    @abstractmethod
    def combine(self, coefficients: Float[Tensor, "k r"]) -> Float[Tensor, "k n"]:
        """Linear combinations of the rows, in the dtype of their space."""

    @abstractmethod
    def columns(self, places: slice | Tensor) -> Float[Tensor, "r e"]:
        """Those columns, in float64."""

    def adjoint(self) -> LinearOperator:
        return MatrixFree(self.combine, self.codomain, self.domain, adjoint=self.apply)


class DenseRows(Rows):
    """The rows of a tensor, in any dtype: what is computed is float32 at least, and the dtype of the space."""

    def __init__(self, rows: Float[Tensor, "r n"], space: Space | None = None) -> None:
        super().__init__(len(rows), space or Space(rows.shape[1], rows.dtype, rows.device))
        self.rows = rows
        self.precision = torch.promote_types(torch.promote_types(rows.dtype, self.domain.dtype), torch.float32)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k r"]:
        if len(rows) > GROUP or self.rows.dtype == torch.float64:  # arithmetic takes longer than reading
            return self.domain.inner(self.rows, rows.to(torch.promote_types(rows.dtype, self.rows.dtype))).T
        products = torch.zeros(len(rows), len(self.rows), dtype=torch.float64, device=rows.device)
        for some, piece in self._pieces():
            left, right = (x.to(self.precision) for x in (rows[:, piece], self.rows[some, piece]))
            products[:, some] += _inner(left, right)
        return products

    def combine(self, coefficients: Float[Tensor, "k r"]) -> Float[Tensor, "k n"]:
        coefficients = coefficients.to(self.precision)
        if self.rows.dtype == self.precision:
            return (coefficients @ self.rows).to(self.domain.dtype)
        total = torch.zeros(len(coefficients), self.shape[1], dtype=self.precision, device=self.device)
        for some, piece in self._pieces():
            total[:, piece].addmm_(coefficients[:, some], self.rows[some, piece].to(self.precision))
        return total.to(self.domain.dtype)

    def columns(self, places: slice | Tensor) -> Float[Tensor, "r e"]:
        return self.rows[:, places].double()

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        """The rows and columns of pieces that are read one after the other."""
        group = len(self.rows) if self.rows.is_cuda else GROUP
        columns = SLAB if self.rows.dtype == self.precision else COLUMNS
        for left in range(0, self.shape[1], columns):
            for top in range(0, len(self.rows), group):
                yield slice(top, top + group), slice(left, left + columns)


def _inner(u: Float[Tensor, "k n"], v: Float[Tensor, "l n"]) -> Float[Tensor, "k l"]:
    """u v^T in float64, at the speed of a product in the dtype of both: summed in that over `RUN` columns only."""
    runs = u.shape[1] // RUN
    left, right = (x[:, : runs * RUN].unflatten(1, (runs, RUN)).transpose(0, 1) for x in (u, v))
    rest = u[:, runs * RUN :] @ v[:, runs * RUN :].T
    return torch.bmm(left, right.mT).sum(0, dtype=torch.float64) + rest
