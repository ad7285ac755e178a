"""Traces as a part that is known exactly, on a basis of what matters most, and an average over the rest.

With orthonormal rows Q and P = Q^T Q: tr A = tr(Q A Q^T) + E z.(I - P) A (I - P) z for random z with covariance I. The
better Q is aligned with the large eigenvalues, the less is left to chance. Meyer, Musco, Musco & Woodruff 2021
(arXiv:2010.09649) take Q from one product with a random block (Hutch++); Chen & Hallman 2022 (arXiv:2205.01736) from a
Krylov space, whose projection T = Q A Q^T costs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import TooLarge
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.known import known_trace
from curvature.linalg.krylov import Krylov
from curvature.linalg.measurement import Measurement
from curvature.linalg.memory import need_basis
from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import Space
from curvature.result import Estimate

BLOCK = 16  # vectors multiplied at once: one pass over the data for all of them
UNSURE = 3  # z.Az of few large eigenvalues is spread like chi-squared: so many samples know as much as one normal one
WIDTH = 2  # of the Krylov space: narrower follows the large eigenvalues better, wider takes fewer passes


class Basis:
    """Orthonormal `rows` Q and T = Q A Q^T, none at first: what is averaged is then all of the trace."""

    share = 0.0  # of the products of a measurement

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement
        self.growing = False  # whether there may be more rows

    @property
    def space(self) -> Space:
        return self.measurement.operator.domain

    @property
    def rows(self) -> Float[Tensor, "q n"]:
        return self.space.empty

    @property
    def projected(self) -> Float[Tensor, "q q"]:
        return torch.zeros(0, 0, dtype=torch.float64, device=self.space.device)

    def grow(self, products: int) -> Iterator[None]:
        """Spend up to so many products, with those before, where memory allows; yields after each block."""
        yield from ()

    def beside(self, probes: Float[Tensor, "k n"], products: Float[Tensor, "k n"]) -> Float[Tensor, "k q"]:
        """z.A q for the probes z, whose products are A z."""
        return self.space.inner(products, self.rows)  # of a symmetric A


class KrylovBasis(Basis):
    """A block Krylov space: the products with its rows tell T, and make it larger."""

    share = 1 / 2

    def __init__(self, measurement: Measurement, first: int, seed: int) -> None:
        super().__init__(measurement)
        self.krylov = Krylov(measurement, capacity=min(int(first * self.share) + WIDTH, self.space.size))
        self.krylov.start(self.space.draw(WIDTH, seed=derived(seed), kind="sphere"))
        self.growing = True

    @property
    def rows(self) -> Float[Tensor, "q n"]:
        return self.krylov.basis

    @property
    def projected(self) -> Float[Tensor, "q q"]:
        return self.krylov.projected

    def grow(self, products: int) -> Iterator[None]:
        if self.growing and products + WIDTH > self.krylov.capacity:
            try:
                self.krylov.enlarge(products + WIDTH - self.krylov.capacity)
            except TooLarge:  # the rest is averaged
                self.growing = False
        while self.growing and self.krylov.size <= products:
            self.growing = self.krylov.step() and self.krylov.extend()
            yield


class KnownBasis(Basis):
    """Eigenvectors that were found before: their values are the diagonal of T. One product with a mixture of them tells
    whether they are pairs of this matrix; if not, T takes a product with each."""

    def __init__(self, measurement: Measurement, pairs: Eigenpairs) -> None:
        super().__init__(measurement)
        if pairs.vectors.shape[1] != self.space.size:
            raise ValueError(
                f"Eigenvectors of {pairs.vectors.shape[1]} entries do not fit {measurement.operator!r}. "
                "Take those that eigsh found of the same matrix."
            )
        self._rows = pairs.vectors.to(self.space.device, self.space.dtype)
        self._projected = torch.diag(pairs.values.double()).to(self.space.device)
        gram = self.space.inner(self._rows, self._rows)
        if float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) > self.space.eps**0.5:
            raise ValueError("The eigenvectors are not orthonormal. Take them as eigsh returns them.")
        values, residuals = (t.double().to(self.space.device) for t in (pairs.values, pairs.residuals))
        product = measurement.apply(self._rows.sum(0, keepdim=True))
        expected = self.space.combine(values[None], self._rows)
        allowed = 10 * float(residuals.sum()) + self.space.rounding(float(self.space.norms(product)[0]))
        if float(self.space.norms(product - expected)[0]) > allowed:
            self._projected = self.space.inner(self._rows, measurement.apply(self._rows))

    @property
    def rows(self) -> Float[Tensor, "q n"]:
        return self._rows

    @property
    def projected(self) -> Float[Tensor, "q q"]:
        return self._projected


class SketchBasis(Basis):
    """The range of A on random vectors, half of the products; the other half tells T. A need not be symmetric."""

    share = 2 / 3

    def __init__(self, measurement: Measurement, seed: int) -> None:
        super().__init__(measurement)
        self.draws = self.space.draws(seed=derived(seed))
        self.sketched, self.growing = 0, True
        self._rows = self.images = self.space.empty
        self._projected = super().projected

    @property
    def rows(self) -> Float[Tensor, "q n"]:
        return self._rows

    @property
    def projected(self) -> Float[Tensor, "q q"]:
        return self._projected

    def grow(self, products: int) -> Iterator[None]:
        for rows in blocks(self.draws, products // 2 - self.sketched):
            try:
                need_basis(2 * (len(self._rows) + len(rows)), self.space)
            except TooLarge:
                if not len(self._rows):
                    raise
                self.growing = False  # the rest is averaged
                return
            self.sketched += len(rows)
            fresh = beyond(self.space, self.measurement.apply(rows), self._rows)
            self._rows = torch.cat([self._rows, fresh])
            if len(fresh):
                self.images = torch.cat([self.images, self.measurement.apply(fresh)])
            self._projected = self.space.inner(self._rows, self.images)
            yield

    def beside(self, probes: Float[Tensor, "k n"], products: Float[Tensor, "k n"]) -> Float[Tensor, "k q"]:
        return self.space.inner(probes, self.images)


class Deflated:
    """The trace on a basis, and the average of z.Az over random signs z, their components in it taken out, on the rest.

    The vectors are `kept` where the basis may grow after them: components are taken out again, without new products.
    """

    looks = 1

    def __init__(self, basis: Basis, control: LinearOperator | None, *, seed: int, kept: bool) -> None:
        self.basis, self.control, self.kept = basis, control, kept
        self.measurement, self.space = basis.measurement, basis.space
        self.offset = 0.0 if control is None else _need_trace(control)
        self.draws = self.space.draws(seed=seed)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # vectors and their products
        self.done: list[Tensor] = []  # or what they came to
        self.count = 0
        self.square = 0.0  # the sum of |Az|^2

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend so many products, with those before; yields the estimate after each block, once there is one."""
        share = min(int(products * self.basis.share + 1e-9), products - 2)  # two samples are left for an error bar
        for _ in self.basis.grow(share):
            yield self.estimate() if self.count > 1 else None
        if self.kept and not self.basis.growing:
            self.done, self.kept = [self._forms(*pair) for pair in self.pairs], False
            self.pairs.clear()
        for rows in blocks(self.draws, products - self.measurement.products):
            probes = project_out(self.space, rows, self.basis.rows)
            if self.kept:
                images = self.measurement.apply(probes)
                self.pairs.append((probes, images))
                self.square += float(self.space.norms(images).square().sum())
            else:
                record = self.measurement.once(partial(self._averaged, probes), probes)
                self.done.append(record["forms"].cpu())
                self.square += float(record["squares"].sum())
            self.count += len(rows)
            yield self.estimate() if self.count > 1 else None

    def estimate(self) -> Estimate:
        """What all vectors so far amount to."""
        forms = torch.cat([self._forms(*pair) for pair in self.pairs] if self.kept else self.done)
        samples, T = forms[:, 0], self.basis.projected
        if self.control is not None:
            rows = self.basis.rows
            inside = float(self.space.diagonal(rows, self.control.apply(rows)).sum()) if len(rows) else 0.0
            samples = controlled(samples, forms[:, 1] - (self.offset - inside))
        return self.measurement.estimate(
            T.trace().cpu() + samples.mean(),
            samples.std() / self.count**0.5,
            samples=self.count,
            dof=max(1.0, (self.count - (1 if self.control is None else 2)) / UNSURE),
            floor=10 * self.space.eps * (float(T.square().sum()) + self.square / self.count) ** 0.5,
        )

    def _averaged(self, probes: Float[Tensor, "k n"]) -> dict[str, Tensor]:
        images = self.measurement.apply(probes)
        return {"forms": self._forms(probes, images), "squares": self.space.norms(images).square()}

    def _forms(self, probes: Float[Tensor, "k n"], images: Float[Tensor, "k n"]) -> Float[Tensor, "k 2"]:
        """z.Az, and z.Cz for the control C, on the complement of the basis as it is now."""
        rows, T = self.basis.rows, self.basis.projected
        inside = self.space.inner(probes, rows)  # what has come into the basis since they were drawn
        across = self.space.inner(images, rows) + self.basis.beside(probes, images)
        own = self.space.diagonal(probes, images) - (inside * across).sum(1) + (inside @ T * inside).sum(1)
        if self.control is None:
            return torch.stack([own, torch.zeros_like(own)], dim=1).cpu()
        outside = probes - self.space.combine(inside, rows)
        return torch.stack([own, self.space.diagonal(outside, self.control.apply(outside))], dim=1).cpu()


def controlled(samples: Float[Tensor, " r"], control: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """The samples less what a `control` of mean zero tells of them.

    By the slope of their regression on it, for each sample that of all others: which it is independent of, so that its
    mean does not change.
    """
    count = len(samples)
    if count < 3:
        return samples - control
    x, y = control - control.mean(), samples - samples.mean()
    slopes = ((x * y).sum() - count / (count - 1) * x * y) / ((x * x).sum() - count / (count - 1) * x * x)
    return samples - torch.nan_to_num(slopes, 0.0, 0.0, 0.0) * control


def _need_trace(control: LinearOperator) -> float:
    known = known_trace(control)
    if known is None:
        raise ValueError(
            f"A control variate needs an exact trace, and the structure of {control!r} does not tell it. "
            "Take kfac, ekfac or ggn_diagonal of the objective, or Dense(A.dense())."
        )
    return float(known)


def derived(seed: int) -> int:
    """A seed whose numbers have nothing to do with those of `seed`: torch's generators read no more than 32 bits."""
    return int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(seed)))


def project_out(space: Space, rows: Float[Tensor, "k n"], basis: Float[Tensor, "q n"]) -> Float[Tensor, "k n"]:
    """What the rows have outside the span of the basis."""
    return rows - space.combine(space.inner(rows, basis), basis)


def beyond(space: Space, rows: Float[Tensor, "k n"], basis: Float[Tensor, "q n"]) -> Float[Tensor, "r n"]:
    """Orthonormal rows that span what the rows have outside the span of the basis."""
    for _ in range(2):  # the second time what cancellation has blown up
        rows = space.orthonormal(project_out(space, rows, basis))
    return rows


def columns(measurement: Measurement) -> Iterator[tuple[Float[Tensor, " k"], Float[Tensor, " k"]]]:
    """The entries of the diagonal, from one product with each vector of the standard basis, and the squared lengths of
    these products."""
    A = measurement.operator
    n = A.shape[0]
    for start in range(0, n, BLOCK):
        index = torch.arange(start, min(start + BLOCK, n), device=A.device)
        rows = torch.zeros(len(index), n, dtype=A.dtype, device=A.device)
        rows[index - start, index] = 1
        record = measurement.once(partial(_column, measurement, rows, index), rows)
        yield record["entries"], record["squares"]


def _column(measurement: Measurement, rows: Tensor, index: Tensor) -> dict[str, Tensor]:
    products = measurement.apply(rows)
    squares = measurement.operator.domain.norms(products).square()
    return {"entries": products[torch.arange(len(index)), index].double(), "squares": squares}


def blocks(draws: Iterator[Tensor], count: int) -> Iterator[Float[Tensor, "k n"]]:
    """The next `count` vectors, as rows, up to BLOCK at a time."""
    for start in range(0, count, BLOCK):
        yield torch.stack(list(islice(draws, min(BLOCK, count - start))))
