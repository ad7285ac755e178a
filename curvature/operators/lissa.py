"""Inverses times vectors from batches: the Neumann series with another batch in every step.

A product with one batch is that much cheaper than one with all data, and an unbiased estimate of it. Many rough steps
then go as far as few exact ones, up to their noise, which independent repeats show.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted, NotConverged
from curvature.linalg.eigen import eigsh
from curvature.linalg.eigenpairs import Which
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.operators.subsamples import Matrix
from curvature.progress import Run
from curvature.result import Estimate

ROUGH = 0.1  # relative residual of the largest eigenvalues: it is added to them
DIVERGED = 10.0  # times as long as the sum of a series whose terms fall as slowly as they may


def lissa(
    matrix: Matrix,
    objective: Objective,
    b: Float[Tensor, " n"],
    *,
    damping: float,
    steps: int,
    repeats: int = 8,
    scale: float | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> Estimate:
    """x with (H + damping I) x = b for H = `matrix(objective)`, by `steps` h <- b + h - (H_j + damping I) h / scale
    from h = b, each with the matrix H_j of another batch, and x = h / scale.

    Batches are drawn in proportion to their terms, and all are kept in memory. The value is the mean of independent
    repeats. `floor` bounds the bias of so few steps, entry by entry: (1 - damping / scale)^steps of the solution, so
    that they should be several times scale / damping. More steps make x no less noisy, more repeats do.

    `damping` is what is added to the eigenvalues of H. In the papers, h <- b + (1 - delta) h - H_j h / scale, it is
    scale times delta. `scale` is above the eigenvalues of every H_j + damping I; if it is not given it is found, by
    some products with each. Raises ValueError where H + damping I is not positive definite, and NotConverged where h
    diverges. Where all data can be read often `solve` takes far fewer products.

    Agarwal, Bullins & Hazan 2017 (arXiv:1602.03943); Koh & Liang 2017 (arXiv:1703.04730).

    >>> from curvature import SquaredError, ggn
    >>> x, line = torch.tensor([[1.0], [2.0]]), torch.nn.Linear(1, 1, bias=False)
    >>> objective = Objective.of(line, SquaredError(scale=1), [(x, x)])
    >>> lissa(ggn, objective, torch.ones(1), damping=0.5, steps=50).value  # 1 / (2.5 + damping)
    tensor([0.3333])
    """
    need_objective("lissa", objective)
    A = matrix(objective)
    _check(A, b, damping, steps, repeats, scale)
    objective.check()
    parts = objective.split()
    options = {"damping": damping, "steps": steps, "repeats": repeats}
    measurement = Measurement(A, "lissa", options=options, seed=seed, run=run)
    terms = torch.tensor([count for count, _ in parts], dtype=torch.float64)
    series = Series(measurement, [matrix(part) for _, part in parts], terms, b.to(A.device, A.dtype), damping, steps)
    seeds = torch.randint(2**32, (repeats,), generator=torch.Generator().manual_seed(seed)).tolist()
    try:
        series.measure(scale)
        for done, drawn in enumerate(seeds, 1):
            series.sample(drawn)
            measurement.report(done, repeats, unit="repeats")
    except KeyboardInterrupt as stop:
        if len(series.samples) < 2:
            raise KeyboardInterrupt from stop
        raise Interrupted(replace(series.estimate(), complete=False)) from stop
    return series.estimate()


class Series:
    """Independent samples of x, and what bounds the eigenvalues: `scale` is above all of H_j + damping I, `least` below
    those of H + damping I."""

    def __init__(
        self,
        measurement: Measurement,
        matrices: list[LinearOperator],
        terms: Float[Tensor, " j"],
        b: Float[Tensor, " n"],
        damping: float,
        steps: int,
    ) -> None:
        self.measurement, self.matrices, self.terms, self.b = measurement, matrices, terms, b.unsqueeze(0)
        self.damping, self.steps = damping, steps
        self.scale = self.least = 0.0
        self.samples: list[Float[Tensor, " n"]] = []

    def measure(self, scale: float | None) -> None:
        """Find the bounds; the upper one may be given."""
        H = self.measurement.operator
        smallest = 0.0 if H.psd else min(0.0, self._end(H, "smallest", len(self.matrices)))
        self.least = self.damping + smallest
        if self.least <= 0:
            raise ValueError(
                f"{H!r} has the eigenvalue {smallest:.3g}, and with damping={self.damping:g} is not positive definite. "
                "Raise the damping, or take the GGN."
            )
        self.scale = scale or self.damping + max(self._end(H_j, "largest") for H_j in self.matrices)
        self.measurement.options["scale"] = self.scale

    def sample(self, seed: int) -> None:
        """Add one."""
        record = self.measurement.once(lambda: {"x": self._solved(seed)}, self.b)
        self.samples.append(record["x"])

    def estimate(self) -> Estimate:
        """Their mean."""
        x, count = torch.stack(self.samples), len(self.samples)
        mean = x.mean(0)
        left = (1 - min(1.0, self.least / self.scale)) ** (self.steps + 1)  # of the solution, at most
        estimate = self.measurement.estimate(
            mean,
            x.double().std(0) / count**0.5,
            samples=count,
            dof=count - 1,
            floor=float(mean.norm()) * left / (1 - left) if left < 1 else math.inf,
        )
        passes = math.ceil(self.measurement.products / len(self.matrices))  # products are with single batches
        return replace(estimate, cost=replace(estimate.cost, passes=passes))

    def _solved(self, seed: int) -> Float[Tensor, " n"]:
        b, generator = self.b, torch.Generator().manual_seed(seed)
        longest = DIVERGED * float(b.norm()) * self.scale / self.least
        h = b
        for j in torch.multinomial(self.terms, self.steps, replacement=True, generator=generator).tolist():
            h = b + h - (self.matrices[j].apply(h).detach() + self.damping * h) / self.scale
            self.measurement.products += 1
            if not float(h.norm()) <= longest:
                raise NotConverged(
                    f"The series diverges: it is {DIVERGED:g} times as long as it could become. scale={self.scale:.3g} "
                    "is too small for a batch, or its matrix has negative eigenvalues.",
                    "Leave scale to be found, raise the damping, or take the GGN.",
                )
        return h[0] / self.scale

    def _end(self, H: LinearOperator, which: Which, batches: int = 1) -> float:
        """The eigenvalue at one end, and its residual beyond: a bound, as a rule."""
        pairs = eigsh(H, 1, which=which, rtol=ROUGH)
        self.measurement.products += batches * pairs.cost.products
        value, residual = float(pairs.values[0]), float(pairs.residuals[0])
        return value + residual if which == "largest" else value - residual


def _check(A: LinearOperator, b: Tensor, damping: float, steps: int, repeats: int, scale: float | None) -> None:
    if not isinstance(b, Tensor) or b.shape != A.shape[:1] or not b.is_floating_point() or not b.isfinite().all():
        shown = f"{tuple(b.shape)} of {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b is a vector of {A.shape[0]} finite numbers, but got {shown}. Ask for one at a time.")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping is positive and finite, but got {damping}. The steps it takes go with 1 / damping.")
    if steps < 1 or repeats < 2:
        raise ValueError(f"Expected a step, and 2 repeats for an error bar, but got steps={steps}, repeats={repeats}.")
    if scale is not None and not damping < scale < math.inf:
        raise ValueError(
            f"scale is above the eigenvalues of every batch plus damping={damping:g}, but got {scale}. "
            "Leave it to be found."
        )
