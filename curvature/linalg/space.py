"""Finite-dimensional real vector spaces: how vectors are multiplied, combined and drawn.

A block of vectors is a tensor of rows (k, n), so that every vector is contiguous and a Krylov basis grows by
appending. All inner products of the package go through `Space.inner`, in float64 whatever the vectors are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["signs", "normal", "sphere"]

CHUNK = 1 << 16  # columns upcast at a time: 64 rows of float64 then stay within 32 MiB
CACHED = 1 << 18  # entries upcast at a time on a CPU: they stay in its cache, 2.5 times as fast
PIECE = 1 << 19  # of one row: upcast whole, as vector_norm does, a row of millions costs seven times as much


@dataclass(frozen=True)
class Space:
    """Real vectors of `size` entries of one dtype on one device."""

    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def inner(self, u: Float[Tensor, "k n"], v: Float[Tensor, "l n"]) -> Float[Tensor, "k l"]:
        """All inner products u_i . v_j, accumulated in float64."""
        if u.dtype == torch.float64:
            return u @ v.T
        total = torch.zeros(len(u), len(v), dtype=torch.float64, device=u.device)
        columns = CHUNK if u.is_cuda else min(CHUNK // 2, max(CHUNK // 16, CACHED // max(1, len(u) + len(v))))
        for start in range(0, self.size, columns):
            piece = slice(start, start + columns)
            left = u[:, piece].double()
            total += left @ (left if v is u else v[:, piece].double()).T
        return total

    def roughly(self, u: Float[Tensor, "k n"], v: Float[Tensor, "l n"]) -> Float[Tensor, "k l"]:
        """The same to about the rounding of their dtype, several times as fast: to orthogonalise, not to measure."""
        if u.dtype not in (torch.float32, torch.float64):
            return self.inner(u, v)
        total = torch.zeros(len(u), len(v), dtype=torch.float64, device=u.device)
        for start in range(0, self.size, CHUNK):
            piece = slice(start, start + CHUNK)
            total += u[:, piece] @ v[:, piece].T
        return total

    def diagonal(self, u: Float[Tensor, "k n"], v: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
        """The inner products u_i . v_i, likewise."""
        products = [self.inner(a[None], b[None])[0] for a, b in zip(u, v, strict=True)]
        return torch.cat(products) if products else torch.zeros(0, dtype=torch.float64, device=u.device)

    def norms(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, " k"]:
        """Euclidean norm of each row, accumulated in float64."""
        if rows.dtype == torch.float64:
            return torch.linalg.vector_norm(rows, dim=1)
        squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for square, row in zip(squares, rows, strict=True):
            for piece in row.split(PIECE):
                upcast = piece.double()
                square += torch.dot(upcast, upcast)
        return squares.sqrt()

    def combine(self, coefficients: Float[Tensor, "k l"], rows: Float[Tensor, "l n"]) -> Float[Tensor, "k n"]:
        """The linear combinations sum_j coefficients[i, j] rows[j], in the dtype of the rows."""
        return coefficients.to(rows) @ rows

    def subtract(self, u: Float[Tensor, "k n"], coefficients: Float[Tensor, "k l"], v: Float[Tensor, "l n"]) -> None:
        """Take `combine(coefficients, v)` from u, in place."""
        u.addmm_(coefficients.to(u.dtype), v, alpha=-1)

    def orthonormal(self, rows: Float[Tensor, "k n"], *, small: float = 0.0) -> Float[Tensor, "r n"]:
        """Orthonormal rows with the span of the given ones; what is at most `small` long beyond it is dropped.

        By the Cholesky factor of the Gram matrix, twice (Yamamoto et al. 2015, ETNA 44), where every row has a tenth of
        its length beyond those before it. Else row after row, each cleaned twice of those before it: in a block of
        nearly dependent vectors a factorisation without pivoting would return directions outside the span.
        """
        factor = self._factor(rows, max(small, float(torch.finfo(self.dtype).tiny)))
        if factor is not None:
            rows = self.combine(torch.linalg.inv(factor), rows)
            factor = self._factor(rows, 0.0)
            if factor is not None:
                return self.combine(torch.linalg.inv(factor), rows)
        kept = torch.empty_like(rows)
        count = 0
        for row in rows:
            fresh = row.unsqueeze(0)
            norm = length = float(self.norms(fresh)[0])
            for _ in range(2):
                if length <= max(small, 10 * self.eps * norm):
                    break
                fresh = fresh - self.combine(self.inner(fresh, kept[:count]), kept[:count])
                length = float(self.norms(fresh)[0])
            else:
                kept[count] = fresh[0] / length
                count += 1
        return kept[:count]

    def _factor(self, rows: Float[Tensor, "k n"], small: float) -> Float[Tensor, "k k"] | None:
        """The Cholesky factor of their Gram matrix; None where a row has too little beyond those before it."""
        gram = self.inner(rows, rows)
        factor, failed = torch.linalg.cholesky_ex(gram)
        beyond = factor.diagonal()
        fine = (failed == 0) & (beyond > gram.diagonal().sqrt() / 10).all() & (beyond > small).all()
        return factor if bool(fine) else None

    def draw(self, count: int, *, seed: int, kind: Kind = "signs") -> Float[Tensor, "count n"]:
        """The first `count` vectors of `draws`, as rows."""
        rows = torch.empty(count, self.size, dtype=self.dtype, device=self.device)
        for row, sample in zip(rows, self.draws(seed=seed, kind=kind), strict=False):
            row.copy_(sample)
        return rows

    def draws(self, *, seed: int, kind: Kind = "signs") -> Iterator[Float[Tensor, " n"]]:
        """Independent random vectors without end, with mean 0 and covariance the identity.

        "signs": entries +1 or -1; "normal": standard normal entries; "sphere": uniform on the sphere of radius
        sqrt(size). Drawn on the CPU, in order, so that one seed gives the same vectors on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            if kind == "signs":
                sample = torch.randint(0, 2, (self.size,), generator=generator, dtype=torch.int8) * 2 - 1
            else:
                sample = torch.randn(self.size, generator=generator, dtype=torch.float64)
            if kind == "sphere":
                sample *= self.size**0.5 / torch.linalg.vector_norm(sample)
            yield sample.to(self.device, self.dtype)

    def rounding(self, scale: float) -> float:
        """Norms up to this are rounding, of the entries and of float64 sums over them, in vectors made of some that are
        `scale` long."""
        return 10 * (self.eps + torch.finfo(torch.float64).eps * self.size**0.5) * scale

    @property
    def empty(self) -> Float[Tensor, "0 n"]:
        """No vectors, as a block."""
        return torch.empty(0, self.size, dtype=self.dtype, device=self.device)

    @property
    def eps(self) -> float:
        """The rounding unit of one entry."""
        return torch.finfo(self.dtype).eps
