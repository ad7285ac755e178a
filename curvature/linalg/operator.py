"""Matrices known by their action on vectors, and their lazy algebra.

A maker of operators writes one method, `apply`, on rows of vectors; everything else, from `@` to a SciPy view, is
derived from it here. What is asked of an operator (trace, eigsh, ...) are functions in the other files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import TooLarge
from curvature.linalg.space import Space

if TYPE_CHECKING:
    import scipy.sparse.linalg


@dataclass
class Meter:
    """How often an operator has read its data since it was made. The one mutable thing about an operator."""

    passes: int = 0


class LinearOperator(ABC):
    """A matrix A known by its action. Rows are vectors: apply(V)[i] = A V[i].

    `symmetric` and `psd` (symmetric positive semidefinite) are declared by the maker. `parts` are the operators this
    one is composed of; `source` says, JSON-ready, what it was made from.
    """

    domain: Space
    codomain: Space
    symmetric: bool = False
    psd: bool = False
    parts: tuple[LinearOperator, ...] = ()
    meter: Meter | None = None
    source: Mapping[str, Any] = {}
    adjoint_of: LinearOperator | None = None  # what this is the transpose of, where it was made as that
    __array_ufunc__ = None  # so that NumPy leaves `array @ operator` to us

    @abstractmethod
    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        """A times each row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.codomain.size, self.domain.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors it takes."""
        return self.domain.dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors it takes."""
        return self.domain.device

    def adjoint(self) -> LinearOperator:
        """The transpose: itself when symmetric."""
        if self.symmetric:
            return self
        raise TypeError(f"{type(self).__name__} knows no transpose. Give MatrixFree an `adjoint=` function.")

    def leaves(self) -> Iterator[LinearOperator]:
        """The operators this one is ultimately composed of, each once."""
        seen: dict[int, LinearOperator] = {}
        stack: list[LinearOperator] = [self]
        while stack:
            operator = stack.pop()
            if operator.parts:
                stack.extend(reversed(operator.parts))
            else:
                seen[id(operator)] = operator
        yield from seen.values()

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    def __matmul__(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """A @ x for x (n,) or (n, k); for another operator, their lazy product."""
        if isinstance(other, LinearOperator):
            return Product(self, other)
        if not isinstance(other, Tensor):
            raise TypeError(
                f"Expected a torch tensor or an operator behind @, but got {type(other).__name__}. "
                "Use torch.from_numpy, or A.to_scipy() for NumPy arrays."
            )
        if other.ndim not in (1, 2) or len(other) != self.shape[1]:
            raise ValueError(
                f"A of shape {self.shape} multiplies ({self.shape[1]},) or ({self.shape[1]}, k), "
                f"but got {tuple(other.shape)}."
            )
        rows = other.unsqueeze(0) if other.ndim == 1 else other.T.contiguous()
        if not len(rows):
            return other.new_zeros(self.shape[0], 0, dtype=self.codomain.dtype)
        product = self.apply(rows.to(self.dtype))
        return product.squeeze(0) if other.ndim == 1 else product.T

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, Scaled(-1.0, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scale: float) -> LinearOperator:
        return Scaled(float(scale), self) if _is_number(scale) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> LinearOperator:
        return Scaled(1 / float(scale), self) if _is_number(scale) else NotImplemented

    def __radd__(self, other: object) -> LinearOperator:
        return self if other == 0 else NotImplemented  # the start of sum(operators)

    def __rmatmul__(self, other: object) -> Any:
        raise TypeError(f"A {type(other).__name__} @ operator is not defined. Write A.adjoint() @ x.")

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self.adjoint()

    def __neg__(self) -> LinearOperator:
        return Scaled(-1.0, self)

    def dense(self, *, limit: int = 20_000, block: int = 64) -> Float[Tensor, "m n"]:
        """The matrix itself, from its products with the columns of the identity, `block` at a time.

        Raises TooLarge when a side exceeds `limit`: it then takes that many products and limit**2 entries.
        """
        m, n = self.shape
        if max(m, n) > limit:
            raise TooLarge(
                f"The dense matrix is {m} x {n}, beyond the limit of {limit}.",
                f"Ask trace, eigsh or spectral_density instead, or pass dense(limit={max(m, n)}).",
            )
        columns = torch.empty(n, m, dtype=self.codomain.dtype, device=self.codomain.device)
        for start in range(0, n, block):
            count = min(block, n - start)
            rows = torch.zeros(count, n, dtype=self.dtype, device=self.device)
            rows[torch.arange(count), start + torch.arange(count)] = 1
            columns[start : start + count] = self.apply(rows)
        return columns.T

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A SciPy LinearOperator with the same action, on NumPy arrays in main memory."""
        import scipy.sparse.linalg

        def times(operator: LinearOperator, x: np.ndarray) -> np.ndarray:
            vector = torch.from_numpy(np.ascontiguousarray(x)).to(operator.device, operator.dtype)
            return (operator @ vector).cpu().numpy()

        make: Any = scipy.sparse.linalg.LinearOperator  # SciPy picks a subclass by these keywords
        return make(
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
            shape=self.shape,
            matvec=lambda x: times(self, x.reshape(-1)),
            matmat=lambda x: times(self, x),
            rmatvec=lambda x: times(self.adjoint(), x.reshape(-1)),
            rmatmat=lambda x: times(self.adjoint(), x),
        )

    def __repr__(self) -> str:
        facts = "psd " if self.psd else "symmetric " if self.symmetric else ""
        return f"<{facts}{type(self).__name__} {self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device}>"


class MatrixFree(LinearOperator):
    """The operator whose action on rows is the given function."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        domain: Space,
        codomain: Space | None = None,
        *,
        symmetric: bool = False,
        psd: bool = False,
        adjoint: Callable[[Tensor], Tensor] | None = None,
        meter: Meter | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        self.function = function
        self.domain, self.codomain = domain, codomain or domain
        self.symmetric, self.psd = symmetric or psd, psd
        self.transposed = adjoint
        self.meter = meter
        self.source = source or {"operator": "MatrixFree"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return self.function(rows)

    def adjoint(self) -> LinearOperator:
        if self.symmetric or self.transposed is None:
            return super().adjoint()
        if self.adjoint_of is not None:
            return self.adjoint_of
        other = MatrixFree(self.transposed, self.codomain, self.domain, adjoint=self.function, meter=self.meter)
        other.adjoint_of = self
        return other


class Identity(LinearOperator):
    """The identity matrix of a space."""

    symmetric = psd = True

    def __init__(self, space: Space) -> None:
        self.domain = self.codomain = space
        self.source = {"operator": "Identity"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return rows.clone()


class Scaled(LinearOperator):
    """scale * A, lazily."""

    def __init__(self, scale: float, A: LinearOperator) -> None:
        self.scale = scale
        self.domain, self.codomain = A.domain, A.codomain
        self.symmetric, self.psd = A.symmetric, A.psd and scale >= 0
        self.parts = (A,)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return self.parts[0].apply(rows) * self.scale

    def adjoint(self) -> LinearOperator:
        return Scaled(self.scale, self.parts[0].adjoint())


class Sum(LinearOperator):
    """A + B, lazily."""

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A.shape != B.shape:
            raise ValueError(f"Operators of shapes {A.shape} and {B.shape} cannot be added.")
        self.domain, self.codomain = A.domain, A.codomain
        self.symmetric, self.psd = A.symmetric and B.symmetric, A.psd and B.psd
        self.parts = (A, B)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return self.parts[0].apply(rows) + self.parts[1].apply(rows)

    def adjoint(self) -> LinearOperator:
        return Sum(self.parts[0].adjoint(), self.parts[1].adjoint())


class Product(LinearOperator):
    """A B, lazily: B acts first."""

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A.shape[1] != B.shape[0]:
            raise ValueError(f"Operators of shapes {A.shape} and {B.shape} cannot be multiplied.")
        self.domain, self.codomain = B.domain, A.codomain
        self.parts = (A, B)
        self.symmetric = self.psd = _transposes(A, B)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return self.parts[0].apply(self.parts[1].apply(rows))

    def adjoint(self) -> LinearOperator:
        return Product(self.parts[1].adjoint(), self.parts[0].adjoint())


def _is_number(x: object) -> bool:
    return isinstance(x, int | float | np.number) or (isinstance(x, Tensor) and x.ndim == 0)


def _transposes(A: LinearOperator, B: LinearOperator) -> bool:
    """Whether A is known to be the transpose of B."""
    if A is B:
        return A.symmetric
    return A.adjoint_of is B or B.adjoint_of is A


def identity(space: Space) -> Identity:
    """The identity matrix of `space`, for damping: hessian(objective) + 1e-3 * identity(objective.space)."""
    return Identity(space)


def as_operator(A: Any) -> LinearOperator:
    """A itself if it is an operator; else a view of any square object with `.shape` and `@`.

    Such a guest (a tensor, a NumPy array, a SciPy or curvlinops operator) is taken to be symmetric; the Lanczos
    process notices when it is not.
    """
    if isinstance(A, LinearOperator):
        return A
    shape = tuple(getattr(A, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not hasattr(A, "__matmul__"):
        raise TypeError(f"Expected a square operator with .shape and @, but got {type(A).__name__} {shape}.")
    dtype = getattr(A, "dtype", None)
    of_torch = isinstance(dtype, torch.dtype)
    if not (dtype.is_floating_point if of_torch else not np.issubdtype(dtype, np.complexfloating)):
        raise TypeError(f"Expected a matrix of real floating-point numbers, but got {dtype}.")
    if of_torch:
        space = Space(shape[0], dtype, torch.device(getattr(A, "device", "cpu")))
        return MatrixFree(lambda rows: (A @ rows.T).T, space, symmetric=True, source={"operator": type(A).__name__})
    space = Space(shape[0], torch.float32 if dtype == np.float32 else torch.float64)
    return MatrixFree(
        lambda rows: torch.from_numpy(np.ascontiguousarray((A @ rows.numpy().T).T)).to(space.dtype),
        space,
        symmetric=True,
        source={"operator": type(A).__name__},
    )
