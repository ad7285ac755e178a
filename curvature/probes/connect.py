"""Curves of low loss between networks: mode connectivity."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted, NonFinite
from curvature.linalg.operator import Meter
from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes, Sums
from curvature.objective.products import pulled
from curvature.operators.engine import need_objective
from curvature.probes.path import Along, Curve, End, Kind, Path, Walk, end_of, hats

EVERY = 100  # steps between two reports, and between two records of a checkpoint

State = dict[str, Tensor]  # bends (b, n) and their velocity, and the mean loss of the last steps


def connect(
    objective: Objective,
    end: End,
    *,
    kind: Kind = "bezier",
    bends: int = 1,
    steps: int = 3000,
    lr: float = 0.1,
    momentum: float = 0.9,
    seed: int = 0,
    **along: Unpack[Along],
) -> Path:
    """The loss along a curve from the objective's parameters to `end`, trained so that it is low all the way: on
    average over t uniform in [0, 1].

    Every step takes the gradient of one batch at theta(t) for a random t, and moves the `bends`, the knots between the
    ends, by SGD with momentum; they start evenly on the straight line. Batches come in a random order, epoch after
    epoch, and all are kept in memory; the objective's `l2` counts at theta(t). `end` and the other options are those of
    `interpolate`, for the path that is found: its `knots` are the trained ones, and `path` looks at it again.

    Gradients are taken in the mode of the objective, or, for norm="batch", with the statistics of the batch: for
    networks with batch normalisation, as in the paper,

        curve = connect(objective, end, norm="batch")
        path(objective, curve.knots, kind="bezier")  # recalibrated

    NonFinite where the training diverges. An interrupt raises Interrupted with the curve so far, whose values are
    known only once it is trained. Garipov, Izmailov, Podoprikhin, Vetrov & Wilson 2018 (arXiv:1802.10026).

    >>> from curvature.probes.path import interpolate
    >>> class Circle(torch.nn.Module):  # whose minima are a circle
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.place = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    ...     def forward(self, x):
    ...         return (self.place.square().sum() - 1) * x
    >>> objective = Objective.from_loss(Circle(), lambda m, x: m(x).square().mean(), torch.ones(1))
    >>> straight = interpolate(objective, torch.tensor([-0.6, 0.8]))
    >>> curve = connect(objective, torch.tensor([-0.6, 0.8]), steps=500, lr=0.02)
    >>> print(f"{straight.barrier:.3f}, {curve.barrier:.3f}")
    0.640, 0.004
    """
    need_objective("connect", objective)
    if bends < 1 or steps < 1:
        raise ValueError(f"Expected a bend and a step at least, but got bends={bends} and steps={steps}.")
    if not 0 < lr < math.inf or not 0 <= momentum < 1:
        raise ValueError(f"Expected lr > 0 and momentum in [0, 1), but got {lr} and {momentum}.")
    space = objective.space
    first, last = objective.position, end_of(objective, end).position
    even = hats(torch.linspace(0, 1, bends + 2, dtype=torch.float64), 2).to(space.device)
    knots = space.combine(even, torch.stack([first, last]))
    options = {"end": digest(last), "bends": bends, "steps": steps, "lr": lr, "momentum": momentum}
    walk = Walk("connect", objective, knots, kind, along, options, seed)
    training = _Training(walk.points.objective, knots, walk.curve, steps, lr, momentum, seed)
    state = {"bends": knots[1:-1], "velocity": torch.zeros_like(knots[1:-1])}
    try:
        for start in range(0, steps, EVERY):
            stop = min(start + EVERY, steps)
            state = walk.work.piece(partial(training.advanced, state, start, stop))
            walk.knots = torch.cat([first[None], state["bends"], last[None]])
            walk.work.report(stop, steps, f"loss {float(state['loss']):.4g} along the curve")
    except KeyboardInterrupt as interrupt:
        raise Interrupted(walk.result(complete=False)) from interrupt
    return walk.measure()


class _Training:
    """Steps of gradient descent on the bends of a curve; which batches they take, and where, depends on the seed."""

    def __init__(
        self,
        objective: Objective,
        knots: Float[Tensor, "b n"],
        curve: Curve,
        steps: int,
        lr: float,
        momentum: float,
        seed: int,
    ) -> None:
        self.knots, self.lr, self.momentum = knots, lr, momentum
        self.meter = objective.meter
        self.parts = [replace(part, meter=Meter()) for _, part in objective.split()]  # a batch is no pass over the data
        generator = torch.Generator().manual_seed(seed)
        self.coefficients = curve.knots(torch.rand(steps, generator=generator, dtype=torch.float64), len(knots))
        epochs = -(-steps // len(self.parts))
        self.order = torch.cat([torch.randperm(len(self.parts), generator=generator) for _ in range(epochs)]).tolist()

    def advanced(self, state: State, start: int, stop: int) -> State:
        """The state after the steps from `start` to `stop`, and the mean of their losses."""
        knots, velocity = self.knots.clone(), state["velocity"].clone()
        bends = knots[1:-1]  # a view
        bends.copy_(state["bends"])
        total = 0.0
        for step in range(start, stop):
            c = self.coefficients[step].to(knots)
            loss, gradient = _derivative(self.parts[self.order[step]].at(c @ knots))
            if not (math.isfinite(loss) and gradient.isfinite().all()):
                raise NonFinite(
                    f"The training of the curve diverged: at step {step + 1} its loss is {loss:.3g}, or the gradient "
                    "not finite.",
                    f"Lower lr={self.lr:g} or the momentum.",
                )
            velocity.mul_(self.momentum).add_(torch.outer(c[1:-1], gradient))
            bends.sub_(velocity, alpha=self.lr)
            total += loss
        self.meter.passes += stop // len(self.parts) - start // len(self.parts)
        return {"bends": bends, "velocity": velocity, "loss": torch.tensor(total / (stop - start))}


def _derivative(objective: Objective) -> tuple[float, Float[Tensor, " n"]]:
    """The loss and its gradient, in one pass."""
    space, l2 = objective.space, objective.l2

    def term(batch: Any) -> Sums:
        leaves = objective.leaves()
        total = objective.total(leaves, batch)
        gradient = pulled(space, list(leaves.values()), [total], [torch.ones_like(total)])
        return Sums(loss=total.detach().double(), gradient=gradient)

    sums = Passes(objective).average(term)
    loss, gradient = float(sums["loss"]), sums["gradient"]
    if l2:
        row = objective.position
        loss, gradient = loss + l2 / 2 * float(row.double().square().sum()), gradient + l2 * row
    return loss, gradient
