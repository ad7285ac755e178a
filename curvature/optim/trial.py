"""A step that has been computed and not yet taken: where it leads, and what the loss is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from curvature.distributed import mean
from curvature.objective.objective import Objective
from curvature.operators.gauss_newton import ggn
from curvature.optim.block import Block


@dataclass(frozen=True)
class Move:
    """What a step does to the parameters of a block: those that are `moved` go along rate `direction` (n,).

    `views` are the states of the parameters, as the optimizer has them.
    """

    block: Block
    direction: Float[Tensor, " n"]
    rate: float
    grad: Float[Tensor, " n"]
    moved: list[bool]
    group: dict[str, Any]
    views: list[dict[str, Tensor]]

    def chosen(self, vector: Float[Tensor, " n"]) -> list[Tensor]:
        """The tensors of a vector, of parameters that move."""
        return [t for t, moves in zip(self.block.scattered(vector), self.moved, strict=True) if moves]

    @property
    def params(self) -> list[Tensor]:
        return [p for p, moves in zip(self.block.params, self.moved, strict=True) if moves]

    @property
    def step(self) -> Float[Tensor, " n"]:
        return self.direction * self.rate

    @property
    def slope(self) -> float:
        """The derivative of the loss along the direction."""
        return float(self.grad.double() @ self.direction.double())


class Model(NamedTuple):
    """What a quadratic model knows of steps s_i: the slopes g.s_i, the bend s_i.C s_j by the Gauss-Newton matrix C, and
    s_i.s_j."""

    slopes: Float[Tensor, " k"]
    bend: Float[Tensor, "k k"]
    gram: Float[Tensor, "k k"]


class Trial:
    """A step not yet taken, from where the weights decay to. `loss` is that before it; `take` goes there, as often as
    is asked, from where it began.

    Losses are those of the objective, where there is one, else of the closure, whose own first loss is not computed
    again unless weights have decayed since, and the mean over the `group` of processes.
    """

    def __init__(
        self,
        moves: list[Move],
        loss: Any,
        closure: Callable[[], Any] | None,
        placed: Callable[[], Objective] | None,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        self.moves, self._closure, self._placed, self._group = moves, closure, placed, group
        self._loss = loss if placed is None else None
        self._start: list[list[Tensor]] | None = None
        self._before: float | None = None
        self._decayed = False

    def decay(self) -> None:
        """Decay the weights, once, whatever becomes of the step: that is not made to lower the loss."""
        for move in () if self._decayed else self.moves:
            if amount := float(move.group["lr"]) * move.group["weight_decay"]:
                torch._foreach_mul_(move.params, 1 - amount)
                self._loss = None
        self._decayed = True

    @property
    def loss(self) -> float:
        """The loss before the step."""
        self.decay()
        if self._before is None:
            self._before = self.here() if self._loss is None else self._mean(self._loss)
        return self._before

    @property
    def slope(self) -> float:
        """The derivative of the loss along the step, which is negative where it descends."""
        return sum(m.rate * m.slope for m in self.moves)

    def model(self, *others: Sequence[Tensor]) -> Model:
        """The quadratic model of the step and of `others`, a vector for each move, by the mini-batch: ask first, then
        it is at the parameters that the gradient is of."""
        assert self._placed is not None
        objective = self._placed()
        space = objective.space
        names = {id(p): name for name, p in objective.function.module.named_parameters()}

        def row(vectors: Sequence[Tensor]) -> Tensor:
            pieces = {name: torch.zeros_like(p) for name, p in objective.params.items()}
            for move, vector in zip(self.moves, vectors, strict=True):
                for p, piece in zip(move.params, move.chosen(vector), strict=True):
                    pieces[names[id(p)]] = piece.to(space.dtype)
            return space.flatten(pieces.values())

        rows = torch.stack([row(vectors) for vectors in ([m.step for m in self.moves], *others)])
        slopes = space.inner(row([m.grad for m in self.moves])[None], rows)[0]
        return Model(slopes, space.inner(rows, ggn(objective).apply(rows)), space.inner(rows, rows))

    def turned(self, steps: Sequence[Tensor]) -> None:
        """Make it another step."""
        self.moves = [replace(m, direction=s, rate=1.0) for m, s in zip(self.moves, steps, strict=True)]

    def take(self, scale: float = 1.0) -> None:
        """Go `scale` times along the step."""
        self.decay()
        if self._start is not None:
            self.undo()
        for rate, moves in groupby(self.moves, key=lambda move: move.rate):
            pairs = [pair for move in moves for pair in zip(move.params, move.chosen(move.direction), strict=True)]
            torch._foreach_add_([p for p, _ in pairs], [t.to(p.dtype) for p, t in pairs], alpha=rate * scale)

    def tried(self, scale: float = 1.0) -> float:
        """Take the step, and return the loss there; `undo` goes back to the last bit."""
        self.decay()
        if self._start is None:
            self._start = [[p.clone() for p in move.params] for move in self.moves]
        self.take(scale)
        return self.here()

    def undo(self) -> None:
        """Back to where the step began."""
        assert self._start is not None
        for move, start in zip(self.moves, self._start, strict=True):
            torch._foreach_copy_(move.params, start)

    def here(self) -> float:
        """The loss where the parameters are now; their gradients stay as they are."""
        if self._placed is not None:
            return self._placed().value()
        assert self._closure is not None
        params = [p for move in self.moves for p in move.params]
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None  # so that the closure writes into others
        try:
            with torch.enable_grad():
                return self._mean(self._closure())
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    def _mean(self, loss: Any) -> float:
        """What a closure returned, over all processes."""
        number = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return mean(number, self.moves[0].grad.device, self._group) if self.moves else number
