"""What the structure of a matrix tells of it without a product."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.linalg.operator import Identity, LinearOperator, Scaled, Sum
from curvature.linalg.outer import Outer, OuterBlocks
from curvature.linalg.rows import COLUMNS, Rows
from curvature.linalg.space import Space
from curvature.linalg.structured import BlockDiagonal, Dense, Diagonal, Kronecker, LowRank, Spectral
from curvature.linalg.tensors import TensorKronecker, TensorSpectral, Tiled


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
        case TensorKronecker():
            return A.trace
        case Spectral() | TensorSpectral():
            return A.values.double().sum()
        case LowRank():
            return A.values.sum() + A.shift * A.shape[0]
        case Outer() | OuterBlocks():
            return (A.core * A.gram).sum() + A.shift * A.shape[0]
        case BlockDiagonal() | Tiled() | Sum():
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
        case OuterBlocks() | TensorKronecker() | TensorSpectral():
            return A.diagonal
        case Tiled():
            parts = [known_diagonal(part) for part in A.parts]
            known = [part for part in parts if part is not None]
            return A.joined(known) if len(known) == len(parts) else None
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


def principal(A: LinearOperator, kept: Bool[Tensor, " n"]) -> LinearOperator:
    """The principal submatrix of symmetric A, in float64: the rows and columns that are `kept`.

    Of the structure of A where that is passed on, else Dense; TooLarge where that is.
    """
    match A:
        case Identity():
            return Identity(Space(int(kept.sum()), torch.float64, A.device))
        case Diagonal():
            return Diagonal(A.entries[kept].double())
        case Outer(rows=Rows() as rows):
            return Outer(rows.columns(kept), A.core, shift=A.shift, psd=A.psd)
        case LowRank():
            return Outer(A.vectors[:, kept].double(), A.values.diag(), shift=A.shift, psd=A.psd)
        case OuterBlocks():
            size = A.rows.shape[2]
            places = {str(i): slice(i * size, min((i + 1) * size, len(kept))) for i in range(len(A.rows))}
            pieces = zip(places.values(), A.rows, A.core, strict=True)
            blocks = [Outer(rows[:, : p.stop - p.start], core, shift=A.shift, psd=A.psd) for p, rows, core in pieces]
            return principal(BlockDiagonal(dict(zip(places, blocks, strict=True)), places, A.domain), kept)
        case BlockDiagonal():
            number = kept.cumsum(0) - 1
            own = {name: kept[place] for name, place in A.places.items()}
            blocks = {name: principal(A.blocks[name], inside) for name, inside in own.items() if inside.any()}
            places = {name: number[A.places[name]][own[name]] for name in blocks}
            return BlockDiagonal(blocks, places, Space(int(kept.sum()), torch.float64, A.device))
        case _:
            return Dense(A.dense()[kept][:, kept].double(), symmetric=True, psd=A.psd)
