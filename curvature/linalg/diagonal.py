"""The diagonal of an operator and its sums over blocks: exact where structure allows, else with an honest error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.deflation import blocks, columns
from curvature.linalg.exchangeable import XTrace
from curvature.linalg.goal import CAP, Budget, Goal, pursued
from curvature.linalg.known import known_diagonal
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.space import Space
from curvature.progress import Run
from curvature.result import Estimate

DiagonalMethod = Literal["auto", "hutchinson", "xdiag"]
ROUNDING = 10  # times eps: what products may be off by, relative to themselves


def diagonal(
    A: LinearOperator,
    *,
    products: int = 32,
    rtol: float | None = None,
    atol: float | None = None,
    level: float = 0.95,
    max_products: int = CAP,
    max_seconds: float = math.inf,
    method: DiagonalMethod = "auto",
    seed: int = 0,
    run: Run | None = None,
) -> Estimate:
    """The entries (n,) on the diagonal of A with the standard error of each, from `products` products with A.

    Exact where the structure of A allows, or with as many products as A has rows. With `rtol` or `atol` from as many
    as it takes until the half-widths of the intervals at `level` have a Euclidean norm that small, relative to that of
    the diagonal or absolutely: see `trace`.

    "hutchinson" averages z * Az over random signs z: the variance of an entry is the sum of the squares of all others
    in its row; it keeps no vectors. "xdiag" (the "auto" for symmetric A) does that for what is outside the range of A
    on all other vectors, where the diagonal is known: far better where few eigenvalues are large. Its stderr is that of
    dependent estimates, widened until intervals hold.

    Bekas, Kokiopoulou & Saad 2007; Epperly, Tropp & Webber 2024 (arXiv:2301.07825), XDiag.

    >>> from curvature.linalg.structured import Diagonal
    >>> diagonal(Diagonal(torch.tensor([1.0, 2.0]))).value
    tensor([1., 2.], dtype=torch.float64)
    """
    goal = Goal(products, rtol, atol, level, max_products, max_seconds)
    return _sums(as_operator(A), "diagonal", None, goal, method, seed, run)


def block_traces(
    A: LinearOperator,
    places: Mapping[str, slice | Tensor],
    *,
    method: DiagonalMethod = "auto",
    seed: int = 0,
    run: Run | None = None,
    **budget: Unpack[Budget],
) -> Estimate:
    """The traces (b,) of the diagonal blocks of A at `places` (coordinates by name), all from the same products.

    The sums of the entries of `diagonal`, with its options and budget; for layers, `places` is
    `objective.space.places("layer")`. The error of a block has a share from the entries of A between it and the others,
    which for a small block beside large ones is most of it: `by_layer(trace, A)` has none of that, and takes as many
    products for each.

    >>> from curvature.linalg.structured import Diagonal
    >>> block_traces(Diagonal(torch.tensor([1.0, 2.0, 4.0])), {"a": slice(0, 2), "b": slice(2, 3)}).value
    tensor([3., 4.], dtype=torch.float64)
    """
    goal = Goal(**{"products": 32, **budget})
    return _sums(as_operator(A), "block_traces", places, goal, method, seed, run)


class _Sums:
    """Vectors (n,) to the sums of their entries at each of `places`; to themselves for None."""

    def __init__(self, places: Mapping[str, slice | Tensor] | None, space: Space) -> None:
        self.names = () if places is None else tuple(places)
        self.places, self.size = places, space.size if places is None else len(places)
        self.described: dict[str, list[int]] = {}  # how many coordinates, and their sum: which they are
        if places is not None and not places:
            raise ValueError("Expected a block at least, but got none.")
        for name, place in (places or {}).items():
            if not isinstance(place, slice | Tensor):
                raise TypeError(f"A place is a slice or a tensor of coordinates, but {name!r} is {place!r}.")
            index = torch.arange(space.size)[place if isinstance(place, slice) else place.cpu()]
            if len(index) == 0:
                raise ValueError(f"The block {name!r} has no coordinates.")
            self.described[name] = [len(index), int(index.sum())]

    def __call__(self, vector: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
        if self.places is None:
            return vector
        return torch.stack([vector[place].double().sum() for place in self.places.values()])


def _sums(
    A: LinearOperator,
    question: str,
    places: Mapping[str, slice | Tensor] | None,
    goal: Goal,
    method: DiagonalMethod,
    seed: int,
    run: Run | None,
) -> Estimate:
    """The diagonal of A, or its sums over `places`."""
    sums = _Sums(places, A.domain)
    options = {**goal.options, "method": method} | ({} if places is None else {"blocks": sums.described})
    measurement = Measurement(A, question, options=options, seed=seed, run=run)
    if method not in ("auto", "hutchinson", "xdiag"):
        raise ValueError(f"method is 'auto', 'hutchinson' or 'xdiag', but got {method!r}.")
    if method == "xdiag" and not A.symmetric:
        raise ValueError(f"xdiag is for symmetric matrices, but {A!r} is none. Take 'hutchinson'.")
    if (known := known_diagonal(A)) is not None:
        return replace(measurement.exact(sums(known)), names=sums.names)
    plain = method == "hutchinson" or not A.symmetric or goal.most < 4
    estimates = _Averaged(measurement, sums, seed) if plain else _LeftOut(measurement, sums, seed)
    return replace(pursued(measurement, goal, estimates, lambda: _summed(measurement, sums)), names=sums.names)


def _summed(measurement: Measurement, sums: _Sums) -> Estimate:
    """From one product with each vector of the standard basis."""
    n, entries = measurement.operator.shape[0], []
    for some, _ in columns(measurement):
        entries.append(some)
        measurement.report(measurement.products, n, unit="products")
    return measurement.exact(sums(torch.cat(entries)))


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
    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "mean": self.mean, "squares": self.squares}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]

    @property
    def stderr(self) -> Float[Tensor, " n"]:
        """Of the mean, if the vectors were independent."""
        return (self.squares / (self.count - 1) / self.count).sqrt()


class _Averaged:
    """The mean of z * Az over random signs z."""

    looks = 1

    def __init__(self, measurement: Measurement, sums: _Sums, seed: int) -> None:
        self.measurement, self.sums, space = measurement, sums, measurement.operator.domain
        self.draws = space.draws(seed=seed)
        self.moments = _Moments(sums.size, space.device)
        if (state := measurement.resume()) is not None:
            self.moments.load(state)
            next(islice(self.draws, self.moments.count, self.moments.count), None)

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend so many products, with those before; yields the estimate after each block."""
        if self.moments.count > 1:  # of an earlier process
            yield self.estimate()
        for rows in blocks(self.draws, products - self.measurement.products):
            record = self.measurement.once(partial(self._products, rows), rows)
            for vector in record["vectors"]:
                self.moments.add(vector.double())
            self.measurement.keep(self.moments.state)
            yield self.estimate() if self.moments.count > 1 else None

    def estimate(self) -> Estimate:
        """What all vectors so far amount to."""
        count, mean, stderr = self.moments.count, self.moments.mean.clone(), self.moments.stderr
        floor = ROUNDING * self.measurement.operator.domain.eps * mean.abs()
        return self.measurement.estimate(mean, stderr, samples=count, dof=count - 1, floor=floor)

    def _products(self, rows: Float[Tensor, "k n"]) -> dict[str, Tensor]:
        vectors = rows * self.measurement.apply(rows)
        return {"vectors": torch.stack([self.sums(vector) for vector in vectors])}


class _LeftOut:
    """The mean over random signs of estimates that leave one of them out of the sketch."""

    looks = 2

    def __init__(self, measurement: Measurement, sums: _Sums, seed: int) -> None:
        self.sketch, self.sums = XTrace(measurement, seed, kind="signs"), sums

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend so many products, with those before; yields the estimate after the last."""
        for _ in self.sketch.grow(products // 2 - len(self.sketch.probes)):
            yield None
        yield self.estimate()

    def estimate(self) -> Estimate:
        """What all vectors so far amount to."""
        sketch, space = self.sketch, self.sketch.space
        inside = (sketch.basis.double() * sketch.products.double()).sum(0)
        S, moments = sketch.left_out(sketch.factor), _Moments(self.sums.size, space.device)
        if S is None:  # the sketch has all of the range
            floor = ROUNDING * space.eps * float(space.norms(sketch.images).max())
            return sketch.measurement.exact(self.sums(inside), floor=floor)
        T = space.inner(sketch.products, sketch.probes)
        for i, (probe, image) in enumerate(zip(sketch.probes, sketch.images, strict=True)):
            s, t = S[:, i], T[:, i]
            out, through, seen = (
                space.combine(row[None], rows)[0].double()
                for row, rows in ((s, sketch.basis), (s, sketch.products), (t, sketch.basis))
            )
            rest = image.double() - seen + out * float(s @ t)
            moments.add(self.sums(inside - out * through + probe.double() * rest))
        spread = sketch.inflation * moments.stderr
        floor = ROUNDING * space.eps * moments.mean.abs()
        return sketch.measurement.estimate(
            moments.mean, spread, samples=moments.count, dof=moments.count - 1, floor=floor
        )
