"""Step control: given a direction, how far to go, and how much to damp the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from curvature.optim.block import Block
from curvature.optim.preconditioner import State
from curvature.optim.trial import Trial

Need = Literal["loss", "objective"]
Memory = dict[str, Any]  # the first parameter group, in which numbers are kept from step to step


@runtime_checkable
class StepControl(Protocol):
    """Frozen hyperparameters; what changes is kept as numbers in the first parameter group."""

    needs: ClassVar[frozenset[Need]]

    def begin(self, numbers: Memory) -> Memory:
        """The numbers before the first step, given those of the rule. ValueError for a rule it cannot control."""
        ...

    def init(self, block: Block) -> State:
        """What it keeps of a block, before the first step."""
        ...

    def damping(self, memory: Memory) -> float | None:
        """What is added to the curvature at this step; None where that is the rule's own business."""
        ...

    def settle(self, memory: Memory, trial: Trial) -> None:
        """Take the step, or some of it, or none."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The whole step, as the learning rate says."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def begin(self, numbers: Memory) -> Memory:
        return {}

    def init(self, block: Block) -> State:
        return {}

    def damping(self, memory: Memory) -> None:
        return None

    def settle(self, memory: Memory, trial: Trial) -> None:
        trial.take()


@dataclass(frozen=True)
class Armijo:
    """The first of a falling sequence of steps that lowers the loss by `decrease` of what its slope promises.

    The first is `growth` times the last one taken, and at most the whole; each is `shrink` times the one before. Where
    none of `trials` does, or the step does not descend, none is taken. Armijo 1966.
    """

    decrease: float = 0.1
    shrink: float = 0.8
    growth: float = 1.5
    trials: int = 15
    needs: ClassVar[frozenset[Need]] = frozenset({"loss"})

    def begin(self, numbers: Memory) -> Memory:
        return {"scale": 1.0}

    def init(self, block: Block) -> State:
        return {}

    def damping(self, memory: Memory) -> None:
        return None

    def settle(self, memory: Memory, trial: Trial) -> None:
        loss, slope, scale = trial.loss, trial.slope, min(1.0, self.growth * memory["scale"])
        for _ in range(self.trials if slope < 0 else 0):
            if trial.tried(scale) <= loss + self.decrease * scale * slope:  # false where it is not a number
                memory["scale"] = scale
                return
            scale *= self.shrink
        if slope < 0:
            trial.undo()
            memory["scale"] = scale


@dataclass(frozen=True)
class Polyak:
    """The step to where the tangent reaches the loss `target`: (loss - target) / (g . P g) along P g, times the
    learning rate. Polyak 1969; Loizou et al. 2021 (arXiv:2002.10542)."""

    target: float = 0.0
    longest: float = math.inf
    needs: ClassVar[frozenset[Need]] = frozenset({"loss"})

    def begin(self, numbers: Memory) -> Memory:
        return {}

    def init(self, block: Block) -> State:
        return {}

    def damping(self, memory: Memory) -> None:
        return None

    def settle(self, memory: Memory, trial: Trial) -> None:
        along = sum(m.slope for m in trial.moves)
        if along > 0:
            trial.take(min(self.longest, max(0.0, trial.loss - self.target) / along))


@dataclass(frozen=True)
class LevenbergMarquardt:
    """The whole step, if it lowers the loss; damping by how well a quadratic model told the change of the loss.

    The model is that of the Gauss-Newton matrix of the mini-batch, without damping. Where the loss changed by less
    than `low` of what it said the damping is multiplied by `raise_`, where by more than `high` by `lower`; it begins
    with that of the optimizer. A step after which the loss is higher, or no number, is taken back if `reject`.

    Levenberg 1944, Marquardt 1963; Martens & Grosse 2015 (arXiv:1503.05671), section 6.5.
    """

    low: float = 0.25
    high: float = 0.75
    raise_: float = 1.5
    lower: float = 2 / 3
    least: float = 1e-12
    most: float = 1e12
    reject: bool = True
    needs: ClassVar[frozenset[Need]] = frozenset({"loss", "objective"})

    def begin(self, numbers: Memory) -> Memory:
        if "damping" not in numbers:
            raise ValueError(
                "LevenbergMarquardt adapts the damping of a matrix, and this optimizer has none. Take EGN, NewtonCG, "
                "KFAC or another with damping=, or Armijo()."
            )
        return {}

    def init(self, block: Block) -> State:
        return {}

    def damping(self, memory: Memory) -> float:
        return memory["damping"]

    def settle(self, memory: Memory, trial: Trial) -> None:
        model, before = trial.model(), trial.loss
        predicted = float(model.slopes[0] + model.bend[0, 0] / 2)
        if predicted == 0:
            return  # no step, as where gradients were not finite
        after = trial.tried()
        ratio = (after - before) / predicted if predicted < 0 else -math.inf
        factor = self.lower if ratio > self.high else 1.0 if ratio >= self.low else self.raise_
        memory["damping"] = min(self.most, max(self.least, memory["damping"] * factor))
        if self.reject and not after <= before:
            trial.undo()


@dataclass(frozen=True)
class QuadraticModel:
    """The combination of the direction and of the last step that is best for a quadratic model: learning rate and
    momentum at once, at the price of two products.

    The model has the Gauss-Newton matrix of the mini-batch, plus the damping of the optimizer, if it has one. Learning
    rates only weigh groups against each other. Give no other momentum beside it. On a quadratic function it makes the
    steps of conjugate gradients, preconditioned. Martens & Grosse 2015 (arXiv:1503.05671), section 7.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})

    def begin(self, numbers: Memory) -> Memory:
        return {}

    def init(self, block: Block) -> State:
        return {"last": block.zeros()}

    def damping(self, memory: Memory) -> None:
        return None

    def settle(self, memory: Memory, trial: Trial) -> None:
        steps = [m.step for m in trial.moves]
        last = [m.block.gathered([view["last"] for view in m.views]) * bool(m.rate) for m in trial.moves]
        slopes, bend, gram = (tensor.cpu() for tensor in trial.model(last))
        matrix = bend + memory.get("damping", 0.0) * gram
        if not bool(matrix.isfinite().all()):
            return  # the mini-batch has no model
        direct, again = torch.linalg.lstsq(matrix, -slopes[:, None], driver="gelsd").solution[:, 0].tolist()
        steps = [direct * step + again * before for step, before in zip(steps, last, strict=True)]
        for move, step in zip(trial.moves, steps, strict=True):
            for view, piece in zip(move.views, move.block.scattered(step), strict=True):
                view["last"].copy_(piece.view_as(view["last"]))
        trial.turned(steps)
        trial.take()
