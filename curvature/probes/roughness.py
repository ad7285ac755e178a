"""How rough the loss is around the parameters: how much it goes up and down along lines through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.directions import SCALES, Scale, to_scale
from curvature.probes.points import Norm, Points
from curvature.progress import Run
from curvature.result import Estimate, Quantity, with_error

FEWEST = 3  # directions, of which the jackknife leaves one out and needs two
FEW = 5  # degrees of freedom, of an index that needs more directions
ROUNDING = 100  # units of rounding of the loss, within which a profile is nothing else


@dataclass(frozen=True, kw_only=True, repr=False)
class Roughness(Estimate):
    """The Roughness Index, `value`: the standard deviation over directions of the variation of the loss along each, as
    a share of its mean.

    `profiles` (k, p) are the loss at theta + s v for s in `coordinates` (p,), for each of k directions v. `coarse` is
    the index that every other point gives. `faint` (k,) marks profiles whose range is no more than rounding.
    """

    profiles: Float[Tensor, "k p"]
    coordinates: Float[Tensor, " p"]
    coarse: Float[Tensor, ""]
    faint: Bool[Tensor, " k"]

    @property
    def oscillation(self) -> Float[Tensor, " k"]:
        """The total variation of each profile, in ranges: 1 for one that is monotone, 2 for a symmetric valley, and
        more only where it goes up and down again. NaN where the loss is constant, or not finite."""
        return _oscillation(self.profiles)

    @property
    def variations(self) -> Float[Tensor, " k"]:
        """The same per length of the line: what the index is made of."""
        return self.oscillation / (self.coordinates[-1] - self.coordinates[0])

    def summary(self) -> dict[str, str]:
        turns = self.oscillation
        known = turns[turns.isfinite()]
        lost, faint = len(turns) - len(known), int(self.faint.sum())
        shown = super().summary()
        if len(known):
            above = float((known > 2 + 1e-6).double().mean())
            mean = with_error(float(known.mean()), float(known.std()) / len(known) ** 0.5, len(known) - 1)
            shown["oscillation"] = f"{mean}, up to {float(known.max()):.4g}; {above:.0%} above 2"
        shown["half as many steps"] = f"{float(self.coarse):.4g}"
        if self.dof < FEW:
            shown["rests on"] = f"{self.dof + 1:.0f} of {len(turns)} directions or so: take more of them"
        if lost:
            shown["no index"] = f"{lost} of {len(turns)} profiles are constant or not finite, and have no variation"
        if faint:
            shown["rounding"] = f"{faint} of {len(turns)} profiles: take a larger radius, or dtype=torch.float64"
        return shown | {"batch normalisation": str(self.origin.options["norm"])}

    def quantities(self) -> dict[str, Quantity]:
        turns = self.oscillation[self.oscillation.isfinite()]
        if len(turns) < 2:
            return super().quantities()
        mean = Quantity(float(turns.mean()), float(turns.std()) / len(turns) ** 0.5, len(turns) - 1)
        return {**super().quantities(), "oscillation": mean}

    __repr__ = Estimate.__repr__


def roughness(
    objective: Objective,
    *,
    directions: int | Float[Tensor, "k n"] = 50,
    radius: float = 0.01,
    steps: int = 10,
    scale: Scale | None = "filter",
    seed: int = 0,
    norm: Norm = "frozen",
    run: Run | None = None,
) -> Roughness:
    """The Roughness Index std(T) / mean(T) over directions v, where T is the total variation of f(s) = L(theta + s v)
    for s from -radius to radius, in `steps` equal steps, over 2 radius (max f - min f).

    It says how differently directions look: 0 where all are alike, at the bottom of a quadratic as on a slope far from
    it. How much each goes up and down is in `oscillation`. The error is that of the choice of directions, by the
    jackknife, with fewer degrees of freedom where few of them make the index; of a kind that is rarer than 3 in all
    those drawn there may be none, and no error bar knows. Steps miss what is finer than they are: compare the value
    with `coarse`, that of half as many.

    `directions` is how many to draw, as `random_directions` does by `scale` and `seed`, or the rows themselves. `norm`
    is as in `line`. An index that has a constant profile, or one that is not finite, is NaN. Raises ValueError for
    fewer than 3 directions or an odd number of steps; an interrupt, Interrupted with the profiles so far.

    Biases and weights of normalisations stay where they are. The authors' code moves each bias along itself: to do so
    too, give rows of `random_directions` with the parameters in their place.

    Wu, Jian, Du, Chen & Zhou 2021 (arXiv:2103.11069).

    >>> unit, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> valley = Objective.from_loss(unit, lambda m, x: m(x).square().mean(), x).at(torch.zeros(1))
    >>> roughness(valley, directions=torch.tensor([[1.0], [2.0], [3.0]]), radius=1.0, steps=4).oscillation
    tensor([2., 2., 2.], dtype=torch.float64)
    """
    need_objective("roughness", objective)
    count = len(directions) if isinstance(directions, Tensor) else directions
    _check(objective, directions, count, radius, steps, scale)
    points = Points(objective, norm=norm)
    if isinstance(directions, Tensor):
        rows, chosen, seeded = iter(directions.detach()), {"directions": digest(directions.detach())}, None
    else:
        rows, chosen, seeded = _drawn(objective, scale, seed), {"directions": count, "scale": scale}, seed
    work = points.work("roughness", {"radius": radius, "steps": steps, **chosen}, run, seeded)
    half = steps // 2
    coordinates = radius * torch.arange(-half, half + 1, dtype=torch.float64) / half
    lines = _Lines(objective, rows, coordinates[coordinates != 0])
    found = points.nothing(count * steps)
    # f(0) is the same on all lines: once, and by itself, so that it is the value of the objective to the last bit
    centre = work.piece(lambda: {"values": points.alone(objective.position)})["values"].cpu()

    def result(known: int, *, complete: bool) -> Roughness:
        left, right = found[: known * steps].view(known, steps).tensor_split(2, dim=1)
        profiles = torch.cat([left, centre.expand(known, 1), right], dim=1)
        turns = _oscillation(profiles)
        return Roughness(
            value=_index(turns),
            stderr=_jackknife(turns),
            samples=known,
            dof=_freedom(turns),
            profiles=profiles,
            coordinates=coordinates,
            coarse=_index(_oscillation(profiles[:, ::2])),
            faint=_range(profiles) <= ROUNDING * objective.space.eps * profiles.abs().amax(1),
            complete=complete,
            cost=work.cost,
            origin=work.origin,
        )

    try:
        points.fill(found, work, lines)
    except KeyboardInterrupt as stop:
        there = (~found.isnan()).nonzero()[:, 0]
        known = (int(there[-1]) + 1) // steps if len(there) else 0
        if known < FEWEST:
            raise KeyboardInterrupt from stop
        raise Interrupted(result(known, complete=False)) from stop
    return result(count, complete=True)


def total_variation(values: Float[Tensor, "... p"]) -> Tensor:
    """How much a function goes up and down from one point to the next, sum_j |f_{j+1} - f_j|."""
    return values.diff(dim=-1).abs().sum(-1)


def _oscillation(profiles: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
    return total_variation(profiles) / _range(profiles)


def _range(profiles: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
    return profiles.amax(1) - profiles.amin(1)


def _index(variations: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Their standard deviation by their mean, in which their unit cancels."""
    return variations.std() / variations.mean()


def _jackknife(variations: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """The standard error of the index: from what it is without each of the directions."""
    count, mean = len(variations), variations.mean()
    away = variations - mean
    # leaving x out takes k (x - mean)^2 / (k - 1) from the sum of squares, and moves the mean by (x - mean) / (k - 1)
    squares = away.square().sum() - away.square() * count / (count - 1)
    others = (squares.clamp(min=0) / (count - 2)).sqrt() / (mean - away / (count - 1))
    return others.std(correction=0) * (count - 1) ** 0.5


def _freedom(variations: Float[Tensor, " k"]) -> float:
    """The degrees of freedom of the error: as many directions as carry the spread, less one. Where one in twenty is
    unlike the others, fifty of them know the error no better than a few samples would."""
    squares = (variations - variations.mean()).square()
    carrying = squares.sum().square() / squares.square().sum()
    most = len(variations) - 1.0
    return float((carrying - 1).nan_to_num(most).clamp(1, most))


class _Lines:
    """The points theta + s v for s in `offsets`, line after line. Slices of them are asked for in order, so that no
    more directions are held than they touch: fifty of a large model would not fit into memory."""

    def __init__(self, objective: Objective, rows: Iterator[Tensor], offsets: Float[Tensor, " s"]) -> None:
        self.rows = enumerate(rows)
        self.start, self.offsets = objective.position, offsets.to(objective.position)
        self.held: dict[int, Tensor] = {}

    def __call__(self, some: slice) -> Float[Tensor, "c n"]:
        places = torch.arange(some.start, some.stop)
        lines, steps = places // len(self.offsets), places % len(self.offsets)
        first, last = int(lines[0]), int(lines[-1])
        self.held = {number: row for number, row in self.held.items() if number >= first}
        while last not in self.held:
            number, row = next(self.rows)
            if number >= first:  # those before are of points that a checkpoint has
                self.held[number] = row
        along = torch.stack([self.held[number].to(self.start) for number in lines.tolist()])
        return self.start + self.offsets[steps, None] * along


def _drawn(objective: Objective, scale: Scale | None, seed: int) -> Iterator[Float[Tensor, " n"]]:
    """The rows of `random_directions`, one after another without end."""
    for row in objective.space.draws(seed=seed, kind="normal"):
        yield row if scale is None else to_scale(objective, row[None], scale)[0]


def _check(
    objective: Objective, directions: int | Tensor, count: int, radius: float, steps: int, scale: Scale | None
) -> None:
    size = objective.space.size
    if isinstance(directions, Tensor) and (directions.ndim != 2 or directions.shape[1] != size):
        raise ValueError(f"Expected directions (k, {size}), or how many to draw, but got {tuple(directions.shape)}.")
    if count < FEWEST:
        raise ValueError(f"The error of the index takes {FEWEST} directions at least, but got {count}. Take 50.")
    if steps < 4 or steps % 2:
        raise ValueError(f"steps is even, and 4 at least, so that half of them tell something, but got {steps}.")
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius is positive and finite, but got {radius}.")
    if scale is not None and scale not in SCALES:
        raise ValueError(f"scale is None, {', '.join(map(repr, SCALES))}, but got {scale!r}.")
