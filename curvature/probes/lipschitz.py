"""How fast the gradient and the Hessian change around the parameters, and along a path: bounds from below of their
Lipschitz constants, which bound step sizes and the reach of quadratic models.

Between two points the change of a derivative by their distance is at most the constant. From the points at a distance h
of u the one that shows most of it is found by power iteration, as v = u + h d, with d from the change that was found
before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.eigen import eigsh
from curvature.linalg.space import Space
from curvature.linalg.work import Record, Work
from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.objective.work import work_on
from curvature.operators.engine import need_objective
from curvature.operators.hessian import hessian
from curvature.progress import Run
from curvature.result import Estimate, Quantity, with_error

NEAR = 0.1  # of the radius: the distance of two points by default
APART = 1e3  # roundings of the parameters that two points are apart, at least
RTOL = 1e-3  # of the eigenvectors of a change: the error of their values is about its square


@dataclass(frozen=True, kw_only=True, repr=False)
class Lipschitz(Estimate):
    """`ratios` (k,) of the change of a derivative to the distance, each between two points: none exceeds the constant.

    `value` is their mean, with its error where the points are random. `noise` (k,) is about what rounding adds to each.
    """

    ratios: Float[Tensor, " k"]
    noise: Float[Tensor, " k"]

    @property
    def largest(self) -> float:
        """The largest ratio, a lower bound of the constant; NaN where one is not a number."""
        return float(self.ratios.max())

    def summary(self) -> dict[str, str]:
        place = int(self.ratios.argmax())
        shown = {"at least": f"{self.largest:.5g} (pair {place} of {len(self.ratios)})"}
        mean = with_error(float(self.value), float(self.stderr), self.dof) if self.dof else f"{float(self.value):.5g}"
        shown["mean"] = f"{mean}, median {float(self.ratios.nanmedian()):.5g}"
        if float(self.noise[place]) > 0.1 * self.largest:
            shown["rounding"] = f"± {float(self.noise[place]):.2g}: take a larger distance, or dtype=torch.float64"
        return shown

    def quantities(self) -> dict[str, Quantity]:
        question, noise = self.origin.question, float(self.noise[self.ratios.argmax()])
        return {question: Quantity(self.largest, bound=noise), f"{question}_mean": self._quantity(())}

    __repr__ = Estimate.__repr__


class Change(NamedTuple):
    """How much a derivative changes between two points: `norm`, what rounding may have of that, and the `direction`
    (n,), of length 1, in which to look next; not-a-number where there is none."""

    norm: float
    noise: float
    direction: Float[Tensor, " n"]


Changes = Callable[[Float[Tensor, " n"]], Change]  # from a point u that is known to another, v


def gradient_lipschitz(
    objective: Objective,
    *,
    radius: float,
    distance: float | None = None,
    pairs: int = 8,
    steps: int = 10,
    seed: int = 0,
    run: Run | None = None,
) -> Lipschitz:
    """Ratios |grad L(u) - grad L(v)| / |u - v| in the ball of `radius` around the parameters, in the Euclidean norm:
    `largest` bounds the Lipschitz constant of the gradient there from below, nothing that is sampled from above.

    Each of `pairs` has a point u, uniform in the ball, and the largest ratio of `steps` points v at `distance` (a tenth
    of the radius) from it, in the ball as well. The first v lies in a random direction, where the change is that of an
    average over curvature; the next ones in that of the change before, a power iteration, by which the ratio comes to
    the largest curvature in magnitude near u. steps=1 is for random pairs. It takes pairs x (steps + 1) gradients, and
    no second derivatives: networks with kinks will do, whose ratios grow as the distance falls. The mean over pairs has
    its standard error. In float32, `noise` says what of a ratio is rounding; sums that cancel have more.

    Raises ValueError where `distance` is so short that it is rounding itself; an interrupt, Interrupted with the pairs
    so far. Santurkar, Tsipras, Ilyas & Madry 2018 (arXiv:1805.11604).

    >>> unit, x = torch.nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1).double()
    >>> parabola = Objective.from_loss(unit, lambda m, x: 3 * m(x).square().mean(), x)
    >>> round(gradient_lipschitz(parabola, radius=1.0).largest, 6)
    6.0
    """

    def changes(u: Float[Tensor, " n"], work: Work) -> Changes:
        here = objective.at(u).gradient()
        return lambda v: _gradient_change(objective.space, here, objective.at(v).gradient())

    return _around("gradient_lipschitz", objective, changes, radius, distance, pairs, steps, seed, run)


def hessian_lipschitz(
    objective: Objective,
    *,
    radius: float,
    distance: float | None = None,
    pairs: int = 4,
    steps: int = 3,
    seed: int = 0,
    run: Run | None = None,
) -> Lipschitz:
    """Ratios |H(u) - H(v)| / |u - v| in the ball of `radius` around the parameters, in the spectral norm, by `eigsh`.

    Points are as in `gradient_lipschitz`. Where the change is D[d] for a third derivative D that hardly changes, the
    vector w of its largest eigenvalue is a direction with |D[w]| >= |w.D[w] d| = |w.D[d] w| = |D[d]|, since D is
    symmetric: the next v lies there. Each of pairs x steps takes some tens of products with both Hessians.

    In the bound of a Newton step, f(u + s) <= model(s) + M |s|^3 / 6, this is M (Nesterov & Polyak 2006, Math. Program.
    108).

    >>> unit, x = torch.nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1).double()
    >>> cubic = Objective.from_loss(unit, lambda m, x: 5 * m(x).pow(3).mean() / 6, x)
    >>> round(hessian_lipschitz(cubic, radius=1.0).largest, 6)
    5.0
    """

    def changes(u: Float[Tensor, " n"], work: Work) -> Changes:
        space, here = objective.space, hessian(objective.at(u))

        def change(v: Float[Tensor, " n"]) -> Change:
            start = ((v - u) / (v - u).norm()).unsqueeze(0)  # where the change before pointed
            found = eigsh(hessian(objective.at(v)) - here, which="magnitude", rtol=RTOL, start=start, seed=seed)
            curvature = float(space.norms(here.apply(found.vectors))[0])
            work.products += found.cost.products + 1
            return Change(float(found.values[0].abs()), space.rounding(2 * curvature), found.vectors[0])

        return change

    return _around("hessian_lipschitz", objective, changes, radius, distance, pairs, steps, seed, run)


def gradient_lipschitz_along(objective: Objective, rows: Float[Tensor, "p n"], *, run: Run | None = None) -> Lipschitz:
    """Ratios |grad L(u) - grad L(v)| / |u - v| between consecutive rows, (p - 1,): how smooth the loss is where a path
    or a training run went, on the scale of its steps.

    The rows are parameters. Between rows where there is no distance the ratio is NaN. The mean has no error: nothing is
    drawn. Takes p gradients; an interrupt raises Interrupted with the ratios so far.

    Zhang, He, Sra & Jadbabaie 2020 (arXiv:1905.11881).
    """
    need_objective("gradient_lipschitz_along", objective)
    space = objective.space
    if rows.ndim != 2 or rows.shape[1] != space.size or len(rows) < 2:
        raise ValueError(f"Expected two points (p, {space.size}) at least, but got {tuple(rows.shape)}.")
    rows = rows.detach().to(space.device, space.dtype)
    work = work_on(objective, "gradient_lipschitz_along", options={"rows": digest(rows)}, run=run)

    def gradients() -> Iterator[Tensor]:
        for done, row in enumerate(rows, 1):
            yield work.piece(lambda row=row: {"gradient": objective.at(row).gradient()})["gradient"]
            work.report(done, len(rows), unit="points")

    def ratios() -> Iterator[Record]:
        for (u, v), (here, there) in zip(itertools.pairwise(rows), itertools.pairwise(gradients()), strict=True):
            yield _ratio(space, u, v, _gradient_change(space, here, there))

    return _gathered(ratios(), work, fewest=1)


def _around(
    question: str,
    objective: Objective,
    changes: Callable[[Float[Tensor, " n"], Work], Changes],
    radius: float,
    distance: float | None,
    pairs: int,
    steps: int,
    seed: int,
    run: Run | None,
) -> Lipschitz:
    """The largest ratio from each of so many random points."""
    need_objective(question, objective)
    space, position = objective.space, objective.position
    apart = NEAR * radius if distance is None else distance
    _check(objective, radius, apart, pairs, steps)
    options = {"radius": radius, "distance": apart, "pairs": pairs, "steps": steps}
    work = work_on(objective, question, options=options, seed=seed, run=run)
    # all but two entries of a point of the unit sphere are uniform in the ball, those of a whole one on the sphere
    draws = Space(space.size + 2, space.dtype, space.device).draws(seed=seed, kind="sphere")

    def searched(u: Float[Tensor, " n"], direction: Float[Tensor, " n"]) -> Record:
        change_to, found = changes(u, work), []
        for _ in range(steps):
            v = u + apart * direction
            change = change_to(v)
            found.append(_ratio(space, u, v, change))
            direction = change.direction
            if not direction.isfinite().all():
                break
        return found[int(torch.stack([record["ratio"] for record in found]).argmax())]  # that is NaN where one is

    def ratios() -> Iterator[Record]:
        for done in range(1, pairs + 1):
            place, drawn = (next(draws)[: space.size] for _ in range(2))
            u = position + (radius - apart) / (space.size + 2) ** 0.5 * place
            yield work.piece(lambda u=u, drawn=drawn: searched(u, drawn / drawn.norm()))
            work.report(done, pairs, unit="pairs")

    return _gathered(ratios(), work, fewest=2)


def _gathered(ratios: Iterator[Record], work: Work, *, fewest: int) -> Lipschitz:
    """The result of the ratios, random ones where the work has a seed; of those so far where it is interrupted."""
    records: list[Record] = []

    def result(*, complete: bool) -> Lipschitz:
        ratios, noise = (torch.stack([record[name] for record in records]).cpu() for name in ("ratio", "noise"))
        count = 0 if work.seed is None else len(ratios)
        return Lipschitz(
            value=ratios.mean(),
            stderr=ratios.std() / count**0.5 if count else torch.zeros((), dtype=torch.float64),
            samples=count,
            dof=max(count - 1, 0),
            floor=float(noise.mean()),
            ratios=ratios,
            noise=noise,
            complete=complete,
            cost=work.cost,
            origin=work.origin,
        )

    try:
        for record in ratios:
            records.append(record)
    except KeyboardInterrupt as stop:
        if len(records) < fewest:
            raise KeyboardInterrupt from stop
        raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


def _gradient_change(space: Space, here: Float[Tensor, " n"], there: Float[Tensor, " n"]) -> Change:
    difference = there.double() - here.double()
    norm, scale = float(difference.norm()), float(space.norms(torch.stack([here, there])).sum())
    return Change(norm, space.rounding(scale), (difference / norm).to(space.dtype))


def _ratio(space: Space, u: Float[Tensor, " n"], v: Float[Tensor, " n"], change: Change) -> Record:
    # of the points as they were rounded, not as they were meant
    distance = (v.double() - u.double()).norm()
    return {"ratio": change.norm / distance, "noise": change.noise / distance}


def _check(objective: Objective, radius: float, apart: float, pairs: int, steps: int) -> None:
    if not 0 < radius < float("inf") or not 0 < apart <= radius:
        raise ValueError(f"Expected a positive radius and a distance within it, but got {radius} and {apart}.")
    if pairs < 2 or steps < 1:
        raise ValueError(
            f"Expected 2 pairs at least, for the error of their mean, and a step, but got {pairs} and {steps}."
        )
    least = APART * objective.space.eps * (float(objective.position.double().norm()) + radius)
    if apart < least:
        raise ValueError(
            f"Points {apart:.2g} apart differ by little more than parameters are rounded by. Take a distance of "
            f"{least:.2g} at least, or dtype=torch.float64."
        )
