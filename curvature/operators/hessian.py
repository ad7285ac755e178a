"""The Hessian of the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective
from curvature.objective.products import gradient_graph, hessian_rows
from curvature.operators.engine import ObjectiveOperator


def hessian(objective: Objective) -> LinearOperator:
    """The Hessian of the mean loss over all terms of the data, (n, n) for n selected parameters, exact.

    A product with a block of vectors is one pass over the data: per batch one graph of the gradient, and one backward
    through it for each vector (about 1.5 gradients each). With ReLU it is the Hessian almost everywhere.

    Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """
    return ObjectiveOperator("hessian", objective, _rows)


def _rows(objective: Objective, batch: Any, rows: Tensor) -> Tensor:
    leaves, grads = gradient_graph(objective, batch)
    return hessian_rows(objective.space, leaves, grads, rows)
