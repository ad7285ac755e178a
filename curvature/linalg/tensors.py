"""Matrices that act on tensors axis by axis: what Kronecker and Spectral are for matrices, for any number of axes.

A vector holds a stack of b tensors (d_1, ..., d_k), one after another, each row-major. The factor of an axis is a stack
(b, d, d) of matrices, or None for the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import Space

THIN = 32  # products with so few columns take five times as long as with so few rows, and a copy then costs less
Run = tuple[int, int, int]  # of an axis: where it begins, how many pieces, how long each


def unfolded(X: Float[Tensor, "b ..."], axis: int) -> Float[Tensor, "b d rest"]:
    """Each tensor as a matrix with a row for every place of an axis; `axis` 0 is the one after the stack."""
    X = X.movedim(axis + 1, 1)
    return X.reshape(*X.shape[:2], -1)


def contracted(
    X: Float[Tensor, "b n k"], factors: Sequence[Tensor | None], shape: Sequence[int]
) -> Float[Tensor, "b n k"]:
    """k tensors for each of the stack, multiplied along every axis by the transpose of its factor: (F_1 ⊗ F_2 ...)^T X.

    An axis that was multiplied goes last, behind the k, so that after all of them the order is the first one again,
    nothing was copied to bring an axis to the front, and no factor was repeated for each of the k. Where only the first
    axis has a factor, all others are columns.
    """
    stack, n, k = X.shape
    if factors[0] is not None and all(factor is None for factor in factors[1:]):
        return torch.bmm(factors[0].mT, X.reshape(stack, shape[0], -1)).view(stack, n, k)
    for size, factor in zip(shape, factors, strict=True):
        X = X.reshape(stack, size, -1)
        if factor is None:
            X = X.mT
        elif size < THIN:  # bmm, since what is around it in a product by @ takes longer than a small one
            X = torch.bmm(factor.mT, X).mT
        else:
            X = torch.bmm(X.mT, factor)
    return X.reshape(stack, k, n).mT


def outer(vectors: Sequence[Tensor | None], shape: Sequence[int]) -> Float[Tensor, "b ..."]:
    """Products of entries of vectors (b, d), one for each axis, as tensors (b, *shape); None is a vector of ones."""
    result = None
    for axis, vector in enumerate(vectors):
        if vector is not None:
            factor = vector.view(-1, *(1,) * axis, shape[axis], *(1,) * (len(shape) - axis - 1))
            result = factor if result is None else result * factor
    assert result is not None
    return result.expand(-1, *shape)


def _columns(rows: Float[Tensor, "k bn"], stack: int) -> Float[Tensor, "b n k"]:
    return rows.view(len(rows), stack, -1).permute(1, 2, 0)


def _rows(X: Float[Tensor, "b n k"]) -> Float[Tensor, "k bn"]:
    return X.permute(2, 0, 1).reshape(X.shape[2], -1)


class TensorKronecker(LinearOperator):
    """F_1 ⊗ ... ⊗ F_k for symmetric factors: multiplies each tensor of a stack along every axis. `psd` is taken on
    trust."""

    symmetric = True

    def __init__(self, factors: Sequence[Tensor | None], shape: Sequence[int], *, psd: bool = False) -> None:
        given = {axis: F for axis, F in enumerate(factors) if F is not None}
        stack = len(next(iter(given.values()), ()))
        if not given or any(F.shape != (stack, shape[axis], shape[axis]) for axis, F in given.items()):
            raise TypeError(
                f"TensorKronecker takes stacks of as many square matrices for axes of {tuple(shape)}, "
                f"but got {[None if F is None else tuple(F.shape) for F in factors]}."
            )
        self.factors, self.sizes, self.psd = tuple(factors), tuple(shape), psd
        self.stack, some = stack, next(iter(given.values()))
        self.domain = self.codomain = Space(stack * prod(shape), some.dtype, some.device)
        self.source = {"operator": "TensorKronecker"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return _rows(contracted(_columns(rows, self.stack), self.factors, self.sizes))

    @property
    def trace(self) -> Tensor:
        return torch.stack([self._of_axis(F, size).sum(-1) for F, size in self._axes]).prod(0).sum()

    @property
    def diagonal(self) -> Float[Tensor, " n"]:
        return outer([self._of_axis(F, size) for F, size in self._axes], self.sizes).reshape(-1)

    @cached_property
    def spectral(self) -> TensorSpectral:
        """The same matrix by its eigenvalues; where it is psd, those that rounding made negative are zero."""
        pairs = [None if F is None else torch.linalg.eigh((F + F.mT) / 2) for F in self.factors]
        values = [None if p is None else p[0].clamp(min=0) if self.psd else p[0] for p in pairs]
        return TensorSpectral(outer(values, self.sizes), [None if p is None else p[1] for p in pairs])

    @property
    def _axes(self) -> list[tuple[Tensor | None, int]]:
        return list(zip(self.factors, self.sizes, strict=True))

    def _of_axis(self, factor: Tensor | None, size: int) -> Float[Tensor, "b d"]:
        if factor is not None:
            return factor.diagonal(dim1=-2, dim2=-1).double()
        return torch.ones(self.stack, size, dtype=torch.float64, device=self.device)


class TensorSpectral(LinearOperator):
    """Q diag(values) Q^T with Q = Q_1 ⊗ ... ⊗ Q_k of orthogonal factors, whose columns are eigenvectors; `values`
    (b, d_1, ..., d_k). `psd` is found out by looking unless given."""

    symmetric = True

    def __init__(
        self, values: Float[Tensor, "b ..."], bases: Sequence[Tensor | None], *, psd: bool | None = None
    ) -> None:
        self.values, self.bases = values, tuple(bases)
        self.psd = bool((values >= 0).all()) if psd is None else psd
        self.domain = self.codomain = Space(values.numel(), values.dtype, values.device)
        self.source = {"operator": "TensorSpectral"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        stack, *shape = self.values.shape
        inside = contracted(_columns(rows, stack), self.bases, shape) * self.values.reshape(stack, -1, 1)
        return _rows(contracted(inside, [None if Q is None else Q.mT for Q in self.bases], shape))

    @property
    def diagonal(self) -> Float[Tensor, " n"]:
        stack, *shape = self.values.shape
        squares = [None if Q is None else Q.double().square().mT for Q in self.bases]
        return contracted(self.values.double().reshape(stack, -1, 1), squares, shape).reshape(-1)


@dataclass(frozen=True)
class Tiling:
    """A tensor cut into tiles: each axis into as few pieces as are at most `longest`, and these as equal as can be.

    Pieces of one axis then have at most two lengths, and tiles of one shape are a region. `whole` are axes that are not
    cut.
    """

    shape: tuple[int, ...]
    longest: int
    whole: frozenset[int] = frozenset()

    @cached_property
    def regions(self) -> list[tuple[Run, ...]]:
        return list(product(*(self._runs(axis) for axis in range(len(self.shape)))))

    @property
    def trivial(self) -> bool:
        """Whether the only tile is the tensor itself."""
        return all(count == 1 for region in self.regions for _, count, _ in region) and len(self.regions) == 1

    def sizes(self, region: tuple[Run, ...]) -> tuple[int, ...]:
        """The shape of the tiles of a region."""
        return tuple(size for _, _, size in region)

    def cut(self, X: Float[Tensor, "b ..."]) -> list[Float[Tensor, "t ..."]]:
        """The tiles of each region, those of one tensor after those of another."""
        tiles = [self._tiles(X, region) for region in self.regions]
        return [t.reshape(-1, *self.sizes(region)) for t, region in zip(tiles, self.regions, strict=True)]

    def joined(self, pieces: Sequence[Float[Tensor, "t ..."]], stack: int) -> Float[Tensor, "b ..."]:
        """The tensors that have these tiles."""
        X = pieces[0].new_empty(stack, *self.shape)
        for piece, region in zip(pieces, self.regions, strict=True):
            place = self._tiles(X, region)
            place.copy_(piece.view(place.shape))
        return X

    def _tiles(self, X: Tensor, region: tuple[Run, ...]) -> Tensor:
        """A view (b, counts of tiles, sizes of tiles)."""
        part = X[(slice(None), *(slice(start, start + count * size) for start, count, size in region))]
        split = part.view(len(X), *(n for _, count, size in region for n in (count, size)))
        axes = range(len(region))
        return split.permute(0, *(1 + 2 * axis for axis in axes), *(2 + 2 * axis for axis in axes))

    def _runs(self, axis: int) -> list[Run]:
        length = self.shape[axis]
        pieces = 1 if axis in self.whole else -(-length // self.longest)
        size, longer = divmod(length, pieces)
        runs = [(0, longer, size + 1), (longer * (size + 1), pieces - longer, size)]
        return [run for run in runs if run[1]]


class Tiled(LinearOperator):
    """An operator on the tiles of each region of a stack of tensors, and nothing between tiles: block-diagonal."""

    def __init__(self, parts: Sequence[LinearOperator], tiling: Tiling) -> None:
        self.parts, self.tiling = tuple(parts), tiling
        self.symmetric, self.psd = all(p.symmetric for p in parts), all(p.psd for p in parts)
        self.domain = self.codomain = Space(sum(p.shape[0] for p in parts), parts[0].dtype, parts[0].device)
        self.source = {"operator": "Tiled"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        pieces = self.tiling.cut(rows.reshape(-1, *self.tiling.shape))
        done = [p.apply(x.reshape(len(rows), -1)).reshape(x.shape) for p, x in zip(self.parts, pieces, strict=True)]
        return self.tiling.joined(done, rows.numel() // prod(self.tiling.shape)).view_as(rows)

    def joined(self, vectors: Sequence[Float[Tensor, " m"]]) -> Float[Tensor, " n"]:
        """The vector whose entries at the places of each part these are."""
        pieces = [v.view(-1, *self.tiling.sizes(r)) for v, r in zip(vectors, self.tiling.regions, strict=True)]
        return self.tiling.joined(pieces, self.shape[0] // prod(self.tiling.shape)).view(-1)
