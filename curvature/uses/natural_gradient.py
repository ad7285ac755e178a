"""The natural gradient: the direction of steepest descent where the distance is between what models say."""

from __future__ import annotations

from dataclasses import replace

from curvature.linalg.operator import LinearOperator
from curvature.linalg.solve import solve
from curvature.linalg.systems import Solution
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.operators.gauss_newton import ggn
from curvature.operators.subsamples import Matrix
from curvature.progress import Run


def natural_gradient(
    objective: Objective,
    *,
    matrix: Matrix = ggn,
    damping: float,
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    max_steps: int = 500,
    run: Run | None = None,
) -> Solution:
    """x with (F + damping I) x = g, for the gradient g of the objective and its Fisher information F, by `solve`.

    A step is a multiple of -x. To first order it is the same whatever parameters describe the model, but for the
    damping, which is Euclidean: it has to be small against the eigenvalues of F that count. `matrix` is `ggn`, which is
    F for most losses and without noise, `fisher` or `empirical_fisher`. Where it has structure there is nothing to
    solve: `inverse(kfac(objective), damping=damping) @ objective.gradient()`. Raises NotConverged, as `solve` does.

    Amari 1998 (Neural Computation 10); Martens 2020 (arXiv:1412.1193).

    >>> import torch
    >>> from curvature import SquaredError
    >>> line, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [3.0]])
    >>> objective = Objective.of(line, SquaredError(scale=1), (x, 2 * x))
    >>> (line.weight.detach() - natural_gradient(objective, damping=0).x).round(decimals=4)
    tensor([[2.]])
    """
    need_objective("natural_gradient", objective)
    solution = solve(
        matrix(objective),
        objective.gradient(),
        damping=damping,
        preconditioner=preconditioner,
        rtol=rtol,
        max_steps=max_steps,
        run=run,
    )
    cost = replace(solution.cost, passes=solution.cost.passes + 1)  # that of the gradient
    return replace(solution, cost=cost, origin=replace(solution.origin, question="natural_gradient"))
