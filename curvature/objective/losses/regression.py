"""Squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective


@dataclass(frozen=True)
class SquaredError:
    """scale/2 * (outputs - targets)**2, averaged over all elements, or summed within and averaged over examples.

    The default is what `nn.MSELoss` computes: scale 2, over elements (a Gaussian likelihood of variance 1/2).
    """

    scale: float = 2.0
    over: Literal["elements", "examples"] = "elements"

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"ggn"})

    @classmethod
    def of(cls, module: nn.MSELoss) -> SquaredError:
        """The loss that the torch module computes."""
        if module.reduction != "mean":
            raise BadObjective(
                f"MSELoss(reduction={module.reduction!r}) is not a mean.",
                "Use reduction='mean'; a sum is the mean times the number of elements.",
            )
        return cls()

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless targets are numbers shaped like the outputs."""
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
            came = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise BadObjective(
                f"Squared error takes targets shaped like the outputs {tuple(outputs.shape)}, but {came} came.",
                "Reshape the targets, or choose the loss 'cross-entropy' for class indices.",
            )

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        return self.scale / 2 * (outputs - targets).square().sum()

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        count = targets.numel() if self.over == "elements" else len(targets)
        return torch.tensor(count, dtype=torch.float64)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        return self.scale * tangent
