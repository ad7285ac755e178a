"""Squared gradients of the examples of a batch, one example at a time: slow, and right for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.objective.batches import examples
from curvature.objective.objective import Objective
from curvature.objective.params import ParamSpace
from curvature.objective.products import pulled
from curvature.operators.engine import CHUNK, abreast, at_once, budget_of
from curvature.operators.followed import Evidence, agree, norm

T = TypeVar("T")


class Alone:
    """The examples of a batch, and the gradients of some parameters for each.

    Examples go through the model alone, where that has the gradient it has in the batch: what belongs to an example,
    and what to all of them, cannot be told from shapes. Else each goes with the batch, at the cost of all examples:
    as they all do where a batch is so small that the calls are what takes time.
    """

    def __init__(self, objective: Objective, names: Iterable[str], evidence: Evidence) -> None:
        self.objective, self.evidence, self.recorded = objective, evidence, evidence.recorded
        self.params = {name: self.recorded.leaves[name] for name in names}
        self.space = ParamSpace.of(self.params)
        budget = budget_of("auto", self.space.device)
        self.chunk, bulk = at_once(objective.check(), self.recorded.batch, budget, objective.space)
        self.separable = bulk > 1  # until it turns out otherwise

    def squares(self, residuals: Sequence[Tensor]) -> dict[str, Tensor]:
        """The squared gradients by parameter, summed over examples and residuals."""

        def add(total: Tensor, gradients: Float[Tensor, "k n"]) -> Tensor:
            return total + gradients.square().sum(0)

        return self.space.named(self._folded(residuals, add, self._zeros()))

    def gradients(self, residuals: Sequence[Tensor]) -> Float[Tensor, "k b n"]:
        """The gradients, flat, for each residual and example."""
        none: list[Tensor] = []
        return torch.stack(self._folded(residuals, lambda seen, gradients: [*seen, gradients], none), dim=1)

    def _folded(self, residuals: Sequence[Tensor], add: Callable[[T, Tensor], T], start: T) -> T:
        """What `add` makes of the gradients (residuals, n) of one example after another."""
        total = self._of_examples(residuals, add, start) if self.separable else None
        if total is None:
            self.separable = False
            total = self._in_batch(residuals, add, start)
        return total

    def _of_examples(self, residuals: Sequence[Tensor], add: Callable[[T, Tensor], T], total: T) -> T | None:
        """From each example alone; None where the gradients of these are not those of the batch."""
        evidence, recorded, size = self.evidence, self.recorded, 0.0
        sent = self._zeros()
        more = [residual for residual in residuals if residual is not evidence.cotangent]
        cut = zip(recorded.rows(), evidence.factors, examples(recorded.batch, recorded.examples), strict=True)
        for rows, factor, example in cut:
            try:
                outputs = self.objective.outputs(recorded.leaves, example)[0]
            except Exception:  # models can raise anything about a batch they do not expect
                return None
            if outputs.shape != recorded.outputs[rows].shape:
                return None
            cotangents = torch.stack([cotangent[rows] for cotangent in (evidence.cotangent, *more)])
            gradients = abreast(partial(self._gradient, outputs), CHUNK, set())(cotangents)
            sent += factor * gradients[0]
            size += norm(factor * gradients[0])
            total = add(total, gradients[len(gradients) - len(residuals) :])
        expected = self.space.flatten([evidence.parameters[name] for name in self.params])
        return total if agree(sent, expected, size=size) else None

    def _in_batch(self, residuals: Sequence[Tensor], add: Callable[[T, Tensor], T], total: T) -> T:
        """From the whole batch, with the cotangents of a few examples at a time, each apart."""
        stacked, through = torch.stack(list(residuals)), abreast(self._of_batch, self.chunk, set())
        rows = self.recorded.rows()
        for some in (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)):
            cotangents = stacked.new_zeros(len(some), *stacked.shape)
            for apart, own in zip(cotangents, some, strict=True):
                apart[:, own] = stacked[:, own]
            for gradients in through(cotangents.flatten(0, 1)).view(*cotangents.shape[:2], -1):
                total = add(total, gradients)
        return total

    def _of_batch(self, cotangent: Tensor) -> Float[Tensor, " n"]:
        return self._gradient(self.recorded.outputs, cotangent)

    def _gradient(self, outputs: Tensor, cotangent: Tensor) -> Float[Tensor, " n"]:
        return pulled(self.space, list(self.params.values()), [outputs], [cotangent])

    def _zeros(self) -> Float[Tensor, " n"]:
        return torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
