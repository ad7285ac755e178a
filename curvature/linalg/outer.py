"""Sums of outer products, which have inverses of the same form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.rows import COLUMNS, GROUP, DenseRows, Rows
from curvature.linalg.space import Space
from curvature.linalg.structured import LowRank


class Outer(LinearOperator):
    """rows^T core rows + shift I for any rows (r, n) and a symmetric core (r, r): a sum of outer products.

    Its inverse is of the same form (Woodbury 1950), so that one of m gradients is inverted in O(m^2 n) and applied in
    O(m n). `rows` are a tensor, or an operator that returns float64; `gram` = rows rows^T in float64, where it is
    known. `psd` is taken on trust.
    """

    symmetric = True

    def __init__(
        self,
        rows: Float[Tensor, "r n"] | LinearOperator,
        core: Float[Tensor, "r r"],
        *,
        shift: float = 0.0,
        gram: Float[Tensor, "r r"] | None = None,
        space: Space | None = None,
        psd: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        count = rows.shape[0]
        if len(rows.shape) != 2 or core.shape != (count, count):
            raise TypeError(f"Outer takes rows (r, n) and a core (r, r), but got {rows.shape} and {core.shape}.")
        self.rows = DenseRows(rows, space) if isinstance(rows, Tensor) else rows
        self.core, self.shift, self.psd = core.double(), shift, psd
        self.domain = self.codomain = self.rows.domain
        if gram is None:
            gram = self.rows.apply(rows if isinstance(rows, Tensor) else rows.adjoint().dense().T)
        self.gram = gram
        self.parts = (self.rows,)
        self.source = source or {"operator": "Outer", "rank": count}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        inside = self.rows.apply(rows) @ self.core
        return self.rows.adjoint().apply(inside).add_(rows, alpha=self.shift)

    def entries(self, i: Tensor, j: Tensor) -> Float[Tensor, " e"]:
        """The entries (i, j) for indices (e,) of rows and columns, each from r numbers."""
        if not isinstance(self.rows, Rows):
            raise TypeError(f"{self!r} is known by products alone, and not by its entries. Multiply with unit vectors.")
        i, j = (_within(places, self.shape[0]) for places in (i, j))
        left, right = self.rows.columns(i), self.rows.columns(j)
        return ((self.core @ left) * right).sum(0) + self.shift * (i == j)

    @cached_property
    def spectral(self) -> LowRank:
        """The same matrix by its eigenvalues."""
        squares, turn = torch.linalg.eigh(self.gram)
        kept = squares > self.domain.eps * squares.max().clamp(min=0)
        lengths, turn = squares[kept].sqrt(), turn[:, kept]
        left = turn * lengths  # core in the orthonormal basis of the rows is left^T core left
        values, vectors = torch.linalg.eigh(left.T @ self.core @ left)
        rows = self.rows.adjoint().apply((turn / lengths @ vectors).T)
        return LowRank(values, self.domain.orthonormal(rows), shift=self.shift)

    def inverse(self, damping: float) -> Outer:
        """(self + damping I)^-1."""
        shift = self.shift + damping
        return Outer(
            self.rows,
            _inverted(self.core, self.gram, shift),
            shift=1 / shift,
            gram=self.gram,
            psd=self.psd and shift > 0,
            source={"operator": "inverse", "damping": damping, "of": dict(self.source)},
        )


class OuterBlocks(LinearOperator):
    """Matrices rows^T core rows + shift I of one size B along the diagonal: Outer, b times at once.

    `rows` (b, r, B) and `core` (b, r, r) are stacks. The space may end within the last block, if rows^T core rows is
    zero from there on. `psd` is taken on trust.
    """

    symmetric = True

    def __init__(
        self,
        rows: Float[Tensor, "b r B"],
        core: Float[Tensor, "b r r"],
        *,
        shift: float = 0.0,
        gram: Float[Tensor, "b r r"] | None = None,
        space: Space | None = None,
        psd: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if rows.ndim != 3 or core.shape != (*rows.shape[:2], rows.shape[1]):
            got = f"{tuple(rows.shape)} and {tuple(core.shape)}"
            raise TypeError(f"OuterBlocks takes rows (b, r, B) and a core (b, r, r), but got {got}.")
        count, _, size = rows.shape
        self.domain = self.codomain = space or Space(count * size, rows.dtype, rows.device)
        if not (count - 1) * size < self.domain.size <= count * size:
            raise ValueError(f"A space of {self.domain.size} is not cut into {count} blocks of {size}.")
        self.rows, self.core, self.shift, self.psd = rows, core.double(), shift, psd
        self.gram = torch.cat([some @ some.mT for some in upcast(rows)]) if gram is None else gram
        self.precision = torch.promote_types(torch.promote_types(rows.dtype, self.domain.dtype), torch.float32)
        self.source = source or {"operator": "OuterBlocks", "blocks": count, "rank": rows.shape[1]}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        count, _, size = self.rows.shape
        x = rows.new_zeros(len(rows), count * size, dtype=self.precision)
        x[:, : self.shape[0]] = rows
        blocks = x.view(len(x), count, size).transpose(0, 1)  # (b, k, B)
        stack = self.rows.to(self.precision)
        inside = (blocks @ stack.mT).double() @ self.core
        x = torch.baddbmm(blocks, inside.to(self.precision), stack, beta=self.shift).transpose(0, 1)
        return x.reshape(len(rows), -1)[:, : self.shape[0]].to(self.dtype)

    def entries(self, i: Tensor, j: Tensor) -> Float[Tensor, " e"]:
        """The entries (i, j) for indices (e,) of rows and columns, each from r numbers of one block."""
        size = self.rows.shape[2]
        i, j = (_within(places, self.shape[0]) for places in (i, j))
        left, right = self.rows[i // size, :, i % size].double(), self.rows[j // size, :, j % size].double()
        inside = torch.einsum("er,ers,es->e", left, self.core[i // size], right)
        return inside * (i // size == j // size) + self.shift * (i == j)

    @property
    def diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal, in float64."""
        pieces = zip(upcast(self.rows), upcast(self.core, like=self.rows), strict=True)
        squares = torch.cat([(core @ some * some).sum(1).flatten() for some, core in pieces])
        return squares[: self.shape[0]] + self.shift

    @cached_property
    def modes(self) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r r"]]:
        """Eigenvalues without the shift, and T of which the columns of rows^T T are their eigenvectors: all zero where
        the rows span less."""
        squares, turn = torch.linalg.eigh(self.gram)
        kept = squares > torch.finfo(torch.float64).eps * squares.shape[-1] * squares.amax(-1, keepdim=True)
        lengths = torch.where(kept, squares, 0.0).sqrt().unsqueeze(-2)
        left = turn * lengths  # core in the orthonormal basis of the rows is left^T core left
        values, vectors = torch.linalg.eigh(left.mT @ self.core @ left)
        values = values.clamp(min=-self.shift) if self.psd else values
        return values, torch.where(lengths > 0, turn / lengths, 0.0) @ vectors

    @property
    def eigenvalues(self) -> Float[Tensor, " n"]:
        """All of them."""
        values = self.modes[0].flatten()
        values = values[values.abs().argsort(descending=True)][: self.shape[0]]  # what is beyond belongs to no vector
        return torch.cat([values, values.new_zeros(self.shape[0] - len(values))]) + self.shift

    def mapped(self, function: Callable[[Tensor], Tensor]) -> OuterBlocks:
        """The matrix with the same eigenvectors and `function` of the eigenvalues."""
        values, turn = self.modes
        inside, outside = function(values + self.shift), function(values.new_full((1,), self.shift))
        core = turn * (inside - outside).unsqueeze(-2) @ turn.mT
        psd = bool((inside >= 0).all() and outside >= 0)
        return OuterBlocks(self.rows, core, shift=float(outside), gram=self.gram, space=self.domain, psd=psd)

    def inverse(self, damping: float) -> OuterBlocks:
        """(self + damping I)^-1."""
        shift = self.shift + damping
        return OuterBlocks(
            self.rows,
            _inverted(self.core, self.gram, shift),
            shift=1 / shift,
            gram=self.gram,
            space=self.domain,
            psd=self.psd and shift > 0,
            source={"operator": "inverse", "damping": damping, "of": dict(self.source)},
        )


def _within(places: Tensor, size: int) -> Tensor:
    """Indices from 0 on; IndexError where there is none such."""
    if len(places) and not -size <= int(places.min()) <= int(places.max()) < size:
        raise IndexError(
            f"Indices run from {int(places.min())} to {int(places.max())}, but the matrix has {size} rows."
        )
    return places % size


def upcast(stack: Float[Tensor, "b r c"], *, like: Tensor | None = None) -> Iterator[Float[Tensor, "f r c"]]:
    """A few matrices of a stack after the other in float64: as many as of `like`."""
    few = max(1, GROUP * COLUMNS // (stack if like is None else like)[0].numel())
    return (some.double() for some in stack.split(few))


def _inverted(core: Float[Tensor, "*b r r"], gram: Float[Tensor, "*b r r"], shift: float) -> Float[Tensor, "*b r r"]:
    """The core of (rows^T core rows + shift I)^-1, for gram = rows rows^T."""
    if shift == 0:
        raise ValueError("A sum of fewer outer products than rows has an eigenvalue 0. Add damping.")
    one = torch.eye(core.shape[-1], dtype=torch.float64, device=core.device)
    found = torch.linalg.solve(one + core @ gram / shift, core) / -(shift**2)
    return (found + found.mT) / 2
