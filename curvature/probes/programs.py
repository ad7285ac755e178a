"""Functions of points and batches, and the plain operations that they come to.

Operations are traced for batches of the same shapes, and stand in for a function only where they make the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvature.objective.objective import Objective
from curvature.objective.operations import Bare, Operations, Program, shapes_of


class Settling:
    """A program of points (k, n) and the batches of an objective, and after `patience` calls with the same shapes the
    operations that it comes to, for batches where these make the same bits: by then calls took as long as tracing.
    Calls for the points that are `ahead` count, too."""

    def __init__(self, objective: Objective, program: Program, patience: int) -> None:
        self.objective, self.program, self.patience = objective, program, patience
        self.bare = Bare(program)
        self.calls: Counter[Hashable] = Counter()
        self.ahead = 0

    def on(self, index: int, batch: Any) -> Callable[[Tensor], Tensor]:
        """The program on the batch of that number, from its random state."""
        shapes = shapes_of(batch)
        settled: dict[int, Operations | None] = {}  # by the number of points

        def compute(points: Float[Tensor, "k n"]) -> Float[Tensor, "k s"]:
            count = len(points)
            self.calls[count, shapes] += 1
            if count not in settled and self.calls[count, shapes] + self.ahead // count >= self.patience:
                settled[count] = self._settled(index, batch, count)
            operations = settled.get(count)
            if operations is not None and not operations.random:  # to set a random state takes time, too
                return operations(points, batch)
            with self.objective.randomness(index):
                return (operations or self.program)(points, batch).detach()

        return compute

    def _settled(self, index: int, batch: Any, count: int) -> Operations | None:
        """The operations for so many points, if they make the same bits of this batch."""
        points = generic(self.objective).repeat(count, 1)
        with self.objective.randomness(index):
            operations = self.bare.of(points, batch)
        if operations is not None:
            with self.objective.randomness(index):
                expected = self.program(points, batch)
            with suppress(Exception), self.objective.randomness(index):
                if torch.equal(operations(points, batch), expected):
                    return operations
        return None


def generic(objective: Objective) -> Float[Tensor, " n"]:
    """A point near the parameters where nothing cancels: there the same value means the same function."""
    (signs,) = objective.space.draw(1, seed=0)
    return objective.position + 0.01 * signs


def fused(program: Program) -> Program:
    """The same with torch's own batch normalisation, which is fast where no second derivative is taken."""

    def fast(points: Tensor, batch: Any) -> Tensor:
        with _OwnNormalisation():
            return program(points, batch)

    return fast


class _OwnNormalisation(TorchFunctionMode):
    """Batch normalisation by torch's kernel."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            with torch._C.DisableTorchFunction():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
