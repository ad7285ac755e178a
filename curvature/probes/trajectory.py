"""A training run in the few directions in which it moved most, beside what a random walk would show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.objective.work import work_on
from curvature.operators.engine import need_objective
from curvature.probes.directions import positions
from curvature.result import Quantity, Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Trajectory(Result):
    """The principal components of c checkpoints: unit `directions` (k, n) around `centre` (n,), `coordinates` (c, k) of
    the checkpoints along them, and the share of the variance that each of all components explains, `explained` (c,).

    `walk` (c,) are the shares that a random walk of many dimensions has, seen at the same steps: nothing has been found
    where `explained` is like it, and the loops that the coordinates draw are then those of noise.
    """

    directions: Float[Tensor, "k n"]
    centre: Float[Tensor, " n"]
    coordinates: Float[Tensor, "c k"]
    explained: Float[Tensor, " c"]
    walk: Float[Tensor, " c"]

    def summary(self) -> dict[str, str]:
        count = len(self.directions)
        both = [float(shares[:count].sum()) for shares in (self.explained, self.walk)]
        each = ", ".join(f"{share:.1%}" for share in self.explained[:count].tolist())
        return {
            "checkpoints": f"{len(self.coordinates):,}",
            f"explained by {count}": f"{both[0]:.1%} ({each})",
            "a random walk": f"{both[1]:.1%}",
        }

    def quantities(self) -> dict[str, Quantity]:
        return {"explained": Quantity(float(self.explained[: len(self.directions)].sum()))}

    __repr__ = Result.__str__


def trajectory(
    objective: Objective,
    checkpoints: Iterable[Objective | Tensor | Mapping[str, Tensor]],
    *,
    count: int = 2,
    about: Literal["end", "mean"] = "end",
    steps: Iterable[float] | None = None,
    momentum: float = 0.0,
) -> Trajectory:
    """The principal components of a training run, from its checkpoints in order: objectives, flat parameters or
    state_dicts.

    They are those of the ways from each checkpoint to the last one, or to the mean of all. `steps` are the numbers of
    training steps after which they were taken, even where not given, and `momentum` that of the optimizer: a random
    walk of such steps is what `walk` tells of. In `plane(objective.at(run.centre), run.directions)` the run can be
    drawn: `.plot(trajectory=rows)`, with rows as `positions` returns them. No loss is computed.

    Li, Xu, Taylor, Studer & Goldstein 2018 (arXiv:1712.09913), section 7; Antognini & Sohl-Dickstein 2018
    (arXiv:1806.08805) for the walk: of one centred at its mean the k-th component explains 6 / (pi k)^2, and relative
    to its end 8 / (pi (2k - 1))^2, 81 % and 9 %.
    """
    need_objective("trajectory", objective)
    rows = positions(objective, checkpoints)
    times = torch.arange(len(rows)).double() if steps is None else torch.tensor(list(steps), dtype=torch.float64)
    _check(rows, times, count, about, momentum)
    space = objective.space
    options = {"count": count, "about": about, "steps": times.tolist(), "momentum": momentum, "rows": digest(rows)}
    work = work_on(objective, "trajectory", options=options)
    centre = rows[-1] if about == "end" else rows.double().mean(0).to(rows.dtype)
    away = rows - centre
    values, vectors = torch.linalg.eigh(space.inner(away, away).double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if not values[count - 1] > 1e-12 * values[0]:
        raise ValueError(f"The checkpoints do not move in {count} directions. Take more of them, or a smaller count.")
    directions = space.combine((vectors[:, :count] / values[:count].sqrt()).T, away)
    return Trajectory(
        directions=directions,
        centre=centre,
        coordinates=space.inner(away, directions).cpu(),
        explained=(values / values.sum()).cpu(),
        walk=_walk(times, about, momentum),
        cost=work.cost,
        origin=work.origin,
    )


def _walk(times: Float[Tensor, " c"], about: str, momentum: float) -> Float[Tensor, " c"]:
    """The shares of the variance along the axes of a random walk in infinitely many dimensions, where all sums over
    dimensions are their means: the eigenvalues of the covariance in time."""
    first, gap = torch.minimum(times[:, None], times), (times[:, None] - times).abs()
    # sum of (1 - momentum^j) (1 - momentum^(j + gap)) for j up to `first`: what an increment of age j has come to
    covariance = first - (1 + momentum**gap) * momentum * (1 - momentum**first) / (1 - momentum)
    covariance += momentum**gap * momentum**2 * (1 - momentum ** (2 * first)) / (1 - momentum**2)
    centring = torch.eye(len(times), dtype=torch.float64)
    if about == "end":
        centring[:, -1] -= 1
    else:
        centring -= 1 / len(times)
    values = torch.linalg.eigvalsh(centring @ covariance @ centring.T).flip(0).clamp(min=0)
    return values / values.sum()


def _check(rows: Tensor, times: Tensor, count: int, about: Any, momentum: float) -> None:
    if about not in ("end", "mean"):
        raise ValueError(f"about is 'end' or 'mean', but got {about!r}.")
    if len(rows) < 3 or not 1 <= count < len(rows):
        raise ValueError(f"Expected at least 3 checkpoints and fewer components, but got {len(rows)} and {count}.")
    if len(times) != len(rows) or not (times.diff() > 0).all() or not times[0] >= 0:
        raise ValueError(
            f"Expected a rising number of steps for each of {len(rows)} checkpoints, but got {times.tolist()}."
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is at least 0 and less than 1, but got {momentum}.")
