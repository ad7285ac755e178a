"""Losses of predicted rates of events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.losses.elements import Over, Uniform, check_elements, count_of, example_axes, one_by_one


@dataclass(frozen=True)
class PoissonNLL:
    """exp(f) - y f for outputs f, the logarithms of rates, and counts y; averaged over elements or examples.

    As `nn.PoissonNLLLoss` has it, without the term of the targets alone unless `full` (Stirling's formula).
    """

    full: bool = False
    over: Over = "elements"

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"ggn", "sample"})

    @classmethod
    def of(cls, module: nn.PoissonNLLLoss) -> PoissonNLL:
        """The loss that the torch module computes."""
        if not module.log_input or module.reduction != "mean":
            raise BadObjective(
                f"PoissonNLLLoss(log_input={module.log_input}, reduction={module.reduction!r}) is not a mean over "
                "elements of a loss of logarithmic rates.",
                "Let the model return the logarithm of the rate, and use nn.PoissonNLLLoss().",
            )
        return cls(module.full)

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless targets are counts shaped like the outputs."""
        self._check_shapes(outputs, targets)
        if (targets < 0).any():
            raise BadObjective(f"A count is {float(targets.min()):g}.", "Give the number of events, 0 or more.")

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        self._check_shapes(outputs, targets)
        return F.poisson_nll_loss(outputs, targets, log_input=True, full=self.full, reduction="sum")

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        return count_of(targets, self.over)

    def event(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """All axes but the first: an example is a term."""
        return example_axes(outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.exp() - targets

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        return outputs.exp() * tangent

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """exp(f / 2), entry after entry."""
        return one_by_one((outputs / 2).exp())

    def sample(self, outputs: Tensor, targets: Tensor, uniform: Uniform) -> Tensor:
        """exp(f) - k with k from Poisson's distribution of that rate."""
        import scipy.stats  # takes a second to import

        rate = outputs.detach().exp()
        drawn = scipy.stats.poisson.ppf(uniform(rate.shape).cpu().numpy(), rate.cpu().double().numpy())
        return rate - torch.as_tensor(drawn).to(rate)

    def _check_shapes(self, outputs: Tensor, targets: Any) -> None:
        check_elements("PoissonNLL", outputs, targets, "give one count for every rate")
