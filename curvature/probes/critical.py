"""How far a step may go before the loss is higher than where it began, and the sharpness that this amounts to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.points import Points
from curvature.progress import Run
from curvature.result import Quantity, Result

OCTAVES = 60  # up and down from the first guess
BELOW = 4  # octaves below a crossing in which an earlier one is looked for
NOISE = 10  # units of it that a difference of losses has to be


@dataclass(frozen=True, kw_only=True, repr=False)
class CriticalSharpness(Result):
    """`value` = 2 / eta, where `step` = eta is the first at which L(theta - eta d) is above L(theta).

    `slope` = g.d is how fast the loss falls at first; `losses` (k,) are those at `steps` (k,), ascending, from 0 on.
    NaN where d is no direction of descent, or the loss falls by less than rounding; 0 where it never rises again.
    """

    value: Float[Tensor, ""]
    step: float
    slope: float
    steps: Float[Tensor, " k"]
    losses: Float[Tensor, " k"]

    def summary(self) -> dict[str, str]:
        if math.isnan(self.step):
            why = "no direction of descent" if not self.slope > 0 else "the loss falls by less than rounding"
            return {"critical sharpness": f"none: {why}"}
        return {
            "critical sharpness": f"{float(self.value):.5g}",
            "critical step": f"{self.step:.5g}, from {len(self.steps) - 1} steps",
        }

    def quantities(self) -> dict[str, Quantity]:
        return {"critical_sharpness": Quantity(float(self.value)), "critical_step": Quantity(self.step)}

    __repr__ = Result.__str__


def critical_sharpness(
    objective: Objective,
    direction: Float[Tensor, " n"] | None = None,
    *,
    start: float | None = None,
    rtol: float = 0.05,
    run: Run | None = None,
) -> CriticalSharpness:
    """2 / eta for the first eta > 0 with L(theta - eta d) > L(theta): the learning rate beyond which a step along d,
    the gradient unless another is given, makes the loss larger. No second derivatives, and a pass of values each eta.

    On a quadratic it is d.H d / g.d; with the gradient a mean of the eigenvalues, so that it is at most the largest.
    `direction` is what is subtracted: of an optimizer its step without the learning rate. The loss of one task along
    the updates of another is `critical_sharpness(second, first.gradient())`.

    The first crossing is looked for among powers of 2 times `start`, such as the critical step found before, from the
    first with a higher loss down to the last with a lower one that has three more below it, and then bisected to
    `rtol`: what rises and falls again between these points, or far below `start`, is not seen. Differences below ten
    units of rounding, or of what two evaluations of the same point differ by, count for none.

    Kalra & Barkeshli 2024 (arXiv:2406.09405); Kalra et al. 2026 (arXiv:2601.16979).

    >>> unit = torch.nn.Linear(1, 1, bias=False)
    >>> parabola = Objective.from_loss(unit, lambda m, x: 3 * m(x).square().mean() / 2, torch.ones(1, 1))
    >>> round(float(critical_sharpness(parabola.at(torch.ones(1)), rtol=1e-4).value), 3)
    3.0
    """
    need_objective("critical_sharpness", objective)
    space, theta = objective.space, objective.position
    if direction is not None and direction.shape != (space.size,):
        raise ValueError(f"Expected a direction ({space.size},), but got {tuple(direction.shape)}.")
    if not 0 < rtol < 1 or (start is not None and not 0 < start < math.inf):
        raise ValueError(f"Expected rtol between 0 and 1, and a positive start or None, but got {rtol} and {start}.")
    points = Points(objective)
    given = None if direction is None else direction.detach().to(space.device, space.dtype)
    options = {"rtol": rtol, "start": start, "direction": None if given is None else digest(given)}
    work = points.work("critical_sharpness", options, run)
    gradient = work.piece(lambda: {"gradient": objective.gradient()})["gradient"]
    d = gradient if given is None else given
    slope = float(space.inner(gradient[None], d[None])[0, 0])

    def loss(eta: float) -> float:
        return float(work.piece(lambda: {"values": points.alone(theta - eta * d)})["values"][0, 0])

    found = {0.0: loss(0.0)}
    noise = NOISE * max(abs(loss(0.0) - found[0.0]), space.eps * abs(found[0.0]))

    def rises(eta: float) -> bool:
        if eta not in found:
            found[eta] = loss(eta)
            work.report(len(found), max(20, len(found)), f"step {eta:.4g}: {found[eta] - found[0.0]:+.3g}")
        return not found[eta] - found[0.0] <= noise  # what is not finite has risen

    step = math.nan
    if slope > 0:
        length = float(space.norms(theta[None])[0]) or 1.0
        step = _crossing(rises, start or 1e-3 * length / float(space.norms(d[None])[0]), rtol)
    lowest = min((value for value in found.values() if math.isfinite(value)), default=math.nan)
    if not found[0.0] - lowest > noise:
        step = math.nan
    steps = sorted(found)
    return CriticalSharpness(
        value=torch.tensor(2 / step, dtype=torch.float64),
        step=step,
        slope=slope,
        steps=torch.tensor(steps, dtype=torch.float64),
        losses=torch.tensor([found[eta] for eta in steps], dtype=torch.float64),
        cost=work.cost,
        origin=work.origin,
    )


def _crossing(rises: Callable[[float], bool], first: float, rtol: float) -> float:
    """The least power of 2 times `first` at which `rises` is true and below which it is not, bisected."""
    high = next((k for k in range(OCTAVES) if rises(first * 2.0**k)), None)
    if high is None:
        return math.inf
    lowest = high - OCTAVES
    k = high - 1
    while k >= max(high - BELOW, lowest):
        high, k = (k, k - 1) if rises(first * 2.0**k) else (high, k - 1)
    if rises(first * 2.0 ** (high - 1)):
        return math.nan
    below, above = first * 2.0 ** (high - 1), first * 2.0**high
    while above / below > 1 + rtol:
        middle = (below * above) ** 0.5
        below, above = (below, middle) if rises(middle) else (middle, above)
    return (below * above) ** 0.5
