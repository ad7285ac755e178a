"""The loss on a line, in a plane or a volume through the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.points import Norm, Points
from curvature.progress import Run
from curvature.result import Quantity, Result

POINTS = {1: 101, 2: 51, 3: 21}  # along each axis
SHARES = 2.0 ** torch.arange(-16, 1, dtype=torch.float64)  # of the radius, where "adaptive" looks first

Crowd = float | Literal["adaptive"]
Directions = Float[Tensor, "d n"] | Eigenpairs


class Grid(TypedDict, total=False):
    """How `line`, `plane` and `volume` look around.

    `radius` (1) is the largest coordinate, and `points` (101, 51, 21) their number on each axis: odd, so that the
    parameters themselves are in the middle. They are evenly spaced for `crowd` 1, and crowd in the middle as that power
    of even steps for more; for "adaptive" the axes are looked along first, and they crowd where the loss rises. `norm`
    says what batch normalisation does: "frozen" statistics, "recalibrated" ones at every point, or those of the
    "batch". `accuracy` asks for the share of right answers, and `held_out` for all that of other data. With a
    checkpoint in `run` a grid that was interrupted goes on.
    """

    radius: float
    points: int
    crowd: Crowd
    norm: Norm
    accuracy: bool
    held_out: Any
    run: Run | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Landscape(Result):
    """The loss at theta + sum_i t_i d_i, for coordinates t_i in `coordinates` (p,) along each of `directions` (d, n):
    `loss` has d axes of p points, theta = `position` (n,) in their middle. `names` are those of the axes, where they
    have any.

    `accuracy` is the share of right answers, likewise, and `held_out_loss` and `held_out_accuracy` are of other data,
    where they were asked for. What is not finite is kept as it is; what an interrupt left out is NaN.
    """

    coordinates: Float[Tensor, " p"]
    directions: Float[Tensor, "d n"]
    position: Float[Tensor, " n"]
    loss: Tensor
    accuracy: Tensor | None = None
    held_out_loss: Tensor | None = None
    held_out_accuracy: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def centre(self) -> float:
        """The loss at theta."""
        return self._middle(self.loss)

    def _middle(self, values: Tensor) -> float:
        return float(values[tuple(length // 2 for length in values.shape)])

    def coordinates_of(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k d"]:
        """Where parameters are in these coordinates, such as those of a training run: the place nearest to each."""
        if rows.ndim != 2 or rows.shape[1] != len(self.position):
            raise ValueError(f"Expected parameters (k, {len(self.position)}), but got {tuple(rows.shape)}.")
        away, axes = (rows - self.position).double(), self.directions.double()
        return torch.linalg.lstsq(axes.T, away.T).solution.T

    def summary(self) -> dict[str, str]:
        lost = int((~self.loss.isfinite()).sum())
        looked = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "held-out loss": self.held_out_loss,
            "held-out accuracy": self.held_out_accuracy,
        }
        said = {}
        for name, values in looked.items():
            if values is not None:
                finite = values[values.isfinite()]
                around = f", from {float(finite.min()):.4g} to {float(finite.max()):.4g}" if len(finite) else ""
                said[name] = f"{self._middle(values):.4g} at the centre{around}"
        return {
            **said,
            "points": " x ".join(map(str, self.loss.shape)),
            **({"not finite": f"at {lost:,} points"} if lost else {}),
            "batch normalisation": str(self.origin.options["norm"]),
        }

    def quantities(self) -> dict[str, Quantity]:
        finite = self.loss[self.loss.isfinite()]
        found = {"loss": self.centre}
        found |= {"loss_min": float(finite.min()), "loss_max": float(finite.max())} if len(finite) else {}
        for name in ("accuracy", "held_out_loss", "held_out_accuracy"):
            if (values := getattr(self, name)) is not None:
                found[name] = self._middle(values)
        return {name: Quantity(value) for name, value in found.items()}

    __repr__ = Result.__str__


def line(objective: Objective, direction: Float[Tensor, " n"] | Eigenpairs, **grid: Unpack[Grid]) -> Landscape:
    """The loss at theta + t d for t from -radius to radius: see Grid for the options. No derivatives are taken.

    An interrupt raises Interrupted with the points so far. Goodfellow, Vinyals & Saxe 2015 (arXiv:1412.6544).

    >>> unit, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> parabola = Objective.from_loss(unit, lambda m, x: m(x).square().mean(), one)
    >>> line(parabola.at(torch.zeros(1)), torch.ones(1), radius=2.0, points=5).loss
    tensor([4., 1., 0., 1., 4.], dtype=torch.float64)
    """
    if isinstance(direction, Tensor) and direction.ndim == 1:
        direction = direction[None]
    return _looked("line", objective, direction, 1, grid)


def plane(objective: Objective, directions: Float[Tensor, "2 n"] | Eigenpairs, **grid: Unpack[Grid]) -> Landscape:
    """The loss at theta + s d + t e for two directions: see Grid for the options, and `line`.

    In the plane of two random directions (`random_directions`) curvature is an average over all, and a sharp valley is
    as good as never met. The pairs that `eigsh` returns show the ends of the spectrum, and name the axes.

    Li, Xu, Taylor, Studer & Goldstein 2018 (arXiv:1712.09913); Böttcher & Wheeler 2024 (arXiv:2208.13219).
    """
    return _looked("plane", objective, directions, 2, grid)


def volume(objective: Objective, directions: Float[Tensor, "3 n"] | Eigenpairs, **grid: Unpack[Grid]) -> Landscape:
    """The loss at theta + s d + t e + u f for three directions: see Grid for the options, and `plane`."""
    return _looked("volume", objective, directions, 3, grid)


def _looked(question: str, objective: Objective, directions: Directions, axes: int, grid: Grid) -> Landscape:
    need_objective(question, objective)
    space, names = objective.space, ()
    if isinstance(directions, Eigenpairs):
        names = tuple(f"eigenvector, λ = {value:.4g}" for value in directions.values.tolist())
        directions = directions.vectors
    radius, crowd, count = grid.get("radius", 1.0), grid.get("crowd", 1.0), grid.get("points", POINTS[axes])
    _check(question, space.size, directions, axes, radius, crowd, count)
    points = Points(
        objective,
        norm=grid.get("norm", "frozen"),
        accuracy=grid.get("accuracy", False),
        held_out=grid.get("held_out"),
    )
    directions = directions.detach().to(space.device, space.dtype)
    options = {"radius": radius, "points": count, "crowd": crowd, "directions": digest(directions)}
    work = points.work(question, options, grid.get("run"))
    flat = objective.position

    def rows(offsets: Float[Tensor, "k d"]) -> Callable[[slice], Float[Tensor, "s n"]]:
        return lambda some: flat + space.combine(offsets[some], directions)

    # the middle by itself, so that it is the value of the objective to the last bit
    centre = work.piece(lambda: {"values": points.alone(flat)})["values"].cpu()
    half = count // 2
    even = torch.arange(-half, half + 1, dtype=torch.float64) / max(1, half)
    if crowd == "adaptive":
        steps = torch.cat([SHARES, -SHARES])
        scouted = points.nothing(axes * len(steps))
        points.fill(scouted, work, rows(radius * torch.block_diag(*[steps[:, None]] * axes)))
        places = _crowded(even.abs(), (scouted[:, 0] - centre[0, 0]).abs().view(-1, len(SHARES)))
    else:
        places = even.abs() ** crowd
    coordinates = radius * even.sign() * places
    offsets = torch.cartesian_prod(*[coordinates] * axes).reshape(-1, axes)
    found = points.nothing(len(offsets))

    def result(*, complete: bool) -> Landscape:
        found[len(offsets) // 2] = centre
        values = dict(zip(points.names, found.T.reshape(-1, *[count] * axes), strict=True))
        return Landscape(
            coordinates=coordinates,
            directions=directions,
            position=flat,
            names=names,
            complete=complete,
            cost=work.cost,
            origin=work.origin,
            **values,
        )

    try:
        points.fill(found, work, rows(offsets))
    except KeyboardInterrupt as stop:
        raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


def _crowded(even: Float[Tensor, " p"], heights: Float[Tensor, "k s"]) -> Float[Tensor, " p"]:
    """Where to look along an axis, as shares of its length: at even steps of the mean of the share and of the root of
    the height that the loss has there, on average over half-axes; even where it is a parabola.

    A monitor function is equidistributed: de Boor 1973, Good approximation by splines with variable knots.
    """
    height = torch.where(heights.isfinite(), heights, torch.nan).nanmean(dim=0).nan_to_num().cummax(0).values
    root = (height / height[-1]).sqrt() if height[-1] > 0 else SHARES
    places = (SHARES + torch.maximum(SHARES, root)) / 2
    return torch.from_numpy(np.interp(even, [0.0, *places.tolist()], [0.0, *SHARES.tolist()]))


def _check(question: str, size: int, directions: Tensor, axes: int, radius: float, crowd: Crowd, count: int) -> None:
    if directions.shape != (axes, size):
        what = f"{axes} directions ({axes}, {size})" if axes > 1 else f"a direction ({size},)"
        raise ValueError(f"A {question} takes {what}, but got {tuple(directions.shape)}.")
    if count < 1 or count % 2 == 0:
        raise ValueError(f"points is odd, so that the parameters are among them, but got {count}.")
    if not 0 < radius < float("inf"):
        raise ValueError(f"Expected a positive radius, but got {radius}.")
    if crowd != "adaptive" and (isinstance(crowd, str) or not 1 <= crowd < float("inf")):
        raise ValueError(f"crowd is 1 or more, or 'adaptive', but got {crowd!r}.")
