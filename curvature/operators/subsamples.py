"""What other data would have given: the batches as so many samples of what the data were drawn from.

The error bar of an estimate is that of its random vectors, for the data as they are. How far curvature itself would
move with other data of the same kind and number is seen in how it differs between batches, which have to be drawn at
random for that: a loader that shuffles, or data without order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective, Interrupted
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective
from curvature.progress import Progress, Run
from curvature.result import Cost, Estimate, Quantity, with_error

Matrix = Callable[[Objective], LinearOperator]

LINEAR = ("trace", "diagonal", "block_traces")


@dataclass(frozen=True, kw_only=True, repr=False)
class Subsampled(Estimate):
    """A mean over batches. `stderr` is all of its error; `probe_stderr` what the random vectors have of it, and
    `data_stderr` what the data have: the squares of these two add up to its square."""

    probe_stderr: Tensor
    data_stderr: Tensor

    def summary(self) -> dict[str, str]:
        if self.value.ndim:
            return super().summary()
        value = with_error(float(self.value), float(self.stderr), self.dof)
        data = f"± {float(self.data_stderr):.2g}" if self.data_stderr else "less than the probes show"
        shares = {"of which data": data, "of which probes": f"± {float(self.probe_stderr):.2g}"}
        return super().summary() | {self.origin.question: value} | shares

    def quantities(self) -> dict[str, Quantity]:
        found = super().quantities()
        return {self.origin.options["of"]: found["subsampled"]} if "subsampled" in found else found

    __repr__ = Estimate.__repr__


def subsampled(
    question: Callable[..., Estimate],
    matrix: Matrix,
    objective: Objective,
    *,
    seed: int = 0,
    run: Run | None = None,
    **options: Any,
) -> Subsampled:
    """The mean over batches of `question(matrix(batch))`: `subsampled(cv.trace, cv.hessian, objective)`.

    For what is linear in the data: trace, diagonal and block_traces are on average over batches what they are of all
    data; ValueError for others. Each batch has random vectors of its own; `options` are those of the question.
    The error has the degrees of freedom of the number of batches, so that it takes a dozen to know it well. Raises
    BadObjective for a single batch.
    """
    run = run or Run()
    estimates: list[Estimate] = []
    weights, parts = _parts(objective)
    seeds = torch.randint(2**32, (len(parts),), generator=torch.Generator().manual_seed(seed)).tolist()
    described = describe(matrix(objective))
    try:
        for index, (part, drawn) in enumerate(zip(parts, seeds, strict=True)):
            own = replace(run.part(str(index)), progress=None)
            estimate = question(matrix(part), seed=drawn, run=own, **options)
            if (asked := estimate.origin.question) not in LINEAR:
                raise ValueError(
                    f"A mean over batches is for {', '.join(LINEAR)}, and {asked} is not linear in the data."
                )
            estimates.append(estimate)
            run.report(Progress("subsampled", index + 1, len(weights), "batches"))
    except KeyboardInterrupt as stop:
        if len(estimates) < 2:
            raise KeyboardInterrupt from stop
        result = _combined(estimates, weights[: len(estimates)], seed, options, described)
        raise Interrupted(replace(result, complete=False)) from stop
    return _combined(estimates, weights, seed, options, described)


def _combined(
    estimates: list[Estimate],
    weights: Float[Tensor, " b"],
    seed: int,
    options: dict[str, Any],
    described: dict[str, Any],
) -> Subsampled:
    """The mean of as many estimates as there are weights, and its errors."""
    values = torch.stack([e.value.double() for e in estimates])
    errors, floors = (
        torch.stack([torch.as_tensor(x).double().expand_as(values[0]) for x in column])
        for column in ([e.stderr for e in estimates], [e.floor for e in estimates])
    )
    shares = (weights / weights.sum()).reshape(-1, *[1] * (values.ndim - 1))
    mean, stderr = _mean(values, shares)
    probes = (shares * errors).square().sum(0).sqrt().minimum(stderr)
    first = estimates[0].origin
    return Subsampled(
        value=mean,
        stderr=stderr,
        probe_stderr=probes,
        data_stderr=(stderr.square() - probes.square()).sqrt(),
        samples=len(estimates),
        dof=len(estimates) - 1,
        floor=(shares * floors).sum(0),
        names=estimates[0].names,
        cost=_total([e.cost for e in estimates]),
        origin=replace(
            first,
            question="subsampled",
            options={"of": first.question, **options},
            seed=seed,
            operator=described,
        ),
    )


def eigenvalue_errors(pairs: Eigenpairs, matrix: Matrix, objective: Objective) -> Estimate:
    """The eigenvalues (k,) with the error that the choice of the data gives them, to first order: that of the mean over
    batches of v.A v, for the eigenvectors v as they are.

    One pass over the data, for pairs that eigsh found of `matrix(objective)`. Where eigenvalues are nearer to each
    other than their errors, their vectors turn with the data, and only of the sum of such a group is this the error.
    The largest eigenvalue of a sample is on average above that of all data there could be, by second-order terms that
    this does not see. Raises BadObjective for a single batch.
    """
    rows = pairs.vectors.to(objective.space.device, objective.space.dtype)
    measurement = Measurement(matrix(objective), "eigenvalue_errors", options={"k": len(rows)})
    weights, parts = _parts(objective)
    forms = []
    for part in parts:
        A = matrix(part)
        forms.append(A.domain.diagonal(rows, A.apply(rows)).cpu())
        measurement.products += len(rows)
    _, stderr = _mean(torch.stack(forms), (weights / weights.sum()).unsqueeze(1))
    return measurement.estimate(
        pairs.values, stderr, samples=len(forms), dof=len(forms) - 1, floor=pairs.residuals.cpu()
    )


def _parts(objective: Objective) -> tuple[Float[Tensor, " b"], list[Objective]]:
    """The terms of every batch that has any, and the objectives of one batch each."""
    objective.check()
    both = objective.split()
    if len(both) < 2:
        raise BadObjective(
            "The data are one batch, which says nothing about other data.",
            "Give them in several, drawn at random: a loader, or tensors with batch_size=.",
        )
    return torch.tensor([terms for terms, _ in both], dtype=torch.float64), [part for _, part in both]


def _mean(values: Float[Tensor, "b ..."], shares: Float[Tensor, "b ..."]) -> tuple[Tensor, Tensor]:
    """The weighted mean, and its standard error as that of independent samples."""
    mean = (shares * values).sum(0)
    count = len(values)
    return mean, ((shares * (values - mean)).square().sum(0) * count / (count - 1)).sqrt()


def _total(costs: list[Cost]) -> Cost:
    """Passes are over single batches, which together are one."""
    return replace(sum(costs, Cost()), passes=max(cost.passes for cost in costs))
