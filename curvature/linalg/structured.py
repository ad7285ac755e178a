"""Operators whose structure makes questions exact and cheap."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import Identity, LinearOperator, MatrixFree, Scaled, Sum
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
    """A diagonal matrix, held as the vector of its entries."""

    symmetric = True

    def __init__(
        self, entries: Float[Tensor, " n"], *, space: Space | None = None, source: Mapping[str, Any] | None = None
    ) -> None:
        if entries.ndim != 1 or not entries.is_floating_point():
            raise TypeError(f"Diagonal holds a real vector, but got {tuple(entries.shape)} of {entries.dtype}.")
        self.entries = entries
        self.domain = self.codomain = space or Space(len(entries), entries.dtype, entries.device)
        self.psd = bool((entries >= 0).all())
        self.source = source or {"operator": "Diagonal"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return rows * self.entries


class Kronecker(LinearOperator):
    """left ⊗ right for symmetric factors: a vector, read row-major as a matrix X, becomes left X right.

    A factor is a matrix (m, m), or the vector (m,) of the entries of a diagonal one. Factors (b, m, m) and (b, n, n)
    are b products at once, for b matrices X one after another: a block-diagonal matrix. `psd` is taken on trust.
    """

    symmetric = True

    def __init__(self, left: Tensor, right: Tensor, *, psd: bool = False) -> None:
        if not _is_factor(left) or not _is_factor(right) or _stacked(left) != _stacked(right):
            raise TypeError(
                "Kronecker takes two factors, each a square matrix, a diagonal or a stack of as many square matrices, "
                f"but got {tuple(left.shape)} and {tuple(right.shape)}."
            )
        self.left, self.right, self.psd = left, right, psd
        size = _stacked(left) * left.shape[-1] * right.shape[-1]
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
    is the identity.
    """

    symmetric = True

    def __init__(self, values: Tensor, U: Tensor | None, V: Tensor | None) -> None:
        self.values, self.U, self.V = values, U, V
        self.psd = bool((values >= 0).all())
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
        covered = torch.zeros(space.size, dtype=torch.bool)
        for place in places.values():
            covered[place if isinstance(place, slice) else place.cpu()] = True
        if not covered.all():
            raise ValueError(f"Coordinate {int((~covered).nonzero()[0])} is in no block, and another in more than one.")
        self.blocks = dict(blocks)
        self.places = {name: _as_slice(places[name]) for name in blocks}
        self.domain = self.codomain = space
        self.symmetric = all(block.symmetric for block in blocks.values())
        self.psd = all(block.psd for block in blocks.values())
        self.parts = tuple(blocks.values())
        self.source = source or {}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        product = torch.empty_like(rows)
        for name, block in self.blocks.items():
            place = self.places[name]
            product[:, place] = block.apply(rows[:, place].contiguous())
        return product

    def adjoint(self) -> LinearOperator:
        if self.symmetric:
            return self
        return BlockDiagonal({name: block.adjoint() for name, block in self.blocks.items()}, self.places, self.domain)


def known_trace(A: LinearOperator) -> Tensor | None:
    """The trace where the structure of A tells it."""
    match A:
        case Diagonal():
            return A.entries.double().sum()
        case Dense():
            return A.matrix.diagonal().double().sum()
        case Identity():
            return torch.tensor(float(A.shape[0]), dtype=torch.float64)
        case Kronecker():
            return (_traces(A.left) * _traces(A.right)).sum()
        case Spectral():
            return A.values.double().sum()
        case LowRank():
            return A.values.sum() + A.shift * A.shape[0]
        case Outer() | OuterBlocks():
            return (A.core * A.gram).sum() + A.shift * A.shape[0]
        case BlockDiagonal() | Sum():
            traces = [known_trace(part) for part in A.parts]
            return sum((t for t in traces if t is not None), torch.zeros(())) if None not in traces else None
        case Scaled():
            return None if (known := known_trace(A.parts[0])) is None else A.scale * known
        case _:
            return None


def _traces(factor: Tensor) -> Tensor:
    """The trace of a factor of a Kronecker product, or of each in a stack."""
    return factor.double().sum() if factor.ndim == 1 else factor.double().diagonal(dim1=-2, dim2=-1).sum(-1)


def known_diagonal(A: LinearOperator) -> Float[Tensor, " n"] | None:
    """The diagonal in float64 where the structure of A tells it."""
    match A:
        case Diagonal():
            return A.entries.double()
        case Dense():
            return A.matrix.diagonal().double()
        case Identity():
            return torch.ones(A.shape[0], dtype=torch.float64, device=A.device)
        case Kronecker():
            left, right = (f if f.ndim == 1 else f.diagonal(dim1=-2, dim2=-1) for f in (A.left, A.right))
            return (left.double().unsqueeze(-1) * right.double().unsqueeze(-2)).reshape(-1)
        case Spectral():
            values = A.values.double() if A.U is None else A.U.double().square() @ A.values.double()
            return (values if A.V is None else values @ A.V.double().square().mT).reshape(-1)
        case Outer(rows=Rows() as rows):
            pieces = (slice(start, start + COLUMNS) for start in range(0, A.shape[0], COLUMNS))
            return torch.cat([(A.core @ some * some).sum(0) + A.shift for some in map(rows.columns, pieces)])
        case OuterBlocks():
            return A.diagonal
        case LowRank():
            squares = (value * row.double().square() for value, row in zip(A.values, A.vectors, strict=True))
            return sum(squares, torch.full((A.shape[0],), A.shift, dtype=torch.float64, device=A.device))
        case BlockDiagonal():
            entries = torch.empty(A.shape[0], dtype=torch.float64, device=A.device)
            for name, block in A.blocks.items():
                if (known := known_diagonal(block)) is None:
                    return None
                entries[A.places[name]] = known
            return entries
        case Sum():
            first, second = (known_diagonal(part) for part in A.parts)
            return None if first is None or second is None else first + second
        case Scaled():
            return None if (known := known_diagonal(A.parts[0])) is None else A.scale * known
        case _:
            return None


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
    values, vectors = (factor, None) if factor.ndim == 1 else torch.linalg.eigh((factor + factor.mT) / 2)
    return (values.clamp(min=0) if psd else values), vectors


def _count(place: slice | Tensor, size: int) -> int:
    return len(range(*place.indices(size))) if isinstance(place, slice) else len(place)


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
