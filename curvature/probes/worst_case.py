"""How far the loss rises in the worst direction: sharpness as a maximum over a ball around the parameters.

The maxima are what an ascent has met, at points that are kept: local ones, and lower bounds of the true ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.memory import need_basis
from curvature.linalg.work import Work
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.points import Points
from curvature.progress import Run
from curvature.result import Quantity, Result

FARTHEST = 1e6  # a step, in radii: where it is projected back, theta + u no longer depends on where it began
EDGE = 1 - 1e-6  # of the way out: rounding leaves what was projected about there


@dataclass(frozen=True, kw_only=True, repr=False)
class WorstCase(Result):
    """The largest rise of the loss L(theta + u) - L(theta) that an ascent met in a ball: a lower bound of the maximum.

    `value` is that rise; of `keskar_sharpness` it is 100 rise / (1 + L). `rises` (starts, steps + 1) are those along
    each ascent, its start first; NaN where none was tried. `first_order` is what the gradient alone promises, its dual
    norm times the radius. The largest rise is at u = `perturbation` (n,), and `extent` of the way to the boundary.
    What is not finite is the worst.
    """

    value: Float[Tensor, ""]
    rises: Float[Tensor, "starts steps"]
    first_order: float
    perturbation: Float[Tensor, " n"]
    extent: float

    @property
    def on_boundary(self) -> bool:
        """Whether the largest rise is at the edge of the ball: in a larger one the loss would rise further."""
        return self.extent >= EDGE

    def summary(self) -> dict[str, str]:
        where = "on the boundary" if self.on_boundary else f"{self.extent:.1%} of the way to the boundary"
        best = self.rises.nan_to_num(-math.inf).amax(1).tolist()
        return {
            self.origin.question: f"{float(self.value):.6g}, {where}",
            "first order": f"{self.first_order:.6g}",
            "each ascent": ", ".join(f"{rise:.6g}" for rise in best) + f" in {self.rises.shape[1] - 1} steps",
        }

    def quantities(self) -> dict[str, Quantity]:
        return {self.origin.question: Quantity(float(self.value)), "first_order": Quantity(self.first_order)}

    __repr__ = Result.__str__


def sam_sharpness(
    objective: Objective,
    *,
    rho: float = 0.05,
    steps: int = 1,
    restarts: int = 0,
    seed: int = 0,
    run: Run | None = None,
) -> WorstCase:
    """How far the loss rises within a distance rho: L(theta + rho g / |g|) - L(theta), g the gradient at theta.

    That is one step, what sharpness-aware minimisation minimises; it may be negative where rho is large. More `steps`
    are of projected gradient ascent with step lengths that double after a rise and halve after none, from theta and
    from `restarts` random points of the sphere. At a minimum the gradient tells nothing: ask for restarts there. On a
    quadratic the largest rise is then rho^2 lambda_1 / 2. A step takes a gradient and a value.

    An interrupt raises Interrupted with the largest rise so far. Not invariant: scaling the weights of ReLU networks
    changes it without changing the function (Dinh, Pascanu, Bengio & Bengio 2017, arXiv:1703.04933).

    Foret, Kleiner, Mobahi & Neyshabur 2021 (arXiv:2010.01412).

    >>> unit = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(unit.weight)
    >>> parabola = Objective.from_loss(unit, lambda m, x: m(x).square().mean() / 2, torch.ones(1, 1))
    >>> sam_sharpness(parabola, rho=1.0).value  # from 1/2 to 2
    tensor(1.5000, dtype=torch.float64)
    """
    need_objective("sam_sharpness", objective)
    return _ascended("sam_sharpness", objective, torch.ones_like(objective.position), rho, steps, restarts, seed, run)


def adaptive_sharpness(
    objective: Objective,
    *,
    rho: float = 0.5,
    steps: int = 1,
    restarts: int = 0,
    seed: int = 0,
    run: Run | None = None,
) -> WorstCase:
    """How far the loss rises for relative changes of the weights, |u / theta| <= rho: `sam_sharpness` in the
    coordinates w = u / |theta|, whose first step is u = rho theta^2 g / |theta g|, entry by entry.

    Weights that are zero stay. Invariant where the weights of ReLU networks are scaled without changing the function.
    Its version of second order is the largest eigenvalue of `congruence(Diagonal(|theta|), hessian(objective))`.

    Kwon, Kim, Park & Choi 2021 (arXiv:2102.11600); Andriushchenko et al. 2023 (arXiv:2302.07011), who found no general
    relation to generalisation.
    """
    need_objective("adaptive_sharpness", objective)
    return _ascended("adaptive_sharpness", objective, objective.position.abs(), rho, steps, restarts, seed, run)


def _ascended(
    question: str,
    objective: Objective,
    scale: Float[Tensor, " n"],
    rho: float,
    steps: int,
    restarts: int,
    seed: int,
    run: Run | None,
) -> WorstCase:
    """The largest rise for u = scale w, |w| <= rho."""
    if not 0 < rho < math.inf:
        raise ValueError(f"rho is the radius of a ball, positive and finite, but got {rho}.")
    if steps < 1 or restarts < 0:
        raise ValueError(f"Expected steps >= 1 and restarts >= 0, but got {steps} and {restarts}.")
    space, theta = objective.space, objective.position
    points = Points(objective)
    work = points.work(question, {"rho": rho, "steps": steps, "restarts": restarts}, run, seed)
    tried = _Tried(points, work, theta, (1 + restarts, 1 + steps))

    def slope(w: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return work.piece(lambda: {"slope": scale * objective.at(theta + scale * w).gradient()})["slope"]

    def length(w: Float[Tensor, " n"]) -> float:
        return float(space.norms(w[None])[0])

    def climb(place: int, w: Float[Tensor, " n"], ahead: Tensor | None) -> None:
        reach, rise = rho, tried.rise(scale * w, length(w) / rho, (place, 0))
        for step in range(1, 1 + steps):
            ahead = slope(w) if ahead is None else ahead
            steepest = length(ahead)
            further = w + ahead * (reach / steepest) if steepest else w
            if (beyond := length(further)) > rho:
                further = further * (rho / beyond)
            higher = tried.rise(scale * further, length(further) / rho, (place, step))
            work.report(place * steps + step, (1 + restarts) * steps, f"largest rise {tried.worst:.5g}")
            if rise < higher < math.inf:
                w, rise, ahead, reach = further, higher, None, min(2 * reach, FARTHEST * rho)
            else:
                reach /= 2

    try:
        gradient = slope(torch.zeros_like(theta))
        tried.first_order = rho * length(gradient)
        climb(0, torch.zeros_like(theta), gradient)
        for place, draw in enumerate(islice(space.draws(seed=seed, kind="sphere"), restarts), 1):
            climb(place, draw * (rho / space.size**0.5), None)
    except KeyboardInterrupt as stop:
        if tried.count < 2:
            raise KeyboardInterrupt from stop
        raise Interrupted(tried.result(complete=False)) from stop
    return tried.result(complete=True)


def keskar_sharpness(
    objective: Objective,
    *,
    eps: float = 1e-3,
    dimensions: int | None = None,
    iterations: int = 10,
    seed: int = 0,
    run: Run | None = None,
) -> WorstCase:
    """How far the loss rises in a box, in per cent: 100 (max L(theta + u) - L) / (1 + L) over |u_i| <= eps (|theta_i| +
    1), by so many iterations of L-BFGS-B from u = 0.

    With `dimensions` u = A y lies in a random subspace of so many, A with orthonormal columns, and the box is
    |y_i| <= eps (|(A^T theta)_i| + 1); A is held. The paper takes eps of 1e-3 and 5e-4, and 100 dimensions. The losses
    are compared as they are: with regulariser, and 1 + L only means something for losses that are not negative.
    Vectors are held in main memory, in float64. Where the gradient is zero nothing is found. Not invariant, for the +1.

    Keskar, Mudigere, Nocedal, Smelyanskiy & Tang 2017 (arXiv:1609.04836).
    """
    import scipy.optimize

    need_objective("keskar_sharpness", objective)
    space, theta = objective.space, objective.position
    if not 0 < eps < math.inf or iterations < 1:
        raise ValueError(f"Expected a positive eps and iterations >= 1, but got {eps} and {iterations}.")
    if dimensions is not None and not 1 <= dimensions <= space.size:
        raise ValueError(f"dimensions is a number from 1 to {space.size}, or None for all, but got {dimensions}.")
    points = Points(objective)
    options = {"eps": eps, "dimensions": dimensions, "iterations": iterations}
    work = points.work("keskar_sharpness", options, run, seed)
    basis = None if dimensions is None else _subspace(objective, dimensions, seed)
    inside = theta if basis is None else space.inner(theta[None], basis)[0]
    box = (eps * (inside.double().abs() + 1)).cpu().numpy()
    tried = _Tried(points, work, theta, (1, 1), percent=True)

    def descent(y: np.ndarray) -> tuple[float, np.ndarray]:
        u = torch.from_numpy(y).to(space.device, space.dtype)
        u = u if basis is None else space.combine(u[None], basis)[0]
        rise = tried.rise(u, float(np.abs(y / box).max()), (0, tried.count))
        gradient = work.piece(lambda: {"slope": objective.at(theta + u).gradient()})["slope"]
        gradient = gradient if basis is None else space.inner(gradient[None], basis)[0]
        if tried.count == 1:
            tried.first_order = float(gradient.abs().double().cpu() @ torch.from_numpy(box))
        return -rise, -gradient.double().cpu().numpy()

    limits: Any = scipy.optimize.Bounds  # annotated for single numbers
    within = {"method": "L-BFGS-B", "jac": True, "bounds": limits(-box, box)}
    until = {"maxiter": iterations, "ftol": 0.0, "gtol": 0.0}  # its tolerances are large beside such a box
    try:
        scipy.optimize.minimize(descent, np.zeros_like(box), options=until, **within)
    except KeyboardInterrupt as stop:
        if tried.count < 2:
            raise KeyboardInterrupt from stop
        raise Interrupted(tried.result(complete=False)) from stop
    return tried.result(complete=True)


def _subspace(objective: Objective, dimensions: int, seed: int) -> Float[Tensor, "p n"]:
    """Orthonormal rows that span a random subspace."""
    need_basis(2 * dimensions, objective.space)
    return objective.space.orthonormal(objective.space.draw(dimensions, seed=seed, kind="normal"))


class _Tried:
    """The points that an ascent has tried, and the worst of them."""

    def __init__(
        self, points: Points, work: Work, theta: Float[Tensor, " n"], shape: tuple[int, int], *, percent: bool = False
    ) -> None:
        self.points, self.work, self.theta, self.percent = points, work, theta, percent
        self.loss = self._value(theta)
        self.rises = torch.full(shape, torch.nan, dtype=torch.float64)
        self.first_order = math.nan
        self.count = 0
        self.worst, self.perturbation, self.extent = 0.0, torch.zeros_like(theta), 0.0

    def rise(self, u: Float[Tensor, " n"], extent: float, place: tuple[int, int]) -> float:
        """That of the loss at theta + u, for the given place among all."""
        rise = self._value(self.theta + u) - self.loss if self.count else 0.0  # the first is theta itself
        self.count += 1
        if place[1] >= self.rises.shape[1]:
            self.rises = torch.nn.functional.pad(self.rises, (0, 1), value=torch.nan)
        self.rises[place] = rise
        if self.count == 2 or self._rank(rise) > self._rank(self.worst):  # theta is not counted beside others
            self.worst, self.perturbation, self.extent = rise, u, extent
        return rise

    def result(self, *, complete: bool) -> WorstCase:
        value = 100 * self.worst / (1 + self.loss) if self.percent else self.worst
        return WorstCase(
            value=torch.tensor(value, dtype=torch.float64),
            rises=self.rises,
            first_order=self.first_order,
            perturbation=self.perturbation,
            extent=self.extent,
            complete=complete,
            cost=self.work.cost,
            origin=self.work.origin,
        )

    def _value(self, row: Float[Tensor, " n"]) -> float:
        return float(self.work.piece(lambda: {"values": self.points.alone(row)})["values"])

    @staticmethod
    def _rank(rise: float) -> float:
        return math.inf if math.isnan(rise) else rise
