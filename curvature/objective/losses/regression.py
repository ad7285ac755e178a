"""Losses of real-valued predictions: squared error, and the likelihood of a normal distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.losses.elements import (
    Over,
    Uniform,
    check_elements,
    count_of,
    example_axes,
    one_by_one,
    standard_normal,
)


@dataclass(frozen=True)
class SquaredError:
    """scale/2 * (outputs - targets)**2, averaged over all elements, or summed within and averaged over examples.

    The default is what `nn.MSELoss` computes: scale 2, over elements (a Gaussian likelihood of variance 1/2).
    """

    scale: float = 2.0
    over: Over = "elements"

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"ggn", "sample"})

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
        self._check_shapes(outputs, targets)

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        self._check_shapes(outputs, targets)
        return self.scale / 2 * (outputs - targets).square().sum()

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        return count_of(targets, self.over)

    def event(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """All axes but the first: an example is a term."""
        return example_axes(outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * (outputs - targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        return self.scale * tangent

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """sqrt(scale), entry after entry."""
        return one_by_one(torch.full_like(outputs, self.scale**0.5))

    def sample(self, outputs: Tensor, targets: Tensor, uniform: Uniform) -> Tensor:
        """Normal numbers of variance `scale`: targets have variance 1/scale around the outputs."""
        return self.scale**0.5 * standard_normal(outputs.shape, uniform).to(outputs.dtype)

    def _check_shapes(self, outputs: Tensor, targets: Any) -> None:
        check_elements("Squared error", outputs, targets, "choose the loss 'cross-entropy' for class indices")


@dataclass(frozen=True)
class GaussianNLL:
    """(s + (y - m)**2 exp(-s)) / 2 for outputs (..., 2) that end in the mean m and the logarithm s of the variance.

    The negative log-likelihood of targets y (...) without its constant, averaged over elements or examples. Its Hessian
    with respect to (m, s) is indefinite, so there is a Fisher matrix but no Gauss-Newton matrix.
    """

    over: Over = "elements"

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"sample"})

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless there are two outputs for every target."""
        if outputs.ndim == 0 or outputs.shape[-1] != 2:
            raise BadObjective(
                f"GaussianNLL takes outputs (..., 2), mean and log-variance, but {tuple(outputs.shape)} came.",
                "Stack the two predictions along a new last axis.",
            )
        check_elements("GaussianNLL", outputs[..., 0], targets, "choose the loss 'mse' where no variance is predicted")

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        self.check(outputs, targets)
        mean, log_variance = outputs.unbind(-1)
        return (log_variance + (targets - mean).square() * (-log_variance).exp()).sum() / 2

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        return count_of(targets, self.over)

    def event(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """All axes but the first: an example is a term."""
        return example_axes(outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = outputs.unbind(-1)
        precision, error = (-log_variance).exp(), mean - targets
        return torch.stack([error * precision, (1 - error.square() * precision) / 2], dim=-1)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        mean, log_variance = outputs.unbind(-1)
        precision, error = (-log_variance).exp(), mean - targets
        u, v = tangent.unbind(-1)
        return precision.unsqueeze(-1) * torch.stack([u - error * v, error.square() / 2 * v - error * u], dim=-1)

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """exp(-s / 2) for the mean and sqrt(1/2) for the log-variance, entry after entry: the Fisher information."""
        deviation = (outputs[..., 1] / 2).exp()
        return one_by_one(torch.stack([1 / deviation, torch.full_like(deviation, 0.5**0.5)], dim=-1))

    def sample(self, outputs: Tensor, targets: Tensor, uniform: Uniform) -> Tensor:
        """The residual at a target m + exp(s / 2) z with z standard normal."""
        deviation = (outputs.detach()[..., 1] / 2).exp()
        z = standard_normal(outputs.shape[:-1], uniform).to(outputs.dtype)
        return torch.stack([-z / deviation, (1 - z.square()) / 2], dim=-1)
