"""Traces in which every random vector serves both as sketch and as probe: XTrace and XNysTrace.

For each vector in turn the sketch of all others is summed exactly and the rest is estimated with that vector alone; the
average over vectors is the estimate. Epperly, Tropp & Webber 2024 (arXiv:2301.07825).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.deflation import beyond, blocks
from curvature.linalg.measurement import Measurement
from curvature.linalg.space import Kind
from curvature.result import Estimate


class LeftOut:
    """The average over random vectors of estimates that leave one of them out of the sketch.

    Where that has nearly the whole range of A, their spread may be small by chance, and once more vectors are drawn it
    no longer is.
    """

    looks = 2

    def __init__(self, sketch: XTrace | XNysTrace) -> None:
        self.sketch = sketch

    def upto(self, products: int) -> Iterator[Estimate]:
        """Spend so many products, with those before; yields the estimate after each block."""
        sketch = self.sketch
        for count in sketch.grow(max(2, products // sketch.each) - len(sketch.probes)):
            estimates = sketch.estimates()
            yield sketch.measurement.estimate(
                estimates.mean(),
                sketch.inflation * estimates.std() / count**0.5,
                samples=count,
                dof=count - 1,
                floor=10 * sketch.space.eps * float(sketch.space.norms(sketch.images).max()),
            )


class XTrace:
    """The estimates that leave one of q random vectors out of the sketch, from 2 q products. A is symmetric."""

    each = 2  # products for a vector
    # The estimates are not independent. Student's interval with their standard error, as if they were, would be half as
    # wide as what holds the truth 95 times in 100 (for flat, polynomial, exponential and stepped spectra).
    inflation = 2.0

    def __init__(self, measurement: Measurement, seed: int, *, kind: Kind = "sphere") -> None:
        self.measurement, self.space = measurement, measurement.operator.domain
        self.draws = self.space.draws(seed=seed, kind=kind)
        self.probes = self.images = self.basis = self.products = self.space.empty
        self.dependent = False

    def grow(self, count: int) -> Iterator[int]:
        """Take so many vectors more; yields how many there are after each block."""
        for rows in blocks(self.draws, count):
            images = self.measurement.apply(rows)
            fresh = beyond(self.space, images, self.basis)
            self.dependent |= len(fresh) < len(rows)  # the sketch has all of the range
            products = self.measurement.apply(fresh) if len(fresh) else fresh
            for name, more in (("probes", rows), ("images", images), ("basis", fresh), ("products", products)):
                setattr(self, name, torch.cat([getattr(self, name), more]))
            yield len(self.probes)

    @property
    def factor(self) -> Float[Tensor, "q q"]:
        """R, upper triangular, of the images in the basis."""
        return self.space.inner(self.basis, self.images)

    def left_out(self, R: Float[Tensor, "q q"]) -> Float[Tensor, "q q"] | None:
        """Of each vector the direction in the basis that the images of all others do not reach, as columns; None where
        they reach all of it, and the sketch has the whole range of A."""
        size = R.diagonal().abs()
        if self.dependent or float(size.min()) < 10 * self.space.eps * float(size.max()) * self.space.size**0.5:
            return None
        S = torch.linalg.solve_triangular(R.T, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=False)
        return S / torch.linalg.vector_norm(S, dim=0)

    def estimates(self) -> Float[Tensor, " q"]:
        """One for each vector; all the trace on the sketch, where that has the whole range of A."""
        inner, n, q = self.space.inner, self.space.size, len(self.probes)
        H, W = inner(self.basis, self.products), inner(self.basis, self.probes)
        T, R = inner(self.products, self.probes), self.factor
        S = self.left_out(R)
        if S is None:
            return H.trace().expand(q)
        C = W - S * (S * W).sum(0)
        scale = (n - q + 1) / (self.space.norms(self.probes).square() - C.square().sum(0))
        rest = (W * R).sum(0) - 2 * (C * T).sum(0) + (C * (H @ C)).sum(0)
        return H.trace() - (S * (H @ S)).sum(0) + scale * rest


class XNysTrace:
    """The same with Nystrom's approximation of psd A, from q products."""

    each = 1

    def __init__(self, measurement: Measurement, seed: int) -> None:
        if not measurement.operator.psd:
            raise ValueError(f"xnystrace is for positive semidefinite matrices, but {measurement.operator!r} is none.")
        self.measurement, self.space = measurement, measurement.operator.domain
        self.draws = self.space.draws(seed=seed, kind="sphere")
        self.probes = self.images = self.space.empty

    def grow(self, count: int) -> Iterator[int]:
        """Take so many vectors more; yields how many there are after each block."""
        for rows in blocks(self.draws, count):
            self.images = torch.cat([self.images, self.measurement.apply(rows)])
            self.probes = torch.cat([self.probes, rows])
            yield len(self.probes)

    @property
    def inflation(self) -> float:
        """As for XTrace: more where the vectors span more of the space."""
        return 1.85 + 1.7 * len(self.probes) / self.space.size

    def estimates(self) -> Float[Tensor, " q"]:
        """One for each vector."""
        inner, norms, n, q = self.space.inner, self.space.norms, self.space.size, len(self.probes)
        shift = self.space.eps * float(norms(self.images).square().sum()) ** 0.5 / n**0.5
        if shift == 0:
            return torch.zeros(q, dtype=torch.float64)
        images = self.images + shift * self.probes  # which keeps the factorisation from breaking down
        M = inner(self.probes, images)
        L, failed = torch.linalg.cholesky_ex((M + M.T) / 2)
        if failed:
            raise ValueError(f"{self.measurement.operator!r} says that it is psd, but is not. Take another method.")
        inverse = torch.linalg.solve_triangular(L, torch.eye(q, dtype=L.dtype, device=L.device), upper=False)
        half = self.space.combine(inverse, images)
        whole = self.space.combine(inverse.T, half)
        D = inverse.square().sum(0)
        scale = (n - q + 1) * torch.linalg.inv(inner(self.probes, self.probes)).diagonal()
        return norms(half).square().sum() - norms(whole).square() / D + scale / D - shift * n
