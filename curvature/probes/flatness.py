"""How the loss rises for random changes of the parameters: sharpness as an average, and how large a change it bears."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective, Interrupted
from curvature.linalg.deflation import UNSURE
from curvature.linalg.work import Work
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.points import AT_ONCE, BLOCK, Points
from curvature.progress import Run
from curvature.result import Estimate, Quantity, with_error

OCTAVES = 30  # up and down, in which a standard deviation is looked for


def average_sharpness(
    objective: Objective,
    sigma: float = 0.01,
    *,
    relative: bool = False,
    samples: int = 32,
    seed: int = 0,
    run: Run | None = None,
) -> Estimate:
    """How far the loss rises on average, E L(theta + sigma u) - L(theta) for standard normal u; on a quadratic
    sigma^2 tr H / 2.

    Where `relative` is true every entry of u is multiplied with the magnitude of its weight: that is invariant where
    the weights of ReLU networks are scaled without changing the function. Each of `samples` draws is taken with both
    signs, so that the gradient does not add to the standard error. An interrupt raises Interrupted with the average so
    far. Two passes over the data for each draw, many in one where tensors are small.

    Andriushchenko et al. 2023 (arXiv:2302.07011).
    """
    need_objective("average_sharpness", objective)
    if not 0 < sigma < math.inf or samples < 2:
        raise ValueError(f"Expected a positive sigma and samples >= 2, but got {sigma} and {samples}.")
    points = Points(objective)
    options = {"sigma": sigma, "relative": relative, "samples": samples}
    around = _Around(points, points.work("average_sharpness", options, run, seed), relative, samples, seed)
    rises: list[Tensor] = []

    def result(*, complete: bool) -> Estimate:
        found = torch.cat(rises)
        return Estimate(
            value=found.mean(),
            stderr=found.std() / len(found) ** 0.5,
            samples=len(found),
            dof=max(1.0, (len(found) - 1) / UNSURE),
            floor=10 * objective.space.eps * abs(float(around.centre)),
            complete=complete,
            cost=around.work.cost,
            origin=around.work.origin,
        )

    try:
        for pairs in around.rises(sigma, -sigma):
            rises.append(pairs.mean(0))
            around.work.report(sum(map(len, rises)), samples, unit="samples")
    except KeyboardInterrupt as stop:
        if sum(map(len, rises)) < 2:
            raise KeyboardInterrupt from stop
        raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class PacBayes(Estimate):
    """The standard deviation of random changes that raise the `quantity`, "error" or "loss", by `tolerance` on average.

    `rises` (k, samples) are those of each draw at each of `sigmas` (k,), ascending; `stderr` is the jackknife over
    draws. Infinite where no change was large enough, and 0 where none was small enough.
    """

    sigmas: Float[Tensor, " k"]
    rises: Float[Tensor, "k samples"]
    quantity: str
    tolerance: float

    @property
    def sharpness(self) -> Estimate:
        """1 / sigma^2, as generalisation bounds have it."""
        return Estimate(
            value=self.value**-2,
            stderr=2 * self.value**-3 * self.stderr,
            samples=self.samples,
            dof=self.dof,
            cost=self.cost,
            origin=self.origin,
        )

    def summary(self) -> dict[str, str]:
        sharpness = self.sharpness
        sigma = with_error(float(self.value), float(self.stderr), self.dof)
        return {
            "sigma": f"{sigma}: {self.quantity} + {self.tolerance:g}",
            "1 / sigma^2": with_error(float(sharpness.value), float(sharpness.stderr), sharpness.dof),
            "draws": f"{self.samples} at each of {len(self.sigmas)} sigmas",
        }

    def quantities(self) -> dict[str, Quantity]:
        found = {"sigma": self, "pac_bayes": self.sharpness}
        return {name: Quantity(float(e.value), float(e.stderr), e.dof) for name, e in found.items()}


def pac_bayes_flatness(
    objective: Objective,
    tolerance: float = 0.1,
    *,
    relative: bool = False,
    samples: int = 15,
    rtol: float = 0.05,
    seed: int = 0,
    run: Run | None = None,
) -> PacBayes:
    """The largest sigma with E err(theta + sigma u) - err(theta) <= tolerance for standard normal u.

    err is the share of wrong answers where the loss has such, else the loss, in whose units `tolerance` then is. With
    `relative` every entry of u is multiplied with the magnitude of its weight: that is invariant where the weights of
    ReLU networks are scaled without changing the function. The same `samples` draws serve every sigma: their mean rise
    is a function of it, whose root is bracketed by doubling and bisected to `rtol`. Where it rises and falls again
    that is a root, and not always the first. Each sigma takes `samples` points, some 15 of them.

    Dziugaite & Roy 2017 (arXiv:1703.11008); Jiang, Neyshabur, Mobahi, Krishnan & Bengio 2020 (arXiv:1912.02178).
    """
    need_objective("pac_bayes_flatness", objective)
    if not 0 < tolerance < math.inf or samples < 2 or not 0 < rtol < 1:
        raise ValueError(
            f"Expected a positive tolerance, samples >= 2 and rtol between 0 and 1, but got {tolerance}, {samples} and "
            f"{rtol}."
        )
    points, quantity = _judged(objective)
    options = {"tolerance": tolerance, "relative": relative, "samples": samples, "rtol": rtol}
    work = points.work("pac_bayes_flatness", options, run, seed)
    around = _Around(points, work, relative, samples, seed)
    found: dict[float, Tensor] = {}

    def too_far(sigma: float) -> bool:
        if sigma not in found:
            found[sigma] = torch.cat([rises[0] for rises in around.rises(sigma)])
            work.report(
                len(found), max(16, len(found)), f"sigma {sigma:.3g}: {float(found[sigma].mean()):+.3g}", "sigmas"
            )
        return not float(found[sigma].mean()) <= tolerance  # what is not finite is too far

    size = 1.0 if relative else float(points.objective.position.double().square().mean().sqrt()) or 1.0
    low = high = size / 16
    for _ in range(OCTAVES):
        if too_far(low):
            low, high = low / 2, low
        elif not too_far(high):
            low, high = high, 2 * high
        else:
            break
    if not too_far(low) and too_far(high):
        for beyond in (low / 2, 2 * high):  # where draws that are left out may have moved the root
            too_far(beyond)
        while high / low > 1 + rtol:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if too_far(middle) else (middle, high)
    sigmas = torch.tensor(sorted(found), dtype=torch.float64)
    rises = torch.stack([found[float(sigma)] for sigma in sigmas])
    others = (rises.sum(1, keepdim=True) - rises) / (samples - 1)
    left_out = torch.stack([_root(sigmas, curve, tolerance) for curve in others.T])
    spread = (left_out - left_out.mean()).square().sum()
    return PacBayes(
        value=_root(sigmas, rises.mean(1), tolerance),
        stderr=(spread * (samples - 1) / samples).sqrt(),
        samples=samples,
        dof=samples - 1,
        sigmas=sigmas,
        rises=rises,
        quantity=quantity,
        tolerance=tolerance,
        cost=work.cost,
        origin=work.origin,
    )


def _root(sigmas: Float[Tensor, " k"], curve: Float[Tensor, " k"], tolerance: float) -> Float[Tensor, ""]:
    """Where the curve first comes to the tolerance, straight in log sigma between its points; 0 or infinity for a
    curve that is above, or below, everywhere."""
    above = ~(curve <= tolerance)
    if not above.any():
        return torch.tensor(math.inf, dtype=torch.float64)
    high = int(above.long().argmax())
    if high == 0:
        return torch.zeros((), dtype=torch.float64)
    share = ((tolerance - curve[high - 1]) / (curve[high] - curve[high - 1])).nan_to_num(0.0)
    return sigmas[high - 1] * (sigmas[high] / sigmas[high - 1]) ** share


def _judged(objective: Objective) -> tuple[Points, str]:
    """Points with their share of right answers, where the loss has such."""
    try:
        return Points(objective, accuracy=True), "error"
    except BadObjective:
        return Points(objective), "loss"


class _Around:
    """Random points around the parameters: at theta + a u for the same draws u, of which few are held at a time."""

    def __init__(self, points: Points, work: Work, relative: bool, samples: int, seed: int) -> None:
        self.points, self.work = points, work
        self.theta = points.objective.position
        self.scale = self.theta.abs() if relative else torch.ones_like(self.theta)
        generator = torch.Generator().manual_seed(seed)
        self.seeds = torch.randint(2**32, (samples,), generator=generator).tolist()
        self.centre = self._quantity(work.piece(lambda: {"values": points.alone(self.theta)})["values"])

    def rises(self, *amplitudes: float) -> Iterator[Float[Tensor, "a k"]]:
        """By how much the loss, or the error, is higher at theta + a u, for each amplitude a and the next draws u."""
        space = self.points.objective.space
        step = max(1, min(AT_ONCE, BLOCK // space.size) // len(amplitudes))

        def values(seeds: list[int]) -> Float[Tensor, "ak m"]:
            draws = self.scale * torch.cat([space.draw(1, seed=seed, kind="normal") for seed in seeds])
            return self.points(torch.cat([self.theta + a * draws for a in amplitudes]))

        for start in range(0, len(self.seeds), step):
            some = self.seeds[start : start + step]
            found = self.work.piece(lambda some=some: {"values": values(some)})["values"]
            yield (self._quantity(found) - self.centre).view(len(amplitudes), len(some))

    def _quantity(self, values: Float[Tensor, "k m"]) -> Float[Tensor, " k"]:
        """The loss, or 1 - accuracy."""
        return (values[:, 0] if self.points.right is None else 1 - values[:, 1]).cpu()
