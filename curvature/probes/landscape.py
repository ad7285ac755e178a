"""The loss on a line, in a plane or a volume through the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.points import Norm, Points
from curvature.progress import Run
from curvature.result import Result

POINTS = {1: 101, 2: 51, 3: 21}  # along each axis


class Grid(TypedDict, total=False):
    """How `line`, `plane` and `volume` look around.

    `radius` (1) is the largest coordinate, and `points` (101, 51, 21) their number on each axis: odd, so that the
    parameters themselves are in the middle. They are evenly spaced for `crowd` 1, and crowd in the middle as that power
    of even steps for more. `norm` says what batch normalisation does: "frozen" statistics, "recalibrated" ones at every
    point, or those of the "batch". `accuracy` asks for the share of right answers, and `held_out` for all that of other
    data. With a checkpoint in `run` a grid that was interrupted goes on.
    """

    radius: float
    points: int
    crowd: float
    norm: Norm
    accuracy: bool
    held_out: Any
    run: Run | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Landscape(Result):
    """The loss at theta + sum_i t_i d_i, for coordinates t_i in `coordinates` (p,) along each of `directions` (d, n):
    `loss` has d axes of p points, theta in their middle.

    `accuracy` is the share of right answers, likewise, and `held_out_loss` and `held_out_accuracy` are of other data,
    where they were asked for. What is not finite is kept as it is; what an interrupt left out is NaN.
    """

    coordinates: Float[Tensor, " p"]
    directions: Float[Tensor, "d n"]
    loss: Tensor
    accuracy: Tensor | None = None
    held_out_loss: Tensor | None = None
    held_out_accuracy: Tensor | None = None

    @property
    def centre(self) -> float:
        """The loss at theta."""
        return float(self.loss[tuple(length // 2 for length in self.loss.shape)])

    def summary(self) -> dict[str, str]:
        finite = self.loss[self.loss.isfinite()]
        lost = self.loss.numel() - len(finite)
        around = f", from {float(finite.min()):.4g} to {float(finite.max()):.4g} around it" if len(finite) else ""
        return {
            "loss": f"{self.centre:.4g} at the centre{around}",
            "points": " x ".join(map(str, self.loss.shape)),
            **({"not finite": f"at {lost:,} points"} if lost else {}),
            "batch normalisation": str(self.origin.options["norm"]),
        }

    __repr__ = Result.__str__


def line(objective: Objective, direction: Float[Tensor, " n"], **grid: Unpack[Grid]) -> Landscape:
    """The loss at theta + t d for t from -radius to radius: see Grid for the options. No derivatives are taken.

    An interrupt raises Interrupted with the points so far. Goodfellow, Vinyals & Saxe 2015 (arXiv:1412.6544).

    >>> unit, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> parabola = Objective.from_loss(unit, lambda m, x: m(x).square().mean(), one)
    >>> line(parabola.at(torch.zeros(1)), torch.ones(1), radius=2.0, points=5).loss
    tensor([4., 1., 0., 1., 4.], dtype=torch.float64)
    """
    return _looked("line", objective, direction[None] if direction.ndim == 1 else direction, 1, grid)


def plane(objective: Objective, directions: Float[Tensor, "2 n"], **grid: Unpack[Grid]) -> Landscape:
    """The loss at theta + s d + t e for two directions: see Grid for the options, and `line`.

    In the plane of two random directions (`random_directions`) curvature is an average over all, and a sharp valley is
    as good as never met; the vectors of `eigsh` show the ends of the spectrum.

    Li, Xu, Taylor, Studer & Goldstein 2018 (arXiv:1712.09913); Böttcher & Wheeler 2024 (arXiv:2208.13219).
    """
    return _looked("plane", objective, directions, 2, grid)


def volume(objective: Objective, directions: Float[Tensor, "3 n"], **grid: Unpack[Grid]) -> Landscape:
    """The loss at theta + s d + t e + u f for three directions: see Grid for the options, and `plane`."""
    return _looked("volume", objective, directions, 3, grid)


def _looked(question: str, objective: Objective, directions: Float[Tensor, "d n"], axes: int, grid: Grid) -> Landscape:
    need_objective(question, objective)
    space = objective.space
    radius, crowd, count = grid.get("radius", 1.0), grid.get("crowd", 1.0), grid.get("points", POINTS[axes])
    _check(question, space.size, directions, axes, radius, crowd, count)
    points = Points(
        objective,
        norm=grid.get("norm", "frozen"),
        accuracy=grid.get("accuracy", False),
        held_out=grid.get("held_out"),
    )
    directions = directions.detach().to(space.device, space.dtype)
    even = torch.linspace(-1, 1, count, dtype=torch.float64)
    coordinates = radius * even.sign() * even.abs() ** crowd
    offsets = torch.cartesian_prod(*[coordinates] * axes).reshape(-1, axes)
    options = {"radius": radius, "points": count, "crowd": crowd, "directions": digest(directions)}
    work = points.work(question, options, grid.get("run"))
    found, flat = points.nothing(len(offsets)), objective.position
    # the middle by itself, so that it is the value of the objective to the last bit
    centre = work.piece(lambda: {"values": points.alone(flat)})["values"].cpu()

    def result(*, complete: bool) -> Landscape:
        found[len(offsets) // 2] = centre
        values = dict(zip(points.names, found.T.reshape(-1, *[count] * axes), strict=True))
        return Landscape(
            coordinates=coordinates,
            directions=directions,
            complete=complete,
            cost=work.cost,
            origin=work.origin,
            **values,
        )

    try:
        points.fill(found, work, lambda some: flat + space.combine(offsets[some], directions))
    except KeyboardInterrupt as stop:
        raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


def _check(question: str, size: int, directions: Tensor, axes: int, radius: float, crowd: float, count: int) -> None:
    if directions.shape != (axes, size):
        what = f"{axes} directions ({axes}, {size})" if axes > 1 else f"a direction ({size},)"
        raise ValueError(f"A {question} takes {what}, but got {tuple(directions.shape)}.")
    if count < 1 or count % 2 == 0:
        raise ValueError(f"points is odd, so that the parameters are among them, but got {count}.")
    if not 0 < radius < float("inf") or not 1 <= crowd < float("inf"):
        raise ValueError(f"Expected a positive radius, and crowd of 1 at least, but got {radius} and {crowd}.")
