"""The diagonal of an operator: exact where structure allows, else estimated with an honest standard error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.deflation import blocks, columns
from curvature.linalg.exchangeable import XTrace
from curvature.linalg.goal import Goal, pursued
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.structured import known_diagonal
from curvature.progress import Run
from curvature.result import Estimate

DiagonalMethod = Literal["auto", "hutchinson", "xdiag"]


def diagonal(
    A: LinearOperator,
    *,
    products: int = 32,
    method: DiagonalMethod = "auto",
    seed: int = 0,
    run: Run | None = None,
) -> Estimate:
    """The entries (n,) on the diagonal of A with the standard error of each, from `products` products with A.

    Exact where the structure of A allows, or with as many products as A has rows. "hutchinson" averages z * Az over
    random signs z: the variance of an entry is the sum of the squares of all others in its row. "xdiag" (the "auto" for
    symmetric A) does that for what is outside the range of A on all other vectors, where the diagonal is known: far
    better where few eigenvalues are large. Its stderr is that of dependent estimates, widened until intervals hold.

    Bekas, Kokiopoulou & Saad 2007; Epperly, Tropp & Webber 2024 (arXiv:2301.07825), XDiag.

    >>> from curvature.linalg.structured import Diagonal
    >>> diagonal(Diagonal(torch.tensor([1.0, 2.0]))).value
    tensor([1., 2.], dtype=torch.float64)
    """
    A = as_operator(A)
    goal = Goal(products)
    measurement = Measurement(A, "diagonal", options={**goal.options, "method": method}, seed=seed, run=run)
    if method not in ("auto", "hutchinson", "xdiag"):
        raise ValueError(f"method is 'auto', 'hutchinson' or 'xdiag', but got {method!r}.")
    if method == "xdiag" and not A.symmetric:
        raise ValueError(f"xdiag is for symmetric matrices, but {A!r} is none. Take 'hutchinson'.")
    if (known := known_diagonal(A)) is not None:
        return measurement.exact(known)
    if products >= A.shape[0]:
        return _summed(measurement)
    plain = method == "hutchinson" or not A.symmetric or products < 4
    estimates = _Averaged(measurement, seed) if plain else _LeftOut(measurement, seed)
    return pursued(measurement, goal, estimates.upto, lambda: _summed(measurement))


def _summed(measurement: Measurement) -> Estimate:
    """From one product with each vector of the standard basis."""
    n, entries = measurement.operator.shape[0], []
    for some, _ in columns(measurement):
        entries.append(some)
        measurement.report(measurement.products, n, unit="products")
    return measurement.exact(torch.cat(entries))


class _Moments:
    """The mean of vectors and the spread of each entry, vector by vector (Welford 1962)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.count = 0
        self.mean, self.squares = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, vector: Float[Tensor, " n"]) -> None:
        self.count += 1
        away = vector - self.mean
        self.mean += away / self.count
        self.squares += away * (vector - self.mean)

    @property
    def stderr(self) -> Float[Tensor, " n"]:
        """Of the mean, if the vectors were independent."""
        return (self.squares / (self.count - 1) / self.count).sqrt()


class _Averaged:
    """The mean of z * Az over random signs z."""

    def __init__(self, measurement: Measurement, seed: int) -> None:
        self.measurement, space = measurement, measurement.operator.domain
        self.draws = space.draws(seed=seed)
        self.moments = _Moments(space.size, space.device)

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend so many products; yields the estimate after each block."""
        for rows in blocks(self.draws, products - self.measurement.products):
            for row, image in zip(rows, self.measurement.apply(rows), strict=True):
                self.moments.add((row * image).double())
            count = self.moments.count
            if count > 1:
                mean, stderr = self.moments.mean.clone(), self.moments.stderr
                yield self.measurement.estimate(mean, stderr, samples=count, dof=count - 1, floor=0.0)


class _LeftOut:
    """The mean over random signs of estimates that leave one of them out of the sketch."""

    def __init__(self, measurement: Measurement, seed: int) -> None:
        self.sketch = XTrace(measurement, seed, kind="signs")

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend so many products; yields the estimate after the last."""
        for _ in self.sketch.grow(products // 2):
            yield None
        yield self.estimate()

    def estimate(self) -> Estimate:
        """What all vectors so far amount to."""
        sketch, space = self.sketch, self.sketch.space
        inside = (sketch.basis.double() * sketch.products.double()).sum(0)
        S, moments = sketch.left_out(sketch.factor), _Moments(space.size, space.device)
        if S is None:  # the sketch has all of the range
            floor = 10 * space.eps * float(space.norms(sketch.images).max())
            return sketch.measurement.exact(inside, floor=floor)
        T = space.inner(sketch.products, sketch.probes)
        for i, (probe, image) in enumerate(zip(sketch.probes, sketch.images, strict=True)):
            s, t = S[:, i], T[:, i]
            out, through, seen = (
                space.combine(row[None], rows)[0].double()
                for row, rows in ((s, sketch.basis), (s, sketch.products), (t, sketch.basis))
            )
            rest = image.double() - seen + out * float(s @ t)
            moments.add(inside - out * through + probe.double() * rest)
        spread = sketch.inflation * moments.stderr
        return sketch.measurement.estimate(
            moments.mean, spread, samples=moments.count, dof=moments.count - 1, floor=0.0
        )
