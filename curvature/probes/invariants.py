"""Sharpness that does not depend on how a function is written as weights: quadratic forms of relative changes.

Scaling the weights of a layer of ReLU units and unscaling those of the next leaves the function as it is, and changes
the Hessian (Dinh, Pascanu, Bengio & Bengio 2017, arXiv:1703.04933). What is asked of relative changes is not changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from curvature.linalg.congruence import congruence
from curvature.linalg.goal import Budget
from curvature.linalg.structured import Diagonal
from curvature.linalg.trace import trace
from curvature.objective.objective import Objective
from curvature.objective.products import jacobian_graph
from curvature.operators.engine import need_objective
from curvature.operators.hessian import hessian
from curvature.operators.residuals import likelihood, residuals_of
from curvature.probes.directions import to_scale
from curvature.probes.points import Points
from curvature.progress import Run
from curvature.result import Estimate


def filter_sharpness(
    objective: Objective, *, seed: int = 0, run: Run | None = None, **budget: Unpack[Budget]
) -> Estimate:
    """E v.H v over random directions with the lengths that the parameters have, filter by filter: the mean curvature of
    what `line(objective, random_directions(objective, 1)[0])` shows.

    That is the trace of D H D with D the norms of filters over the roots of their sizes, with the budget of `trace`.
    Parameters with one axis or none do not move. Invariant where the weights of ReLU networks are scaled without
    changing the function.

    Li, Xu, Taylor, Studer & Goldstein 2018 (arXiv:1712.09913), for the directions.
    """
    need_objective("filter_sharpness", objective)
    ones = torch.ones(1, objective.space.size, dtype=objective.space.dtype, device=objective.space.device)
    lengths = Diagonal(to_scale(objective, ones)[0], space=objective.space)
    found = trace(congruence(lengths, hessian(objective)), seed=seed, run=run, **budget)
    return replace(found, origin=replace(found.origin, question="filter_sharpness"))


def fisher_rao_norm(objective: Objective, *, fisher: Literal["type-2", "empirical"] = "type-2") -> Estimate:
    """theta.F theta with F the Fisher matrix, that of targets drawn from the model ("type-2") or of the real ones
    ("empirical"): exact, from one pass over the data.

    For networks of D layers of weights that are homogeneous, such as those of ReLU units without biases, J theta is D
    times the outputs f, so that with cross-entropy it is D^2 times the mean variance of f under the softmax. It is
    what the paper calls the square of the norm. Invariant where weights are scaled without changing the function. Of
    selected parameters only these are theta. The regulariser is no part of it.

    Liang, Poggio, Rakhlin & Stokes 2019 (arXiv:1711.01530).

    >>> net = torch.nn.Linear(1, 2, bias=False)
    >>> net.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]])})
    <All keys matched successfully>
    >>> objective = Objective.of(net, "cross-entropy", (torch.zeros(1, 1), torch.tensor([0])))
    >>> fisher_rao_norm(objective).value  # the outputs do not vary
    tensor(0., dtype=torch.float64)
    """
    need_objective("fisher_rao_norm", objective)
    if fisher not in ("type-2", "empirical"):
        raise ValueError(f"fisher is 'type-2' or 'empirical', but got {fisher!r}.")
    loss, residuals = (
        likelihood(objective, "fisher_rao_norm"),
        residuals_of(objective, "fisher_rao_norm", fisher),
    )
    theta = objective.position
    work = Points(objective).work("fisher_rao_norm", {"fisher": fisher}, None)

    def term(batch: Any) -> Tensor:
        J = jacobian_graph(objective, batch)
        tangent, event = J.push(theta).double(), loss.event(J.outputs, J.targets)
        along = (r.double() * tangent for r in residuals(0, J.outputs, J.targets))
        return torch.stack([(a.sum(event) if event else a).square().sum() for a in along]).sum()

    value = objective.average(term)
    return Estimate(
        value=value.cpu(),
        stderr=torch.zeros((), dtype=torch.float64),
        samples=0,
        dof=0,
        floor=10 * objective.space.eps * float(value),
        cost=work.cost,
        origin=work.origin,
    )
