"""Operators whose structure makes questions exact and cheap."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import Space

COLUMNS = 1 << 16  # upcast at a time
RUN = 256  # products that are summed in their own precision: the sums then lose less than the products have lost
SLAB = 1 << 20  # columns read at a time: so much of a vector stays in a cache
GROUP = 8  # rows read at a time: of more MKL takes a kernel that reads at half the bandwidth of a CPU


class Dense(LinearOperator):
    """A matrix that is held whole.

    `symmetric` is found out by looking (to rounding) unless given; `psd` is taken on trust.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "m n"],
        *,
        symmetric: bool | None = None,
        psd: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise TypeError(f"Dense holds a real matrix, but got {tuple(matrix.shape)} of {matrix.dtype}.")
        m, n = matrix.shape
        self.matrix = matrix
        self.domain, self.codomain = (Space(size, matrix.dtype, matrix.device) for size in (n, m))
        self.symmetric = psd or (_looks_symmetric(matrix) if symmetric is None else symmetric)
        self.psd = psd
        self.source = source or {"operator": "Dense"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return rows @ self.matrix.T

    def adjoint(self) -> LinearOperator:
        if self.symmetric or self.adjoint_of is not None:
            return self.adjoint_of or self
        other = Dense(self.matrix.T, symmetric=False)
        other.adjoint_of = self
        return other

    @cached_property
    def spectral(self) -> Spectral:
        """The same matrix, which is symmetric, by its eigenvalues."""
        values, vectors = _decomposed(self.matrix, psd=self.psd)
        return Spectral(values.unsqueeze(0), None, vectors)


class Diagonal(LinearOperator):
    """A diagonal matrix, held as the vector of its entries. `psd` is found out by looking unless given."""

    symmetric = True

    def __init__(
        self,
        entries: Float[Tensor, " n"],
        *,
        space: Space | None = None,
        psd: bool | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if entries.ndim != 1 or not entries.is_floating_point():
            raise TypeError(f"Diagonal holds a real vector, but got {tuple(entries.shape)} of {entries.dtype}.")
        self.entries = entries
        self.domain = self.codomain = space or Space(len(entries), entries.dtype, entries.device)
        self.psd = bool((entries >= 0).all()) if psd is None else psd
        self.source = source or {"operator": "Diagonal"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return rows * self.entries


class Kronecker(LinearOperator):
    """left ⊗ right for symmetric factors: a vector, read row-major as a matrix X, becomes left X right.

    A factor is a matrix (m, m), or the vector (m,) of the entries of a diagonal one. Factors (b, m, m) and (b, n, n)
    are b products at once, for b matrices X one after another: a block-diagonal matrix; a factor without a stack is
    that of all. `psd` is taken on trust.
    """

    symmetric = True

    def __init__(self, left: Tensor, right: Tensor, *, psd: bool = False) -> None:
        stacks = {_stacked(factor) for factor in (left, right)} - {1}
        if not _is_factor(left) or not _is_factor(right) or len(stacks) > 1:
            raise TypeError(
                "Kronecker takes two factors, each a square matrix, a diagonal or a stack of as many square matrices, "
                f"but got {tuple(left.shape)} and {tuple(right.shape)}."
            )
        self.left, self.right, self.psd = left, right, psd
        size = max(stacks, default=1) * left.shape[-1] * right.shape[-1]
        self.domain = self.codomain = Space(size, left.dtype, left.device)
        self.source = {"operator": "Kronecker"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        X = rows.view(len(rows), -1, self.left.shape[-1], self.right.shape[-1])
        return _from_right(self.right, _from_left(self.left, X)).reshape(rows.shape)

    @cached_property
    def spectral(self) -> Spectral:
        """The same matrix by its eigenvalues; where it is psd, those that rounding made negative are zero."""
        (left, U), (right, V) = (_decomposed(factor, psd=self.psd) for factor in (self.left, self.right))
        return Spectral(left.unsqueeze(-1) * right.unsqueeze(-2), U, V)


class Spectral(LinearOperator):
    """(U ⊗ V) diag(values) (U ⊗ V)^T with orthogonal U and V: a symmetric matrix whose eigenvalues are at hand.

    `values` (m, n) or a stack (b, m, n), the columns of U (m, m) and V (n, n), or stacks of b, are eigenvectors; None
    is the identity. `psd` is found out by looking unless given.
    """

    symmetric = True

    def __init__(self, values: Tensor, U: Tensor | None, V: Tensor | None, *, psd: bool | None = None) -> None:
        self.values, self.U, self.V = values, U, V
        self.psd = bool((values >= 0).all()) if psd is None else psd
        self.domain = self.codomain = Space(values.numel(), values.dtype, values.device)
        self.source = {"operator": "Spectral"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        X = rows.view(len(rows), -1, *self.values.shape[-2:])
        X = X if self.U is None else self.U.mT @ X
        X = (X if self.V is None else X @ self.V) * self.values
        X = X if self.U is None else self.U @ X
        return (X if self.V is None else X @ self.V.mT).reshape(rows.shape)


class LowRank(LinearOperator):
    """vectors^T diag(values) vectors + shift I, with orthonormal rows `vectors` (r, n) and `values` (r,)."""

    symmetric = True

    def __init__(
        self,
        values: Float[Tensor, " r"],
        vectors: Float[Tensor, "r n"],
        *,
        shift: float = 0.0,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if values.ndim != 1 or vectors.ndim != 2 or len(values) != len(vectors):
            raise TypeError(f"LowRank takes as many values as vectors, but got {values.shape} and {vectors.shape}.")
        self.values, self.vectors, self.shift = values.double(), vectors, shift
        self.psd = shift >= 0 and bool((self.values + shift >= 0).all())
        self.domain = self.codomain = Space(vectors.shape[1], vectors.dtype, vectors.device)
        self.source = source or {"operator": "LowRank", "rank": len(values)}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        space, inside = self.domain, self.domain.inner(rows, self.vectors)
        if self.shift == 0:
            return space.combine(inside * self.values, self.vectors)
        # Apart, and the outside twice: a shift far above the values, as inverses have it, would leave its rounding
        outside = rows - space.combine(inside, self.vectors)
        again = space.inner(outside, self.vectors)
        outside = outside - space.combine(again, self.vectors)
        return space.combine((inside + again) * (self.values + self.shift), self.vectors) + self.shift * outside


class Places(dict[str, slice | Tensor]):
    """Coordinates by name that are known to be all there are, each once: where blocks are is looked at once only."""


class BlockDiagonal(LinearOperator):
    """Operators on disjoint sets of coordinates that together are all; zero between them.

    `blocks` are the operators by name, and `places` says which coordinates each acts on: a slice, or their indices in
    the order in which it takes them.
    """

    def __init__(
        self,
        blocks: Mapping[str, LinearOperator],
        places: Mapping[str, slice | Tensor],
        space: Space,
        *,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = {name: _count(places[name], space.size) for name in blocks}
        wrong = [name for name, block in blocks.items() if block.shape != (sizes[name], sizes[name])]
        if wrong or sum(sizes.values()) != space.size:
            raise ValueError(
                f"The blocks of a {space.size} x {space.size} matrix have {sum(sizes.values())} coordinates"
                + (f", and {wrong[0]} is {blocks[wrong[0]].shape} for {sizes[wrong[0]]} of them." if wrong else ".")
            )
        self.places = places if isinstance(places, Places) else _found({name: places[name] for name in blocks}, space)
        self.blocks = dict(blocks)
        self.domain = self.codomain = space
        self.symmetric = all(block.symmetric for block in blocks.values())
        self.psd = all(block.psd for block in blocks.values())
        self.parts = tuple(blocks.values())
        self.source = source or {}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        product = torch.empty_like(rows)
        for name, block in self.blocks.items():
            place = self.places[name]
            if isinstance(place, slice):
                product[:, place] = block.apply(rows[:, place].contiguous())
            else:
                product.index_copy_(1, place.long(), block.apply(rows.index_select(1, place)))
        return product

    def adjoint(self) -> LinearOperator:
        if self.symmetric:
            return self
        return BlockDiagonal({name: block.adjoint() for name, block in self.blocks.items()}, self.places, self.domain)


def _is_factor(factor: Tensor) -> bool:
    return factor.ndim == 1 or (factor.ndim in (2, 3) and factor.shape[-1] == factor.shape[-2])


def _stacked(factor: Tensor) -> int:
    return len(factor) if factor.ndim == 3 else 1


def _from_left(factor: Tensor, X: Tensor) -> Tensor:
    return factor.unsqueeze(-1) * X if factor.ndim == 1 else factor @ X


def _from_right(factor: Tensor, X: Tensor) -> Tensor:
    return X * factor if factor.ndim == 1 else X @ factor


def _decomposed(factor: Tensor, *, psd: bool) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors of a factor; of a diagonal one None."""
    if factor.ndim > 1 and not factor.isfinite().all():
        raise NonFinite("A matrix has entries that are not finite, and no eigenvalues.", "Check what it is made of.")
    values, vectors = (factor, None) if factor.ndim == 1 else torch.linalg.eigh((factor + factor.mT) / 2)
    return (values.clamp(min=0) if psd else values), vectors


def _count(place: slice | Tensor, size: int) -> int:
    return len(range(*place.indices(size))) if isinstance(place, slice) else len(place)


def _found(places: Mapping[str, slice | Tensor], space: Space) -> Places:
    """The places, of which it was seen that every coordinate is in one."""
    covered = torch.zeros(space.size, dtype=torch.bool)
    for place in places.values():
        covered[place if isinstance(place, slice) else place.cpu()] = True
    if not covered.all():
        raise ValueError(f"Coordinate {int((~covered).nonzero()[0])} is in no block, and another in more than one.")
    return Places({name: _as_slice(place) for name, place in places.items()})


def _as_slice(place: slice | Tensor) -> slice | Tensor:
    """A slice where the indices are those of one: it takes views instead of copies."""
    if isinstance(place, slice) or len(place) == 0:
        return place
    start, stop = int(place[0]), int(place[0]) + len(place)
    return slice(start, stop) if torch.equal(place, torch.arange(start, stop, device=place.device)) else place


def _looks_symmetric(matrix: Tensor) -> bool:
    if matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        return False
    tolerance = 100 * torch.finfo(matrix.dtype).eps * matrix.abs().max()
    return bool((matrix - matrix.T).abs().max() <= tolerance)
