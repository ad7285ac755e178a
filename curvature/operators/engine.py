"""How an operator of an objective is put together: checked once, metered, and one pass over the data a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective

Rows = Callable[[Objective, Any, Tensor], Tensor]  # (objective, batch, rows) -> products summed over the batch's terms


class ObjectiveOperator(LinearOperator):
    """A symmetric matrix that is an average over the terms of an objective's data.

    The matrix never changes: parameters, data and random masks are those of the objective it was made from.
    """

    symmetric = True

    def __init__(self, name: str, objective: Objective, rows: Rows, *, psd: bool = False) -> None:
        self.name, self.objective, self.rows, self.psd = name, objective, rows, psd
        self.domain = self.codomain = objective.space
        self.meter = objective.meter

    @property
    def source(self) -> Mapping[str, Any]:
        """The operator, its function and the fingerprints of model and data."""
        objective = self.objective
        return {
            "operator": self.name,
            "model": type(objective.function.module).__name__,
            "loss": objective.function.name,
            "mode": objective.mode,
            "parameters": objective.space.size,
            "fingerprint": objective.fingerprint,
            "rewrites": dict(objective.check().rewrites),
        }

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        self.objective.check()
        return self.objective.average(lambda batch: self.rows(self.objective, batch, rows))
