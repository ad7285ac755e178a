"""Products J^T M J, J the Jacobian of the outputs: the generalised Gauss-Newton matrix and the Fisher matrices.

They differ only in the map M of the outputs: the Hessian of the loss, or outer products of residuals at targets that
are drawn from the model, or at the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.objective.batches import leading, split
from curvature.objective.losses import Likelihood, lacking
from curvature.objective.losses.elements import example_axes
from curvature.objective.objective import Objective
from curvature.objective.products import jacobian_graph
from curvature.operators.engine import Engine, Linear, Memory, ObjectiveOperator, Recipe, need_objective
from curvature.operators.residuals import FisherKind, Residuals, likelihood, residuals_of


class Middle(Protocol):
    """What the Jacobian is wrapped around: for a batch, given its number, outputs and targets, a map of tangents."""

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]: ...


def ggn(objective: Objective, *, engine: Engine = "auto", memory: Memory = "auto") -> LinearOperator:
    """G = mean over terms of J^T M J, (n, n), psd: J the Jacobian of the outputs, M the Hessian of the loss at them.

    The Hessian is G plus residuals times second derivatives of the model. For cross-entropy and squared error G is the
    Fisher information. Needs outputs and a convex Loss: Objective.of, not from_loss. The regulariser adds l2 I.

    Schraudolph 2002, Fast curvature matrix-vector products; Martens 2020 (arXiv:1412.1193).
    """
    return gauss_newton("ggn", objective, _curved(objective), regularised=True, engine=engine, memory=memory)


def fisher(
    objective: Objective, *, samples: int = 1, seed: int = 0, engine: Engine = "auto", memory: Memory = "auto"
) -> LinearOperator:
    """F = mean over terms of J^T r r^T J, (n, n), psd, r residuals at `samples` targets drawn from the model itself.

    An unbiased estimate of the Fisher information, which for most losses is the GGN: exact, without sampling. The
    draws depend on `seed` and the order of the examples, not on how they are batched, so that F is one matrix.

    Martens 2020 (arXiv:1412.1193); Kunstner, Balles & Hennig 2019 (arXiv:1905.12558).
    """
    middle = _outer(objective, "fisher", "sampled", samples=samples, seed=seed)
    return gauss_newton("fisher", objective, middle, engine=engine, memory=memory)


def empirical_fisher(objective: Objective, *, engine: Engine = "auto", memory: Memory = "auto") -> LinearOperator:
    """E = mean over terms of J^T r r^T J, (n, n), psd, r the residual at the real target: squared gradients of terms.

    Not the Fisher information: it vanishes with the residuals (Kunstner, Balles & Hennig 2019, arXiv:1905.12558). A
    term is an example, or a token where every position has a target of its own.
    """
    middle = _outer(objective, "empirical_fisher", "empirical")
    return gauss_newton("empirical_fisher", objective, middle, engine=engine, memory=memory)


def gradient_covariance(objective: Objective, *, engine: Engine = "auto", memory: Memory = "auto") -> LinearOperator:
    """C = mean over examples of g_i g_i^T, less g g^T, (n, n), psd: the covariance of the gradients g_i of examples.

    g is the gradient of the objective and the mean of all g_i; C / B is the covariance of the gradient of B examples
    drawn with replacement, the noise of SGD. An example is an entry of the first axis of the outputs, with all the
    terms that it has. The first product takes two passes more, for g and the number of examples.
    """
    middle = replace(_outer(objective, "gradient_covariance", "empirical"), whole=True)
    uncentred = gauss_newton("gradient_second_moment", objective, middle, engine=engine, memory=memory)
    return GradientCovariance(objective, uncentred)


class GradientCovariance(LinearOperator):
    """The covariance of the gradients of examples, from their `uncentred` second moment."""

    symmetric = psd = True

    def __init__(self, objective: Objective, uncentred: LinearOperator) -> None:
        self.objective, self.uncentred = objective, uncentred
        self.domain = self.codomain = objective.space
        self.meter = objective.meter

    @property
    def source(self) -> Mapping[str, Any]:
        """What the second moment was made from, under the name of the covariance."""
        return {**self.uncentred.source, "operator": "gradient_covariance"}

    @cached_property
    def mean(self) -> Float[Tensor, "1 n"]:
        """The gradient of the data, without regulariser."""
        return replace(self.objective, l2=0.0).gradient().unsqueeze(0)

    @cached_property
    def examples(self) -> float:
        """The number of examples over that of terms."""
        count = self.objective.average(lambda batch: torch.tensor(leading(batch) or 1, dtype=torch.float64))
        return float(count)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        # with N examples of T terms and sums s_i of gradients: g_i = s_i N/T, the operator is (1/T) sum_i s_i s_i^T
        along = self.domain.inner(rows, self.mean)
        return self.uncentred.apply(rows) * self.examples - self.domain.combine(along, self.mean)


def gauss_newton(
    name: str,
    objective: Objective,
    middle: Middle,
    *,
    regularised: bool = False,
    engine: Engine = "auto",
    memory: Memory = "auto",
) -> LinearOperator:
    """The mean over terms of J^T M J with M what `middle` makes of outputs and targets, `regularised`, plus l2 I."""
    recipe = Recipe(partial(_reverse, middle), partial(_forward, middle), spare=True)
    return ObjectiveOperator(name, objective, recipe, psd=True, regularised=regularised, engine=engine, memory=memory)


def _reverse(middle: Middle, objective: Objective, index: int, batch: Any) -> Linear:
    J = jacobian_graph(objective, batch)
    times = middle(index, J.outputs, J.targets)
    return lambda row: J.pull(times(J.push(row)))


def _forward(middle: Middle, objective: Objective, index: int, batch: Any) -> Linear:
    space = objective.space
    flat = objective.position

    def model(vector: Tensor) -> Tensor:
        return objective.outputs(space.named(vector), batch)[0]

    outputs, pull, *_ = torch.func.vjp(model, flat)
    times = middle(index, outputs.detach(), split(batch)[1])

    def product(row: Tensor) -> Tensor:
        return pull(times(torch.func.jvp(model, (flat,), (row,))[1]))[0]

    return product


def _curved(objective: Objective) -> Middle:
    """M of the GGN: the closed-form Hessian product of the loss."""
    need_objective("ggn", objective)
    loss = objective.loss
    if "ggn" not in loss.offers:
        raise lacking(loss, "ggn")
    return lambda index, outputs, targets: partial(loss.hessian_product, outputs, targets)


def _outer(objective: Objective, name: str, kind: FisherKind, *, samples: int = 1, seed: int = 0) -> _Outer:
    need_objective(name, objective)
    return _Outer(likelihood(objective, name), residuals_of(objective, name, kind, samples=samples, seed=seed))


@dataclass(frozen=True)
class _Outer:
    """M of the Fisher matrices: u -> sum of r (r . u) over the residuals r of the term, or of the `whole` example."""

    loss: Likelihood
    residuals: Residuals
    whole: bool = False

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        event = example_axes(outputs) if self.whole else self.loss.event(outputs, targets)
        return partial(_squared, torch.stack(list(self.residuals(index, outputs, targets))), event)


def _squared(residuals: Tensor, event: tuple[int, ...], tangent: Tensor) -> Tensor:
    """The sum over the residuals r, stacked along a first axis, of r (r . u) with inner products within each term."""
    along = residuals * tangent
    if event:
        along = along.sum([axis % tangent.ndim + 1 for axis in event], keepdim=True)
    return (residuals * along).sum(0)
