"""Traces of functions of a symmetric matrix, and what is made of them: log-determinants, norms, moments, ranks.

With orthonormal rows Q from a Krylov space and z uniform on the sphere of radius sqrt(n - q) in the complement of Q:
tr f(A) = tr(Q f(A) Q^T) + E z.f(A) z. Both are functions of the projections of A on Krylov spaces: of the one that Q is
from, and of one that starts with z (Ubaru, Chen & Saad 2017). Chen & Hallman 2022 (arXiv:2205.01736).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.deflation import UNSURE, WIDTH, derived, project_out
from curvature.linalg.functions import eigenvalues
from curvature.linalg.goal import Budget, Goal, pursued
from curvature.linalg.krylov import Krylov
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.progress import Run
from curvature.result import Estimate

PROBES = 8  # that advance together
STEPS = 100  # at most, with one block of them
SMALL = 0.1  # of the error of the probes: what is left to the steps when they are enough
SLOWEST = math.log(1.5) / math.log(2)
LOOKS = (6, 9, 13, 19, 28, 42, 63)  # steps after which to see whether they are


@dataclass(frozen=True)
class Functional:
    """What `answer` (..., c) -> (...) makes of the traces of c `functions` of the eigenvalues, (d,) -> (c, d).

    `degree` is that of the functions where they are polynomials.
    """

    functions: Callable[[Tensor], Tensor]
    answer: Callable[[Tensor], Tensor]
    degree: int | None = None

    def of(self, values: Float[Tensor, " d"]) -> Float[Tensor, "c d"]:
        """The functions of eigenvalues; ValueError where one has none."""
        results = self.functions(values.double())
        finite = torch.isfinite(results).all(0)
        if not finite.all():
            raise ValueError(
                f"An eigenvalue is {float(values[~finite].min()):.3g}, or nearly so, where the function is not finite. "
                "Add damping: it goes to each of them."
            )
        return results


def trace_of(
    function: Callable[[Tensor], Tensor],
    A: LinearOperator,
    *,
    seed: int = 0,
    run: Run | None = None,
    **budget: Unpack[Budget],
) -> Estimate:
    """The sum of `function` over all eigenvalues of symmetric A, tr f(A): exact where the structure of A tells them.

    `function` maps eigenvalues (d,) to (..., d); the estimate has the leading shape. The budget is that of `trace`, of
    256 products if nothing else is said, and exact from as many as A has rows. A third of it makes a Krylov space,
    which sums over the large eigenvalues; random vectors on the rest are given as many steps as the function takes to
    settle. What more steps might change is part of every interval. They are few for smooth functions, and many where a
    function bends within a small share of the range, as log does near 0.

    >>> from curvature import Diagonal
    >>> trace_of(torch.exp, Diagonal(torch.zeros(3))).value
    tensor(3., dtype=torch.float64)
    """

    def functions(values: Tensor) -> Tensor:
        return function(values).reshape(-1, len(values))

    values = function(torch.linspace(0.125, 1, 8, dtype=torch.float64))  # which function it is
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[-1] != 8:
        raise ValueError("The function of eigenvalues (d,) has to return a tensor (..., d), entry by entry.")
    shape = values.shape[:-1]
    functional = Functional(functions, lambda traces: traces.reshape((*traces.shape[:-1], *shape)))
    return _estimated("trace_of", functional, A, budget, seed, run, function=values.tolist())


def logdet(
    A: LinearOperator, *, damping: float = 0.0, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]
) -> Estimate:
    """The logarithm of the determinant of A + damping I, which is positive definite: exact where structure tells it.

    Else `trace_of` the logarithm, with its budget. The steps it takes go with the root of the condition number.

    >>> from curvature import Diagonal
    >>> logdet(Diagonal(torch.tensor([1.0, 2.0]))).value
    tensor(0.6931, dtype=torch.float64)
    """

    def functions(t: Tensor) -> Tensor:
        return torch.where(t + damping > 0, t + damping, math.nan).log().unsqueeze(0)

    return _estimated("logdet", Functional(functions, _only), A, budget, seed, run, damping=damping)


def spectral_moments(
    A: LinearOperator, highest: int = 4, *, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]
) -> Estimate:
    """The means (highest,) of the powers 1, ..., `highest` of the eigenvalues of symmetric A, tr(A^p) / n.

    A random vector tells two of them for every product with it. The budget is that of `trace`, of 256 products if
    nothing else is said; tolerances are in the Euclidean norm.

    >>> from curvature import Diagonal
    >>> spectral_moments(Diagonal(torch.tensor([1.0, 3.0])), 2).value
    tensor([2., 5.], dtype=torch.float64)
    """
    if highest < 1:
        raise ValueError(f"highest is a power, 1 or more, but got {highest}.")
    A, powers = as_operator(A), range(1, highest + 1)
    functional = Functional(
        lambda t: torch.stack([t**p for p in powers]), lambda traces: traces / A.shape[0], degree=highest
    )
    estimate = _estimated("spectral_moments", functional, A, budget, seed, run, highest=highest)
    return replace(estimate, names=tuple(f"moment {p}" for p in powers))


def frobenius_norm(A: LinearOperator, *, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]) -> Estimate:
    """The root of the sum of the squared eigenvalues of symmetric A, which is that of the squared entries.

    Of other matrices it is the root of `trace(A.adjoint() @ A)`. The budget is that of `trace`, of 256 products if
    nothing else is said; a random vector takes one.

    >>> from curvature import Diagonal
    >>> frobenius_norm(Diagonal(torch.tensor([3.0, 4.0]))).value
    tensor(5., dtype=torch.float64)
    """
    functional = Functional(lambda t: t.square().unsqueeze(0), lambda traces: _only(traces).clamp(min=0).sqrt(), 2)
    return _estimated("frobenius_norm", functional, A, budget, seed, run)


def participation_ratio(
    A: LinearOperator, *, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]
) -> Estimate:
    """(sum |value|)^2 / sum value^2 over the eigenvalues of symmetric A: how many of them carry its trace.

    Between 1 and the rank. The error is that of a ratio of sums over the same random vectors, by the jackknife. Budget
    as in `trace_of`; where A is psd, a vector takes one product.

    >>> from curvature import Diagonal
    >>> participation_ratio(Diagonal(torch.ones(5))).value
    tensor(5., dtype=torch.float64)
    """
    A = as_operator(A)
    functional = Functional(
        lambda t: torch.stack([t if A.psd else t.abs(), t.square()]),
        lambda traces: traces[..., 0].square() / traces[..., 1],
        degree=2 if A.psd else None,
    )
    return _estimated("participation_ratio", functional, A, budget, seed, run)


def effective_rank(A: LinearOperator, *, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]) -> Estimate:
    """exp(-sum p ln p) for p = |value| / sum |value| over the eigenvalues of symmetric A: between 1 and the rank.

    Never less than the participation ratio. The error is by the jackknife; budget as in `trace_of`.

    Roy & Vetterli 2007.

    >>> from curvature import Diagonal
    >>> effective_rank(Diagonal(torch.ones(4))).value
    tensor(4., dtype=torch.float64)
    """
    A = as_operator(A)

    def functions(t: Tensor) -> Tensor:
        return torch.stack([t.abs(), torch.xlogy(t.abs(), t.abs())])

    def answer(traces: Tensor) -> Tensor:
        return (traces[..., 0].log() - traces[..., 1] / traces[..., 0]).exp()

    return _estimated("effective_rank", Functional(functions, answer), A, budget, seed, run)


def effective_dimension(
    A: LinearOperator, *, damping: float | Tensor, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]
) -> Estimate:
    """tr A (A + damping I)^-1 for psd A, the sum of value / (value + damping): how many directions of A the damping
    leaves. Between 0 and the rank, and falls with the damping.

    `damping` is positive; for a tensor of several the estimate has its shape, from one run. Where A is not declared psd
    negative eigenvalues count for nothing. Budget as in `trace_of`.

    MacKay 1992 (Neural Computation 4); Maddox, Benton & Wilson 2020 (arXiv:2003.02139).

    >>> from curvature import Diagonal
    >>> effective_dimension(Diagonal(torch.tensor([1.0, 3.0, 0.0])), damping=1.0).value
    tensor(1.2500, dtype=torch.float64)
    """
    dampings = torch.as_tensor(damping, dtype=torch.float64).cpu()
    if not ((dampings > 0) & dampings.isfinite()).all():
        raise ValueError(f"damping is positive and finite, but got {damping}. Of damping 0 this would be the rank.")

    def functions(t: Tensor) -> Tensor:
        t = t.clamp(min=0)
        return t / (t + dampings.reshape(-1, 1).to(t.device))

    def answer(traces: Tensor) -> Tensor:
        return traces.reshape((*traces.shape[:-1], *dampings.shape))

    functional = Functional(functions, answer)
    return _estimated("effective_dimension", functional, A, budget, seed, run, damping=dampings.tolist())


def _only(traces: Float[Tensor, "... 1"]) -> Float[Tensor, ...]:
    return traces[..., 0]


def _estimated(
    question: str,
    functional: Functional,
    A: LinearOperator,
    budget: Budget,
    seed: int,
    run: Run | None,
    **options: object,
) -> Estimate:
    least = 96 if functional.degree else 192  # half, or a third, of it makes the Krylov space
    A, goal = as_operator(A), Goal(**{"products": 256, "least": least, **budget})
    if A.psd and functional.degree is None:  # what is negative is rounding; of polynomials even such nodes are right
        of_any = functional.functions
        functional = replace(functional, functions=lambda t: of_any(t.clamp(min=0)))
    measurement = Measurement(A, question, options={**options, **goal.options}, seed=seed, run=run)
    if not A.symmetric:
        raise ValueError(f"{question} needs a symmetric operator, but got {A!r}. Take A.adjoint() @ A, say.")
    try:
        known = eigenvalues(A)
    except TypeError:  # its structure does not tell them
        quadrature = Quadrature(measurement, functional, seed)
        if goal.most < min(quadrature.fewest, A.shape[0]):
            raise ValueError(
                f"{question} needs {quadrature.fewest} products at least, but may take {goal.most}."
            ) from None
        estimate = pursued(measurement, goal, quadrature, lambda: _whole(measurement, functional))
    else:
        estimate = measurement.exact(functional.answer(functional.of(known).sum(1)))
    if torch.isnan(estimate.value).any():
        raise ValueError(f"The {question} of {A!r} is not a number: it is zero, or says that it is psd and is not.")
    return estimate


def _whole(measurement: Measurement, functional: Functional) -> Estimate:
    """From all eigenvalues of the matrix that one product with each vector of the standard basis tells."""
    A = measurement.operator
    unit = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    matrix = torch.cat([measurement.apply(rows) for rows in unit.split(PROBES)]).double()
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    traces, floor = _forms(functional, torch.ones_like(values), values, A.domain.eps)
    return measurement.exact(functional.answer(traces), _moved(functional, traces, floor))


class Quadrature:
    """The traces of functions: on the rows Q of a Krylov space, and at random vectors in the complement of Q."""

    looks = 1

    def __init__(self, measurement: Measurement, functional: Functional, seed: int) -> None:
        self.measurement, self.functional, self.space = measurement, functional, measurement.operator.domain
        self.seed, self.draws = seed, self.space.draws(seed=seed, kind="normal")
        self.rows: Tensor | None = None
        self.inside = self.beyond = torch.zeros(0)  # (c,) the traces on the rows, and how wrong they may be
        self.samples = self.floors = torch.zeros(0, 0, dtype=torch.float64)  # (p, c) of the random vectors, likewise
        self.scale = 0.0  # of A: what vectors in its null space have is rounding
        self.steps = (functional.degree + 1) // 2 if functional.degree else LOOKS[0]  # that a vector takes
        self.fewest = 2 * self.steps * (1 if functional.degree else 2)
        self.started = False

    def _resume(self) -> None:
        """Go on from what the checkpoint keeps."""
        if (state := self.measurement.resume()) is not None:
            self.rows, self.inside, self.beyond = state["rows"], state["inside"], state["beyond"]
            self.samples, self.floors = state["samples"], state["floors"]
            self.steps, self.scale = int(state["steps"]), float(state["scale"])
            next(islice(self.draws, len(self.samples), len(self.samples)), None)

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend up to so many products, with those before; yields the estimate after each block of vectors."""
        if not self.started:
            self.started = True
            self._resume()
        if self.rows is None:
            share = 1 / 3 if self.functional.degree is None else 1 / 2
            yield from self._begin(int(products * share))
        while True:
            left = products - self.measurement.products
            width = min(PROBES, left // (self.steps if len(self.samples) or self.functional.degree else LOOKS[0]))
            if width < 2 and len(self.samples):
                yield self.estimate()
                return
            width = max(2, width)
            self._sample(width, max(1, left // width))
            self.measurement.keep(self._state)
            yield self.estimate()

    def _begin(self, products: int) -> Iterator[None]:
        """Sum the functions over a Krylov space of so many products, without its last steps: they serve the others."""
        krylov, ends = Krylov(self.measurement, min(products + WIDTH, self.space.size)), []
        krylov.start(self.space.draw(WIDTH, seed=derived(self.seed), kind="sphere"))
        growing = True
        while growing and krylov.size <= products:
            growing = krylov.step() and krylov.extend()
            ends.append(krylov.multiplied)
            yield
        self.scale = krylov.scale
        degree, done = self.functional.degree, len(ends)
        spare = 0 if not growing else max(2, done // 4) if degree is None else (degree - 1) // 2
        rows = ends[done - spare - 1] if done > spare else 0
        first = torch.eye(rows, dtype=torch.float64, device=self.space.device)
        now, rounding = self._values(krylov, first, krylov.size if degree else krylov.multiplied)
        self.rows, self.inside, self.beyond = krylov.basis[:rows].clone(), now.sum(0), rounding.norm(dim=0)
        if degree is None and rows and growing:
            before, _ = self._values(krylov, first, ends[done - spare // 2 - 1])
            self.beyond = self.beyond + (now - before).sum(0).abs()

    def _sample(self, width: int, most: int) -> None:
        """Add so many random vectors, which take at most so many steps."""
        assert self.rows is not None
        space, degree = self.space, self.functional.degree
        rows = torch.stack(list(islice(self.draws, width)))
        for _ in range(2):
            rows = project_out(space, rows, self.rows)
        rows *= ((space.size - len(self.rows)) ** 0.5 / space.norms(rows)).to(rows.dtype).unsqueeze(1)
        enough = min(most, STEPS) if degree is None else self.steps
        krylov = Krylov(self.measurement, min(width * (enough + 1), space.size))
        krylov.scale = self.scale
        krylov.start(rows)
        first = space.inner(rows, krylov.frontier)
        ends, growing = [], True
        while True:
            growing = krylov.step() and krylov.extend()
            ends.append(krylov.multiplied)
            last = len(ends) == enough or not growing
            if last or (degree is None and len(ends) in LOOKS):
                values, rounding = self._values(krylov, first, krylov.size if degree else krylov.multiplied)
                change = torch.zeros_like(values[0])
                if degree is None and growing:
                    change = self._change(krylov, first, ends, values)
                noise = values.std(0) / (len(self.samples) + width) ** 0.5
                if last or bool((change <= SMALL * noise).all()):
                    break
        self.steps = len(ends) if degree else max(len(ends), LOOKS[0])
        self.samples = torch.cat([self.samples.reshape(-1, len(change)), values.cpu()])
        self.floors = torch.cat([self.floors.reshape(-1, len(change)), (change + rounding).cpu()])

    def _change(self, krylov: Krylov, first: Tensor, ends: list[int], values: Tensor) -> Float[Tensor, " c"]:
        """What more steps would still change in the mean: as much as the last third did, or all that is left where it
        falls like a power of their number, as the last two thirds say.

        A power falls by the least ratio SLOWEST from one third to the next, when it hardly falls at all. What is left
        of it is 1.5 r / (SLOWEST - r) times what the last third did, to a few per cent.
        """
        count = len(ends)
        early, late = (self._values(krylov, first, ends[round(count * part) - 1])[0].mean(0) for part in (1 / 3, 2 / 3))
        last, previous = (values.mean(0) - late).abs(), (late - early).abs()
        ratio = (last / previous).nan_to_num(0.0, 1.0, 1.0).clamp(max=0.95 * SLOWEST)
        return last * (1.5 * ratio / (SLOWEST - ratio)).clamp(min=1)

    def estimate(self) -> Estimate:
        """What all vectors so far amount to: the jackknife over them."""
        functional, count = self.functional, len(self.samples)
        traces = self.inside + self.samples.mean(0)
        others = functional.answer(self.inside + (self.samples.sum(0) - self.samples) / (count - 1))
        middle = others.mean(0)
        return self.measurement.estimate(
            count * functional.answer(traces) - (count - 1) * middle,
            ((others - middle).square().sum(0) * (count - 1) / count).sqrt(),
            samples=count,
            dof=max(1.0, (count - 1) / UNSURE),
            floor=_moved(functional, traces, self.beyond + self.floors.mean(0)),
        )

    def _values(self, krylov: Krylov, first: Tensor, size: int) -> tuple[Float[Tensor, "p c"], Float[Tensor, "p c"]]:
        """v.f(A)v for vectors v with coefficients `first` in the first rows, from so many rows, and its rounding."""
        nodes, vectors = torch.linalg.eigh(krylov.reaching[:size, :size])
        weights = (first @ vectors[: first.shape[1]]).square()
        return _forms(self.functional, weights, nodes, self.space.eps)

    @property
    def _state(self) -> dict[str, Tensor]:
        assert self.rows is not None
        named = {"rows": self.rows, "inside": self.inside, "beyond": self.beyond}
        counts = {"steps": torch.tensor(self.steps), "scale": torch.tensor(self.scale, dtype=torch.float64)}
        return {**named, **counts, "samples": self.samples, "floors": self.floors}


def _forms(
    functional: Functional, weights: Float[Tensor, "... d"], nodes: Float[Tensor, " d"], eps: float
) -> tuple[Float[Tensor, "... c"], Float[Tensor, "... c"]]:
    """The sums of the functions of the nodes with these weights, and what rounding to `eps` may do to them: it moves
    every node, in either direction."""
    values = functional.of(nodes)
    moved = functional.functions(nodes + 10 * eps * nodes.abs().max())
    rounding = (weights @ (moved - values).square().nan_to_num(0.0).T).sqrt()
    return weights @ values.T, rounding + 10 * eps * (weights @ values.abs().T)


def _moved(functional: Functional, traces: Float[Tensor, " c"], floors: Float[Tensor, " c"]) -> Tensor:
    """How far the answer is when the traces are wrong by `floors`."""
    return (functional.answer(traces + torch.diag(floors)) - functional.answer(traces)).abs().sum(0).cpu()
