"""Any function of outputs and targets: enough for a Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective
from curvature.objective.batches import leading


@dataclass(frozen=True)
class Criterion:
    """`function(outputs, targets)`, a mean over terms: integer targets that are not -100, else examples.

    It has a Hessian and nothing else; `instead` says what to use where more is asked for.
    """

    function: Callable[[Tensor, Any], Tensor]
    instead: str = "a loss of logits or predictions, such as CrossEntropy or SquaredError"

    @property
    def offers(self) -> frozenset[str]:
        return frozenset()

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless the function returns a scalar."""
        scalar(self.function(outputs, targets))

    def total(self, outputs: Tensor, targets: Any) -> Float[Tensor, ""]:
        return scalar(self.function(outputs, targets)) * self.weight(targets).to(outputs)

    def weight(self, targets: Any) -> Float[Tensor, ""]:
        if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.ndim:
            return (targets != -100).sum().double()
        return torch.tensor(leading(targets) or 1, dtype=torch.float64)

    def hessian_product(self, outputs: Tensor, targets: Any, tangent: Tensor) -> Tensor:
        raise BadObjective("This loss has no closed-form Hessian.", f"Use {self.instead}.")


def scalar(loss: Any) -> Float[Tensor, ""]:
    """What a function returned as its loss, without axes; BadObjective unless it is one number in a tensor."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise BadObjective(f"The loss must be a scalar tensor, but {came} came.", "Average it: loss.mean().")
