"""What one training step tells about curvature."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from curvature.objective.objective import Objective


@dataclass(frozen=True)
class Evidence:
    """`grad` (n,) is the gradient of the mini-batch over a block, and `momentum` (n,) what will be preconditioned.

    `step` counts the steps of the parameters, this one included: (stack, 1), so that it broadcasts over rows, or (1, 1)
    for a block of the whole model; `taken` counts those of the group, without this one, on the host. `seed` is that of
    this step. `objective` is the mini-batch as a function of the parameters where they are now, of those of the block
    alone and in its order, for rules that ask for it.
    """

    grad: Float[Tensor, " n"]
    momentum: Float[Tensor, " n"]
    step: Float[Tensor, "b 1"]
    seed: int = 0
    objective: Objective | None = None
    taken: int = 0

    def debias(self, beta: float) -> Float[Tensor, "b 1"]:
        """1 - beta^step: what an average that began at zero is divided by."""
        return (1 - beta**self.step).to(self.grad.dtype)
