"""How large a learning rate may be before gradient descent and its relatives leave the minimum they are in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective, CurvatureError, Interrupted
from curvature.linalg.congruence import congruence
from curvature.linalg.eigen import eigsh
from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import Diagonal
from curvature.linalg.work import Record, Work
from curvature.objective.batches import digest
from curvature.objective.difference import ROUNDING
from curvature.objective.objective import Objective
from curvature.objective.passes import Sums
from curvature.objective.work import work_on
from curvature.operators.engine import need_objective
from curvature.operators.hessian import hessian
from curvature.operators.subsamples import eigenvalue_errors
from curvature.progress import Run
from curvature.result import Estimate, Result

SAMPLES = 16  # whose standard error is known to a fifth


@dataclass(frozen=True, kw_only=True, repr=False)
class StableRates(Estimate):
    """The largest learning rate (4,) with which each of `names` is stable, infinite where nothing curves upwards.

    `sharpness` (2,) are the largest eigenvalue of the Hessian, and of the Hessian as an Adam-like rule meets it. The
    standard error is that which the choice of the data gives these, over `samples` parts of the data; of a single one
    nothing is known. `floor` (4,) is how far a residual moves a rate.
    """

    sharpness: Float[Tensor, 2]

    def summary(self) -> dict[str, str]:
        rows = super().summary()
        plain, adaptive = self.sharpness.tolist()
        return rows | {"largest eigenvalue": f"{plain:.6g}; preconditioned {adaptive:.6g}"}

    __repr__ = Result.__str__


def stable_learning_rates(
    objective: Objective,
    *,
    momentum: float = 0.9,
    second_moment: Float[Tensor, " n"] | None = None,
    eps: float = 1e-8,
    rtol: float = 1e-3,
    seed: int = 0,
    run: Run | None = None,
) -> StableRates:
    """The largest learning rate with which training stays near these parameters, for full batches: beyond it the loss
    rises along the sharpest direction, if a quadratic tells it.

    With the largest eigenvalue s of the Hessian: 2 / s for gradient descent, (2 + 2m) / s with `momentum` m as torch's
    SGD has it, (2 + 2m) / ((1 + 2m) s) for Nesterov's. For rules like Adam's, whose momentum is an average, it is
    (2 + 2m) / ((1 - m) s') with the largest eigenvalue s' of P^-1/2 H P^-1/2, P = diag(sqrt(v) + `eps`), held fixed:
    v is the `second_moment` (n,) of a run, `from_optimizer(objective, adam, "exp_avg_sq")`, or if none is given what
    that is once the weights stand still: the mean square of the gradient of a batch of the objective's size.

    For the standard errors batches are cut where they are fewer than 16, if their examples are computed each by itself.

    The noise of small batches makes smaller rates unstable, and training may be stable for long beyond these where the
    loss flattens out (the edge of stability). `rtol` is that of the eigenvalues. With a checkpoint in `run` each of the
    two is a piece of the work. Raises BadObjective where a largest eigenvalue is not found.

    Cohen, Kaur, Li, Kolter & Talwalkar 2021 (arXiv:2103.00065); Cohen et al. 2022 (arXiv:2207.14484).
    """
    need_objective("stable_learning_rates", objective)
    space = objective.space
    if not 0 <= momentum < 1 or not eps > 0:
        raise ValueError(f"Expected a momentum from 0 to below 1 and a positive eps, but got {momentum} and {eps}.")
    if second_moment is not None and (second_moment.shape != (space.size,) or bool((second_moment < 0).any())):
        raise ValueError(f"Expected a second moment ({space.size},) of entries >= 0, but got {second_moment}.")
    given = None if second_moment is None else digest(second_moment)
    options = {"momentum": momentum, "second_moment": given, "eps": eps, "rtol": rtol}
    work = work_on(objective, "stable_learning_rates", options=options, seed=seed, run=run)
    plain = work.piece(lambda: _sharpness(objective, None, rtol, seed, work))
    work.report(1, 2, f"sharpness {float(plain['value']):.4g}", "eigenvalues")
    v = second_moment if second_moment is not None else work.piece(lambda: {"v": _second_moment(objective)})["v"]
    scale = (v.to(space.device, space.dtype).sqrt() + eps).rsqrt()
    adaptive = work.piece(lambda: _sharpness(objective, scale, rtol, seed, work))
    work.report(2, 2, f"preconditioned {float(adaptive['value']):.4g}", "eigenvalues")
    factors = {
        "gradient descent": (2, plain),
        f"momentum {momentum:g}": (2 + 2 * momentum, plain),
        f"Nesterov {momentum:g}": ((2 + 2 * momentum) / (1 + 2 * momentum), plain),
        f"Adam-like {momentum:g}": ((2 + 2 * momentum) / (1 - momentum), adaptive),
    }
    return _result(factors, torch.stack([plain["value"], adaptive["value"]]), work)


def _second_moment(objective: Objective) -> Float[Tensor, " n"]:
    """The mean over batches of the squared entries of the gradient, each by its terms."""
    total = Sums()
    weight = 0.0
    for terms, part in objective.split():
        total += Sums(v=terms * part.gradient().square())
        weight += terms
    return (total / weight)["v"]


def _sharpness(objective: Objective, scale: Tensor | None, rtol: float, seed: int, work: Work) -> Record:
    """The largest eigenvalue of the Hessian, between diag(scale) if there is one; its residual's bound, the error that
    the data give it, and over how many batches."""

    def matrix(objective: Objective) -> LinearOperator:
        H = hessian(objective)
        return H if scale is None else congruence(Diagonal(scale, space=objective.space), H)

    try:
        # a third of the products that blocks of 4 take, and as many at most
        pairs = eigsh(matrix(objective), 1, rtol=rtol, block=1, max_steps=800, seed=seed)
    except Interrupted as stop:
        raise KeyboardInterrupt from stop
    if not pairs.converged.all():
        raise BadObjective(
            f"The largest eigenvalue {float(pairs.values):.5g} has not converged: its residual is "
            f"{float(pairs.residuals):.2g}.",
            "Raise rtol, or compute in float64.",
        )
    work.products += pairs.cost.products
    record = {"value": pairs.values[0].double(), "floor": pairs.bounds[0].double()}
    parts = _parted(objective)
    if len(parts.split()) == 1:
        return record | {"stderr": torch.zeros((), dtype=torch.float64), "batches": torch.tensor(1)}
    errors = eigenvalue_errors(pairs, matrix, parts)
    work.products += errors.cost.products
    return record | {"stderr": errors.stderr[0].double(), "batches": torch.tensor(errors.samples)}


def _parted(objective: Objective) -> Objective:
    """The same in SAMPLES batches or more, where the loss shows that it does not depend on how the data are cut."""
    batches, examples = objective.batches.extent()
    if batches >= SAMPLES or objective.mode == "train":
        return objective
    parted = replace(objective, batches=objective.batches.at_most(max(1, examples // SAMPLES)))
    try:
        together, apart = objective.value(), parted.value()
    except CurvatureError:  # the model takes batches as they are
        return objective
    return parted if abs(together - apart) <= ROUNDING * objective.space.eps * (1 + abs(together)) else objective


def _result(factors: dict[str, tuple[float, Record]], sharpness: Tensor, work: Work) -> StableRates:
    """Rates factor / eigenvalue, with errors to first order."""
    rows = [_rate(factor, record) for factor, record in factors.values()]
    value, stderr, floor = (torch.stack(column) for column in zip(*rows, strict=True))
    batches = min(int(record["batches"]) for _, record in factors.values())
    return StableRates(
        value=value,
        stderr=stderr,
        samples=batches,
        dof=batches - 1,
        floor=floor,
        names=tuple(factors),
        sharpness=sharpness.cpu(),
        cost=work.cost,
        origin=work.origin,
    )


def _rate(factor: float, record: Record) -> tuple[Tensor, Tensor, Tensor]:
    """factor / eigenvalue, its standard error and what its bound makes of it."""
    value, stderr, floor = (record[name].cpu() for name in ("value", "stderr", "floor"))
    zero = torch.zeros_like(value)
    if not value > floor:
        return zero + torch.inf, zero, zero
    return factor / value, factor * stderr / value**2, factor / (value - floor) - factor / value
