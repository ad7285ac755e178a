"""The loss along paths between parameters: straight lines, polygons and Bézier curves.

A path is theta(t) = sum_j c_j(t) w_j, with coefficients of the knots w_j that sum to 1. It begins at the first knot for
t = 0 and ends at the last for t = 1; what is in between depends on the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import Interrupted, NonFinite, listing
from curvature.linalg.space import Space
from curvature.objective.batches import digest
from curvature.objective.function import cast
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.directions import orthogonal, positions
from curvature.probes.points import Norm, Points
from curvature.probes.roughness import total_variation
from curvature.progress import Run
from curvature.result import Quantity, Result

Kind = Literal["polygon", "bezier"]
End = Objective | Tensor | Mapping[str, Tensor]

POINTS = 61
NODES = 8  # of Gauss and Legendre between two points: exact for a polygon, to 1e-8 and better for a smooth Bézier curve


def hats(t: Float[Tensor, " p"], count: int) -> Float[Tensor, "p count"]:
    """Each rises from 0 to 1 at its knot and falls again; the first and last edges go on straight."""
    edges = steps(t, count - 1)
    along = (t * (count - 1) - edges.argmax(1))[:, None]
    return F.pad(edges * (1 - along), (0, 1)) + F.pad(edges * along, (1, 0))


def steps(t: Float[Tensor, " p"], count: int) -> Float[Tensor, "p count"]:
    """1 on an edge of its own, and 0 on the others."""
    edge = (t * count).floor().clamp(0, count - 1).long()
    return F.one_hot(edge, count).to(t.dtype)


def bernstein(t: Float[Tensor, " p"], count: int) -> Float[Tensor, "p count"]:
    """The Bernstein polynomials of degree count - 1."""
    degree, t = count - 1, t[:, None]
    j = torch.arange(count)
    return torch.tensor([math.comb(degree, i) for i in range(count)]) * t**j * (1 - t) ** (degree - j)


class Curve(NamedTuple):
    """Coefficients at t (p,) for so many of them, (p, count) each: those of the knots, which make theta(t), and those
    of the edges between them, which times the number of edges make its derivative."""

    knots: Callable[[Tensor, int], Tensor]
    edges: Callable[[Tensor, int], Tensor]


CURVES: dict[str, Curve] = {"polygon": Curve(hats, steps), "bezier": Curve(bernstein, bernstein)}


class Along(TypedDict, total=False):
    """How `path`, `interpolate` and `connect` look along a path.

    `points` (61) are evenly spaced in t from 0 to 1, and about as dense on to -`beyond` (0) and 1 + `beyond`, where the
    last edges of a polygon go on straight and the polynomial of a Bézier curve as it will. `refine` (0) more points are
    put around the one that is highest above the straight line from L(0) to L(1). `norm` says what batch normalisation
    does: the statistics are "recalibrated" at every point (by default: between two networks those of neither are
    right), "frozen" as the objective has them, or those of the "batch". `accuracy` asks for the share of right answers,
    and `held_out` for all that of other data. With a checkpoint in `run` a path that was interrupted goes on.
    """

    points: int
    beyond: float
    refine: int
    norm: Norm
    accuracy: bool
    held_out: Any
    run: Run | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Path(Result):
    """The loss L(t) at theta(t) for `t` (p,) ascending, 0 and 1 among them, on the path of `knots` (b, n). `arc` (p,)
    is the length of the path from t = 0, negative before it.

    `accuracy` is the share of right answers, likewise, and `held_out_loss` and `held_out_accuracy` are of other data,
    where they were asked for. What is not finite is kept as it is, and so are numbers made of it; what an interrupt
    left out is NaN. All numbers below are of t from 0 to 1.
    """

    t: Float[Tensor, " p"]
    knots: Float[Tensor, "b n"]
    arc: Float[Tensor, " p"]
    loss: Float[Tensor, " p"]
    accuracy: Float[Tensor, " p"] | None = None
    held_out_loss: Float[Tensor, " p"] | None = None
    held_out_accuracy: Float[Tensor, " p"] | None = None

    @property
    def kind(self) -> Kind:
        """What the knots make: "polygon" or "bezier"."""
        return self.origin.options["kind"]

    @property
    def between(self) -> Bool[Tensor, " p"]:
        """Where t is from 0 to 1."""
        return (self.t >= 0) & (self.t <= 1)

    @property
    def barrier(self) -> float:
        """max L(t) - ((1 - t) L(0) + t L(1)), 0 where the loss is never above that line (Frankle, Dziugaite, Roy &
        Carbin 2020, arXiv:1912.05671, who ask it of straight paths)."""
        return float(self.heights(self.loss).max())

    @property
    def held_out_barrier(self) -> float | None:
        """The same of the held-out loss, where there is one."""
        return None if self.held_out_loss is None else float(self.heights(self.held_out_loss).max())

    @property
    def climb(self) -> float:
        """max L(t) - max(L(0), L(1)): what there is to climb from the higher end."""
        loss = self.loss[self.between]
        return float(loss.max() - torch.maximum(loss[0], loss[-1]))

    @property
    def variation(self) -> float:
        """The total variation, sum |L(t_i+1) - L(t_i)|: |L(1) - L(0)| where the loss only rises or only falls."""
        return float(total_variation(self.loss[self.between]))

    @property
    def mean(self) -> float:
        """The mean of the loss over the length of the path, by the trapezoidal rule; NaN where it has no length."""
        loss, arc = self.loss[self.between], self.arc[self.between]
        return float(torch.trapezoid(loss, arc) / (arc[-1] - arc[0]))

    @property
    def rows(self) -> Float[Tensor, "p n"]:
        """theta(t), the parameters at every point."""
        return CURVES[self.kind].knots(self.t, len(self.knots)).to(self.knots) @ self.knots

    @property
    def plane(self) -> Float[Tensor, "2 n"]:
        """Directions of the plane of the ends and the first bend: from the first knot to the last, and at right angles
        to that, as long. ValueError where the path does not bend.

        With the curve drawn into it:

            seen = plane(objective.at(curve.knots[0]), curve.plane, radius=1.2)
            seen.plot(trajectory=curve.rows)
        """
        chord, bend = self.knots[-1] - self.knots[0], self.knots[1] - self.knots[0]
        if len(self.knots) == 2:
            raise ValueError("A straight path lies in no plane of its own. Look along it, or `connect` its ends.")
        across = orthogonal(torch.stack([chord, bend]))[1]
        return torch.stack([chord, across * (chord.norm() / across.norm())])

    def chord(self, values: Float[Tensor, " p"]) -> Float[Tensor, " q"]:
        """The straight line in t between the ends of values, such as the loss."""
        t, values = self.t[self.between], values[self.between]
        return torch.lerp(values[0], values[-1], t)

    def heights(self, values: Float[Tensor, " p"]) -> Float[Tensor, " q"]:
        """How far values, such as the loss or -accuracy, are above their chord."""
        return values[self.between] - self.chord(values)

    def monotone(self, tol: float = 0.0) -> bool:
        """Whether the loss falls all the way, never rising by more than `tol` from a point to the next."""
        return bool((self.loss[self.between].diff() <= tol).all())

    def summary(self) -> dict[str, str]:
        loss, heights = self.loss[self.between], self.heights(self.loss)
        long = bool(self.arc[-1] > self.arc[0])
        lost = int((~self.loss.isfinite()).sum())
        peak = float(self.t[self.between][heights.argmax()])
        held_out = {} if self.held_out_barrier is None else {"held-out barrier": f"{self.held_out_barrier:.4g}"}
        return {
            "loss": f"{float(loss[0]):.4g} to {float(loss[-1]):.4g}"
            + (f", {self.mean:.4g} on average over the length" if long else ", on a path of no length"),
            "barrier": f"{self.barrier:.4g}" + (f" at t = {peak:.3g}" if self.barrier > 0 else ""),
            **held_out,
            "climb": f"{self.climb:.4g} above the higher end",
            "total variation": f"{self.variation:.4g}" + (", falling all the way" if self.monotone() else ""),
            "points": f"{len(self.t)} on a {self.kind} of {len(self.knots)} knots",
            **({"not finite": f"at {lost:,} points"} if lost else {}),
            "batch normalisation": str(self.origin.options["norm"]),
        }

    def table(self) -> dict[str, list[Any]]:
        names = ("t", "arc", "loss", "accuracy", "held_out_loss", "held_out_accuracy")
        columns = {name: getattr(self, name) for name in names}
        return {name: column.tolist() for name, column in columns.items() if column is not None}

    def quantities(self) -> dict[str, Quantity]:
        found = {
            "barrier": self.barrier,
            "held_out_barrier": self.held_out_barrier,
            "climb": self.climb,
            "total_variation": self.variation,
            "mean_loss": self.mean,
        }
        return {name: Quantity(value) for name, value in found.items() if value is not None}

    __repr__ = Result.__str__


def path(objective: Objective, knots: Float[Tensor, "b n"], *, kind: Kind = "polygon", **along: Unpack[Along]) -> Path:
    """The loss along the path of `knots` (b, n), parameters as rows: see Along for the options. No derivatives are
    taken.

    A "polygon" goes straight from knot to knot, in equal shares of t; a "bezier" curve, of degree b - 1, is drawn
    towards those between its ends. Buffers are those of the objective all along: of two networks with batch
    normalisation they fit one at most, unless the statistics are recalibrated. An interrupt raises Interrupted with the
    points so far.

    >>> unit, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> parabola = Objective.from_loss(unit, lambda m, x: m(x).square().mean(), one)
    >>> path(parabola, torch.tensor([[2.0], [0.0], [1.0]]), points=5).loss
    tensor([4.0000, 1.0000, 0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    need_objective("path", objective)
    n = objective.space.size
    if knots.ndim != 2 or len(knots) < 2 or knots.shape[1] != n:
        raise ValueError(f"A path takes 2 knots or more, rows (b, {n}), but got {tuple(knots.shape)}.")
    if not knots.isfinite().all():
        raise NonFinite("The knots are not all finite.", "Take checkpoints from before the run diverged.")
    knots = knots.detach().to(objective.space.device, objective.space.dtype)
    return Walk("path", objective, knots, kind, along, {"knots": digest(knots)}).measure()


def interpolate(objective: Objective, end: End, **along: Unpack[Along]) -> Path:
    """The loss on the straight line from the objective's parameters to `end`: see Along for the options, and `path`.

    `end` is another objective of the same parameters, a flat vector (n,) of them, or a state_dict. From where training
    began to where it ended the loss falls all the way for most networks; `beyond=0.2` shows what comes next. Between
    two networks that were trained apart there is a barrier, part of which is that their hidden units come in another
    order: `align` them first. ValueError where the ends differ in parameters that the objective holds fixed.

    Goodfellow, Vinyals & Saxe 2015 (arXiv:1412.6544).

    >>> unit, one = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> parabola = Objective.from_loss(unit, lambda m, x: m(x).square().mean(), one)
    >>> straight = interpolate(parabola.at(-torch.ones(1)), torch.ones(1), points=5)
    >>> straight.loss, straight.barrier
    (tensor([1.0000, 0.2500, 0.0000, 0.2500, 1.0000], dtype=torch.float64), 0.0)
    """
    need_objective("interpolate", objective)
    return path(objective, torch.stack([objective.position, end_of(objective, end).position]), **along)


def end_of(objective: Objective, end: End) -> Objective:
    """The objective at the end of a path, with the buffers that `end` has where it is more than a flat vector."""
    other = objective.with_state(end) if isinstance(end, Mapping) else end
    row = positions(objective, [other])[0]
    if not row.isfinite().all():
        raise NonFinite("The parameters at the end are not all finite.", "Take a checkpoint from before that.")
    if isinstance(other, Tensor):
        return objective.at(row)
    space, own = other.space, objective.space
    kept = cast({**other.frozen, **other.buffers}, own.device, own.dtype)
    if (space.names, space.shapes) != (own.names, own.shapes) or kept.keys() != {*objective.frozen, *objective.buffers}:
        raise ValueError("The ends are of different models, or of different parameters: give them the same `select`.")
    if moved := [name for name, t in objective.frozen.items() if not torch.equal(t, kept[name])]:
        raise ValueError(
            f"The ends differ in parameters that are held fixed: {listing(moved)}. Select these too, or give the end "
            "as a flat vector to keep those of the objective."
        )
    return replace(objective.at(row), buffers={name: kept[name] for name in objective.buffers})


class Walk:
    """The points of a path, and the values there as they become known; ValueError for options that it cannot take.

    `knots` may still be moved, as long as nothing was measured: what makes them is in `options` and `seed`.
    """

    def __init__(
        self,
        question: str,
        objective: Objective,
        knots: Float[Tensor, "b n"],
        kind: Kind,
        along: Along,
        options: Mapping[str, Any],
        seed: int | None = None,
    ) -> None:
        count, beyond, refine = along.get("points", POINTS), along.get("beyond", 0.0), along.get("refine", 0)
        if kind not in CURVES:
            raise ValueError(f"kind is {' or '.join(map(repr, CURVES))}, but got {kind!r}.")
        if count < 2 or refine < 0:
            raise ValueError(f"points is 2 at least, for the ends, and refine 0 or more, but got {count} and {refine}.")
        if not 0 <= beyond < math.inf:
            raise ValueError(f"beyond is how far t goes on past both ends, finite and 0 or more, but got {beyond}.")
        self.points = Points(
            objective,
            norm=along.get("norm", "recalibrated"),
            accuracy=along.get("accuracy", False),
            held_out=along.get("held_out"),
        )
        shown = {"kind": kind, "points": count, "beyond": beyond, "refine": refine}
        self.work = self.points.work(question, {**shown, **options}, along.get("run"), seed)
        self.knots, self.curve, self.refine = knots, CURVES[kind], refine
        inside = torch.linspace(0, 1, count, dtype=torch.float64)
        before = torch.linspace(-beyond, 0, math.ceil(beyond * (count - 1)) + 1, dtype=torch.float64)[:-1]
        self.t = torch.cat([inside[[0, -1]], before, inside[1:-1], 1 - before])
        self.values = self.points.nothing(len(self.t))

    def measure(self) -> Path:
        """The values at all points, and at those around the highest."""
        ends = self.knots[[0, -1]]
        # by themselves, so that they are the values of the objective to the last bit
        alone = self.work.piece(lambda: {"values": torch.cat([self.points.alone(row) for row in ends])})
        self.values[:2] = alone["values"].cpu()
        try:
            self._fill(2)
            if self.refine:
                known = len(self.t)
                self.t = torch.cat([self.t, self._around()])
                self.values = torch.cat([self.values, self.points.nothing(len(self.t) - known)])
                self._fill(known)
        except KeyboardInterrupt as stop:
            raise Interrupted(self.result(complete=False)) from stop
        return self.result(complete=True)

    def result(self, *, complete: bool) -> Path:
        """What is known, in the order of t."""
        t, order = self.t.sort()
        return Path(
            t=t,
            knots=self.knots,
            arc=_arc(t, self.knots, self.curve, self.points.objective.space),
            complete=complete,
            cost=self.work.cost,
            origin=self.work.origin,
            **dict(zip(self.points.names, self.values[order].T.contiguous(), strict=True)),
        )

    def _fill(self, start: int) -> None:
        coefficients = self.curve.knots(self.t[start:], len(self.knots)).to(self.knots.device)
        space = self.points.objective.space
        self.points.fill(self.values[start:], self.work, lambda some: space.combine(coefficients[some], self.knots))

    def _around(self) -> Float[Tensor, " r"]:
        """So many more points, shared between the intervals on both sides of the highest one."""
        found = self.result(complete=False)
        t, heights = found.t[found.between], found.heights(found.loss)
        peak = int(heights.nan_to_num(nan=-math.inf, posinf=math.inf).argmax())
        sides = [(t[a], t[a + 1]) for a in (peak - 1, peak) if 0 <= a < len(t) - 1]
        shares = [(self.refine + i) // len(sides) for i in range(len(sides))]
        ranges = zip(sides, shares, strict=True)
        return torch.cat([torch.linspace(a, b, n + 2, dtype=t.dtype)[1:-1] for (a, b), n in ranges])


def _arc(t: Float[Tensor, " p"], knots: Float[Tensor, "b n"], curve: Curve, space: Space) -> Float[Tensor, " p"]:
    """The length of the path from 0 to each t, ascending: the integral of |theta'|."""
    edges = knots.diff(dim=0)
    gram, count = space.inner(edges, edges).cpu(), len(edges)
    marks = torch.cat([t, torch.linspace(0, 1, len(knots), dtype=t.dtype)]).unique()  # |theta'| jumps at corners
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(NODES))
    d = curve.edges((marks[:-1, None] + marks.diff()[:, None] * (nodes + 1) / 2).flatten(), count)
    speeds = count * ((d @ gram) * d).sum(1).clamp(min=0).sqrt()
    arc = F.pad((speeds.view(-1, NODES) @ weights / 2 * marks.diff()).cumsum(0), (1, 0))
    return (arc - arc[torch.searchsorted(marks, 0.0)])[torch.searchsorted(marks, t)]
