"""Windows of gradients that keep the best share of each and add what they leave out to the next: EFCP.

Modoranu, Kalinov, Kurtic, Frantar & Alistarh 2023 (arXiv:2306.06098).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvature.linalg.rows import DenseRows, Rows
from curvature.linalg.space import Space
from curvature.linalg.window import Window

ENTRIES = 1 << 18  # gathered at a time: they stay in a cache


class SparseRows(Rows):
    """Rows with few entries that are not zero: `values` (r, k) at `indices` (r, k), which ascend in each row."""

    def __init__(self, indices: Int[Tensor, "r k"], values: Float[Tensor, "r k"], space: Space) -> None:
        super().__init__(len(values), space)
        self.indices, self.values = indices, values

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k r"]:
        few = max(1, ENTRIES // self.values.shape[1])
        pieces = list(zip(self.indices.split(few), self.values.split(few), strict=True))
        if not len(rows):
            return self.values.new_zeros(0, len(self.values), dtype=torch.float64)
        return torch.stack([torch.cat([_gathered(x, *piece) for piece in pieces]) for x in rows])

    def combine(self, coefficients: Float[Tensor, "k r"]) -> Float[Tensor, "k n"]:
        total = torch.zeros(len(coefficients), self.shape[1], dtype=self.values.dtype, device=self.device)
        for sums, weights in zip(total, coefficients.to(self.values.dtype), strict=True):
            for weight, indices, values in zip(weights, self.indices, self.values, strict=True):
                sums.index_add_(0, indices, weight * values)
        return total.to(self.dtype)

    def columns(self, places: slice | Tensor) -> Float[Tensor, "r e"]:
        wanted = _listed(places, self.domain).to(self.indices.dtype).expand(len(self.indices), -1).contiguous()
        found = torch.searchsorted(self.indices, wanted).clamp(max=self.indices.shape[1] - 1)
        there = self.indices.gather(1, found) == wanted
        return torch.where(there, self.values.gather(1, found), 0.0).double()


class FactoredRows(Rows):
    """Rows that are matrices P^T Q of low rank, read row-major: P (m, r, o) and Q (m, r, i)."""

    def __init__(self, P: Float[Tensor, "m r o"], Q: Float[Tensor, "m r i"]) -> None:
        super().__init__(len(P), Space(P.shape[2] * Q.shape[2], P.dtype, P.device))
        self.P, self.Q = P, Q

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        matrices = rows.to(self.dtype).unflatten(1, (self.P.shape[2], self.Q.shape[2]))
        return torch.stack([(self.P * (self.Q @ X.T)).sum((1, 2), dtype=torch.float64) for X in matrices])

    def combine(self, coefficients: Float[Tensor, "k m"]) -> Float[Tensor, "k n"]:
        P, Q = self.P.flatten(0, 1), self.Q.flatten(0, 1)
        weights = coefficients.to(self.dtype).repeat_interleave(self.P.shape[1], dim=1)
        return torch.stack([((P.T * some) @ Q).flatten() for some in weights])

    def columns(self, places: slice | Tensor) -> Float[Tensor, "m e"]:
        wanted, width = _listed(places, self.domain), self.Q.shape[2]
        return (self.P[:, :, wanted // width].double() * self.Q[:, :, wanted % width].double()).sum(1)


class JoinedRows(Rows):
    """Rows that are those of `parts`, one after another."""

    def __init__(self, parts: Sequence[Rows], space: Space) -> None:
        super().__init__(parts[0].shape[0], space)
        self.pieces = parts
        self.sizes = [part.shape[1] for part in parts]

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k r"]:
        pieces = zip(self.pieces, rows.split(self.sizes, dim=1), strict=True)
        return torch.stack([part.apply(some) for part, some in pieces]).sum(0)

    def combine(self, coefficients: Float[Tensor, "k r"]) -> Float[Tensor, "k n"]:
        return torch.cat([part.combine(coefficients) for part in self.pieces], dim=1).to(self.dtype)

    def columns(self, places: slice | Tensor) -> Float[Tensor, "r e"]:
        wanted, start = _listed(places, self.domain), 0
        found = torch.empty(self.shape[0], len(wanted), dtype=torch.float64, device=self.device)
        for part, size in zip(self.pieces, self.sizes, strict=True):
            inside = (wanted >= start) & (wanted < start + size)
            found[:, inside] = part.columns(wanted[inside] - start)
            start += size
        return found


class SparseWindow(Window):
    """The last m gradients by their largest entries, a `share` of them all; the others wait in `error`.

    A row is c, the entries of a = error + g that are largest in size (of equal ones the first), and a - c is the error
    of the next: the sum of the rows so far and the error is that of the gradients. `fisher` is that of the rows; what
    it preconditions is c, which `add` returns. With all entries it is a GradientWindow.

    In float32 it takes 8 m `share` + 4 bytes for each parameter (12 m `share` + 4 beyond 2^31 parameters).

    >>> window = SparseWindow(4, Space(3), share=0.3)
    >>> window.add(torch.tensor([1.0, 3.0, 2.0]))
    tensor([0., 3., 0.])
    >>> window.error
    tensor([1., 0., 2.])
    """

    def __init__(
        self,
        size: int,
        space: Space,
        *,
        share: float = 0.01,
        state: Mapping[str, Tensor] | None = None,
        seen: int = 0,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"The share of entries that are kept is above 0 and at most 1, but got {share}.")
        count, dtype = math.ceil(share * space.size), torch.promote_types(space.dtype, torch.float32)
        super().__init__(size, space, Space(2 * count, dtype, space.device), state, seen)
        self.error, self._values, self._indices = (self.state[name] for name in ("error", "values", "indices"))

    @property
    def rows(self) -> SparseRows:
        return SparseRows(self._indices[: len(self)], self._values[: len(self)], self.space)

    def _empty(self, row: Space) -> Mapping[str, Tensor]:
        shape, integers = (self.size, row.size // 2), torch.int32 if self.space.size < 2**31 else torch.int64
        return {
            "indices": torch.zeros(shape, dtype=integers, device=row.device),
            "values": torch.zeros(shape, dtype=row.dtype, device=row.device),
            "error": torch.zeros(self.space.size, dtype=row.dtype, device=row.device),
        }

    def _keep(self, places: list[int], gradients: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        kept = torch.zeros_like(gradients, dtype=self.error.dtype)
        for place, gradient, row in zip(places, gradients, kept, strict=True):
            self.error += gradient
            indices = _largest(self.error, self._values.shape[1])
            row[indices] = self._values[place] = self.error[indices]
            self._indices[place] = indices
            self.error[indices] = 0
        return kept


class LowRankWindow(Window):
    """The last m gradients, each matrix among the parameters by one of rank `rank`; what is left out waits in `error`.

    `shapes` are those of the parameters, which follow one another in the vectors. One with more than two axes is a
    matrix of its first against all others. Of A = error + G a row holds P P^T A, where P is an orthonormal basis of
    A Q^T for the Q = P^T A of the row before: a step of the power iteration (PowerSGD). Vectors, and matrices that two
    factors would not make smaller, are kept as they are. There is one system for all: with a high enough rank it is a
    GradientWindow. What `fisher` preconditions is the row, which `add` returns.

    Takes m `rank` (o + i) numbers for a matrix (o, i), and one more for each parameter.
    Vogels, Karimireddy & Jaggi 2019 (arXiv:1905.13727) for the factors.

    >>> window = LowRankWindow(4, Space(103), shapes=[torch.Size([10, 10]), torch.Size([3])], rank=2)
    >>> (window.add(torch.ones(103)) - 1).abs().max() < 1e-5
    tensor(True)
    """

    def __init__(
        self,
        size: int,
        space: Space,
        *,
        shapes: Sequence[torch.Size],
        rank: int = 4,
        seed: int = 0,
        state: Mapping[str, Tensor] | None = None,
        seen: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"The rank is 1 at least, but got {rank}.")
        sides = [(shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape)) for shape in shapes]
        if (entries := sum(o * i for o, i in sides)) != space.size:
            raise ValueError(
                f"The shapes have {entries} entries together, but the vectors have {space.size}. "
                "Give those of all parameters, in order."
            )
        self._sides, self._rank, self._seed = sides, rank, seed
        entries = sum(min(rank * (o + i), o * i) for o, i in sides)
        row = Space(entries, torch.promote_types(space.dtype, torch.float32), space.device)
        super().__init__(size, space, row, state, seen)
        self.error = self.state["error"]
        kinds = [_Factors if f"P{place}" in self.state else _Whole for place in range(len(sides))]
        self._parts = [
            kind(*(self.state[f"{field.name}{place}"] for field in fields(kind))) for place, kind in enumerate(kinds)
        ]

    @property
    def rows(self) -> JoinedRows:
        return JoinedRows([part.rows(len(self)) for part in self._parts], self.space)

    def _empty(self, row: Space) -> Mapping[str, Tensor]:
        generator, rank = torch.Generator().manual_seed(self._seed), self._rank
        error = torch.zeros(self.space.size, dtype=row.dtype, device=row.device)
        parts = [
            _Factors.of(self.size, o, i, rank, error, generator)
            if rank * (o + i) < o * i
            else _Whole(error.new_zeros(self.size, o * i))
            for o, i in self._sides
        ]
        named = {f"{name}{place}": tensor for place, part in enumerate(parts) for name, tensor in vars(part).items()}
        return {"error": error, **named}

    def _keep(self, places: list[int], gradients: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        kept = torch.empty_like(gradients, dtype=self.error.dtype)
        sizes = [part.size for part in self._parts]
        for place, gradient, row in zip(places, gradients, kept, strict=True):
            self.error += gradient
            for part, entries, some in zip(self._parts, self.error.split(sizes), row.split(sizes), strict=True):
                some.copy_(part.put(place, entries))
            self.error -= row
        return kept


@dataclass
class _Factors:
    """The rows of one matrix (o, i) by their factors, and the last of Q that was put in."""

    P: Float[Tensor, "m r o"]
    Q: Float[Tensor, "m r i"]
    last: Float[Tensor, "r i"]
    start: Float[Tensor, "r i"]

    @classmethod
    def of(cls, count: int, o: int, i: int, rank: int, like: Tensor, generator: torch.Generator) -> Self:
        """Zeros, and a random start."""
        start = torch.randn(rank, i, generator=generator, dtype=torch.float64).to(like)
        return cls(like.new_zeros(count, rank, o), like.new_zeros(count, rank, i), start, start.clone())

    @property
    def size(self) -> int:
        return self.P.shape[2] * self.Q.shape[2]

    def rows(self, count: int) -> FactoredRows:
        return FactoredRows(self.P[:count], self.Q[:count])

    def put(self, place: int, entries: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        A = entries.view(self.P.shape[2], self.Q.shape[2])
        P = torch.linalg.qr(A @ self.last.T).Q
        Q = P.T @ A
        self.P[place], self.Q[place] = P.T, Q
        seen = Q.norm(dim=1, keepdim=True) > torch.finfo(Q.dtype).eps * A.norm()
        self.last.copy_(torch.where(seen, Q, self.start))  # from zero the iteration would not come back
        return (P @ Q).flatten()


@dataclass
class _Whole:
    """The rows of one parameter as they are."""

    entries: Float[Tensor, "m n"]

    @property
    def size(self) -> int:
        return self.entries.shape[1]

    def rows(self, count: int) -> DenseRows:
        return DenseRows(self.entries[:count])

    def put(self, place: int, entries: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        self.entries[place] = entries
        return entries


def _gathered(x: Float[Tensor, " n"], indices: Int[Tensor, "r k"], values: Float[Tensor, "r k"]) -> Float[Tensor, " r"]:
    """The inner products of x with sparse rows."""
    return (x.index_select(0, indices.flatten()).view(values.shape) * values).sum(1, dtype=torch.float64)


def _largest(entries: Float[Tensor, " n"], count: int) -> Int[Tensor, " k"]:
    """The places of the largest in size, ascending; of equal ones the first, where topk takes any."""
    sizes = entries.abs()
    least = sizes.topk(count, sorted=False).values.min()
    larger, equal = ((sizes > least).nonzero().flatten(), (sizes == least).nonzero().flatten())
    return torch.cat([larger, equal[: count - len(larger)]]).sort().values


def _listed(places: slice | Tensor, space: Space) -> Int[Tensor, " e"]:
    """The places as indices."""
    return places if isinstance(places, Tensor) else torch.arange(space.size, device=space.device)[places]
