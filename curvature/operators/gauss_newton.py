"""The generalised Gauss-Newton matrix: the Hessian with the model replaced by its linearisation."""

from __future__ import annotations

from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective
from curvature.objective.products import ggn_rows
from curvature.operators.engine import ObjectiveOperator


def ggn(objective: Objective) -> LinearOperator:
    """G = mean over terms of J^T M J, (n, n), psd: J the Jacobian of the outputs, M the Hessian of the loss at them.

    The Hessian is G plus residuals times second derivatives of the model. For cross-entropy and squared error G is the
    Fisher information. Needs outputs and a Loss with a closed-form Hessian product: Objective.of, not from_loss.

    Schraudolph 2002, Fast curvature matrix-vector products; Martens 2020 (arXiv:1412.1193).
    """
    return ObjectiveOperator("ggn", objective, ggn_rows, psd=True)
