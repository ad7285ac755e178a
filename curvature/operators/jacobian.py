"""The Jacobian of a model's outputs in its parameters, and the neural tangent kernel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator, Product
from curvature.linalg.space import Space
from curvature.objective.check import Health
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.objective.products import jacobian_graph
from curvature.operators.engine import Memory, Share, abreast, at_once, budget_of, need_objective, source_of


def jacobian(objective: Objective, *, memory: Memory = "auto") -> LinearOperator:
    """J, (m, n): the derivatives of all m outputs on the data, example after example, in the n selected parameters.

    `J.adjoint()` is the transpose. Asking for the shape takes one pass over the data, to count the outputs.
    """
    return JacobianOperator(objective, memory)


def ntk(objective: Objective, *, memory: Memory = "auto") -> LinearOperator:
    """K = J J^T, (m, m), psd: the empirical neural tangent kernel between all outputs on the data.

    A product takes two passes. The nonzero eigenvalues of K divided by the number of terms are those of the GGN of the
    loss SquaredError(scale=1).

    Jacot, Gabriel & Hongler 2018 (arXiv:1806.07572).
    """
    J = JacobianOperator(objective, memory)
    return Product(J, J.adjoint())


class JacobianOperator(LinearOperator):
    """J of all outputs on the data."""

    def __init__(self, objective: Objective, memory: Memory) -> None:
        need_objective("jacobian", objective)
        self.objective = objective
        self.memory: Memory = memory
        self.domain = objective.space
        self.meter = objective.meter
        self.used: set[str] = set()

    @property
    def source(self) -> Mapping[str, Any]:
        """The function and the fingerprints of model and data; how products were computed until now."""
        return {**source_of("jacobian", self.objective), "engines": sorted(self.used)}

    @cached_property
    def codomain(self) -> Space:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The space of all outputs."""
        return Space(sum(self._sizes), self.domain.dtype, self.domain.device)

    @cached_property
    def _passes(self) -> Passes:
        health = self.objective.check()
        budget = budget_of(self.memory, self.device)
        prepare = partial(self._prepared, budget, health)
        return Passes(self.objective, prepare, budget=budget, example=health.example_bytes)

    def _prepared(self, budget: float, health: Health, index: int, batch: Any) -> _Rows:
        J = jacobian_graph(self.objective, batch)
        chunk, bulk = at_once(health, batch, budget, self.objective.space)
        together = chunk if bulk <= 1 else 1
        return _Rows(
            J.outputs.numel(),
            push=abreast(lambda row: J.push(row).reshape(-1), together, self.used),
            pull=abreast(lambda row: J.pull(row.reshape(J.outputs.shape)), together, self.used),
        )

    @cached_property
    def _sizes(self) -> list[int]:
        """How many outputs each batch has."""
        return self._passes.each(lambda J: J.size)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return torch.cat(self._passes.each(lambda J: J.push(rows)), dim=1)

    def apply_transposed(self, rows: Float[Tensor, "k m"]) -> Float[Tensor, "k n"]:
        """J^T times each row."""
        pieces = iter(rows.split(self._sizes, dim=1))
        return self._passes.total(lambda J: J.pull(next(pieces)))[0]

    def adjoint(self) -> LinearOperator:
        return TransposedJacobian(self)


class _Rows(NamedTuple):
    """J of a batch for rows: `push` maps (k, n) to (k, size) and `pull` back, `size` the number of its outputs."""

    size: int
    push: Share
    pull: Share


class TransposedJacobian(LinearOperator):
    """J^T, in the same passes over the data as J."""

    def __init__(self, J: JacobianOperator) -> None:
        self.J, self.domain, self.codomain, self.parts = J, J.codomain, J.domain, (J,)
        self.adjoint_of = J

    def apply(self, rows: Float[Tensor, "k m"]) -> Float[Tensor, "k n"]:
        return self.J.apply_transposed(rows)

    def adjoint(self) -> LinearOperator:
        return self.J
