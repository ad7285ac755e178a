"""Functions of matrices whose structure tells their eigenvalues: powers, log-determinants.

Exact, and as cheap as the largest dense factor's eigendecomposition, which is done once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.measurement import describe
from curvature.linalg.operator import Identity, LinearOperator, Scaled, Sum
from curvature.linalg.outer import Outer, OuterBlocks
from curvature.linalg.structured import BlockDiagonal, Dense, Diagonal, Kronecker, LowRank, Spectral
from curvature.linalg.tensors import TensorKronecker, TensorSpectral, Tiled


class Unstructured(TypeError):
    """The structure of a matrix does not tell what is asked."""


def power(A: LinearOperator, exponent: float, *, damping: float = 0.0) -> LinearOperator:
    """(A + damping I)^exponent for symmetric A of known structure, as an operator of the same structure.

    A is made of Dense, Diagonal, Kronecker, Spectral, LowRank, Outer, OuterBlocks and BlockDiagonal, scaled or plus
    multiples of the identity. Raises ValueError where an eigenvalue has no such power: zero with a negative exponent,
    or a negative one with a fraction.

    >>> power(Diagonal(torch.tensor([4.0, 9.0])), 0.5).entries
    tensor([2., 3.])
    """

    def raised(values: Tensor) -> Tensor:
        values = values + damping
        return _finite(values**exponent, values, f"power {exponent:g}")

    result = mapped(A, raised)
    result.source = {"operator": "power", "exponent": exponent, "damping": damping, "of": describe(A)}
    return result


def eigenvalues(A: LinearOperator) -> Float[Tensor, " n"]:
    """All eigenvalues, ascending, of symmetric A of known structure: see `power`. Of others `eigsh` finds some."""
    return _collected(mapped(A, lambda values: values)).sort().values


def mapped(A: LinearOperator, function: Callable[[Tensor], Tensor]) -> LinearOperator:
    """The matrix with the eigenvectors of A and `function` of its eigenvalues, entry by entry."""
    match A:
        case Diagonal():
            return Diagonal(function(A.entries), space=A.domain)
        case Identity():
            return Diagonal(function(torch.ones(A.shape[0], dtype=A.dtype, device=A.device)), space=A.domain)
        case Spectral():
            return Spectral(function(A.values), A.U, A.V)
        case TensorSpectral():
            return TensorSpectral(function(A.values), A.bases)
        case Tiled():
            return Tiled([mapped(part, function) for part in A.parts], A.tiling)
        case Kronecker() | TensorKronecker():
            return mapped(A.spectral, function)
        case Dense() if A.symmetric:
            return mapped(A.spectral, function)
        case Outer():
            return mapped(A.spectral, function)
        case OuterBlocks():
            return A.mapped(function)
        case LowRank():
            values = function(A.values + A.shift)
            whole = len(values) == A.shape[0]  # no vector is outside
            shift = values.new_zeros(1) if whole else function(values.new_full((1,), A.shift))
            return LowRank(values - shift, A.vectors, shift=float(shift))
        case BlockDiagonal():
            blocks = {name: mapped(block, function) for name, block in A.blocks.items()}
            return BlockDiagonal(blocks, A.places, A.domain)
        case Scaled():
            return mapped(A.parts[0], lambda values: function(A.scale * values))
        case Sum() if (shift := _multiple(A.parts[1])) is not None:
            return mapped(A.parts[0], lambda values: function(values + shift))
        case Sum() if (shift := _multiple(A.parts[0])) is not None:
            return mapped(A.parts[1], lambda values: function(values + shift))
        case _:
            raise Unstructured(
                f"The structure of {A!r} does not tell its eigenvalues. Ask eigsh or spectral_density, or take "
                "Dense(A.dense())."
            )


def _multiple(A: LinearOperator) -> float | None:
    """c where A is c times the identity."""
    match A:
        case Identity():
            return 1.0
        case Scaled() if (inner := _multiple(A.parts[0])) is not None:
            return A.scale * inner
        case _:
            return None


def _collected(A: LinearOperator) -> Tensor:
    """The eigenvalues of what `mapped` returns."""
    match A:
        case Diagonal():
            return A.entries
        case Spectral() | TensorSpectral():
            return A.values.reshape(-1)
        case OuterBlocks():
            return A.eigenvalues
        case LowRank():
            others = A.values.new_full((A.shape[0] - len(A.values),), A.shift)
            return torch.cat([A.values + A.shift, others])
        case _:
            return torch.cat([_collected(block) for block in A.parts])


def _finite(results: Tensor, values: Tensor, what: str) -> Tensor:
    """The results, unless one of the eigenvalues they were made of has none."""
    if not torch.isfinite(results).all():
        least = float(values[~torch.isfinite(results)].min())
        raise ValueError(f"An eigenvalue is {least:.3g}, which has no {what}. Add damping: it goes to each of them.")
    return results
