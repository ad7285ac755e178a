"""What one training step tells about curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from curvature.linalg.deflation import derived
from curvature.objective.objective import Objective

Drawn = tuple[Float[Tensor, "k n"], Float[Tensor, "k n"]]


@dataclass(frozen=True)
class Evidence:
    """`grad` (n,) is the gradient of the mini-batch over a block, and `momentum` (n,) what will be preconditioned.

    `step` counts the steps of the parameters, this one included: (stack, 1), so that it broadcasts over rows, or (1, 1)
    for a block of the whole model; `taken` counts those of the group, without this one, on the host. `run` is the seed
    of the whole training. `objective` is the mini-batch as a function of the parameters where they are now, of those of
    the block alone and in its order, for rules that ask for it: it is made when it is first looked at, by `place`,
    which copies parameters. `drawn` are random signs (k, n) and the products of the
    Hessian with them, where they came along with the gradient. `group` are the processes that the gradient is a mean
    over, where there are several.
    """

    grad: Float[Tensor, " n"]
    momentum: Float[Tensor, " n"]
    step: Float[Tensor, "b 1"]
    run: int = 0
    place: Callable[[], Objective] | None = None
    taken: int = 0
    drawn: Drawn | None = None
    group: distributed.ProcessGroup | None = None

    @cached_property
    def objective(self) -> Objective | None:
        return None if self.place is None else self.place()

    @property
    def seed(self) -> int:
        """That of this step."""
        return derived(self.run + self.taken)


def debiased(average: Tensor, beta: float, step: Float[Tensor, "b 1"]) -> Tensor:
    """An average that began at zero, for each of b rows, over 1 - beta^step."""
    at_hand = step.device.type == "cpu" and not torch.compiler.is_compiling()  # values take time to come elsewhere
    counts = set(step.flatten().tolist()) if at_hand else ()
    if len(counts) == 1:  # one division by a number
        return average / (1 - beta ** next(iter(counts)))
    return (average.view(len(step), -1) / (1 - beta**step).to(average.dtype)).view(average.shape)
