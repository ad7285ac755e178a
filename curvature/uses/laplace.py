"""How sure a trained model is of its outputs, by the curvature of its loss: the linearised Laplace approximation.

At a minimum of -log p(data | theta) - log p(theta) the posterior is taken to be normal, and the model to be linear in
its parameters around it, so that outputs are normal too: their covariance is that of the parameters between Jacobians.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective, Interrupted
from curvature.linalg.inverse import inverse
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.objective.batches import digest, examples, leading, moved
from curvature.objective.check import explained
from curvature.objective.objective import Objective
from curvature.objective.params import ParamSpace
from curvature.objective.passes import Passes
from curvature.objective.products import pulled
from curvature.operators.engine import CHUNK, abreast, need_objective
from curvature.operators.followed import AGREEMENT
from curvature.progress import Run
from curvature.result import Result

ROWS = 64  # of Jacobians at once: where each takes a system, all take the same passes over the data


@dataclass(frozen=True, kw_only=True, repr=False)
class Predictive(Result):
    """The normal distribution of the outputs of each input: `mean` (b, ...), what the model says, and `covariance`
    (b, c, c) between the c outputs that an input has, row-major.

    It is that of the function: of targets there is the noise beside it that the loss stands for.
    """

    mean: Tensor
    covariance: Float[Tensor, "b c c"]

    @property
    def variance(self) -> Tensor:
        """That of each output, shaped like the mean."""
        return self.covariance.diagonal(dim1=1, dim2=2).reshape(self.mean.shape)

    def summary(self) -> dict[str, str]:
        deviations = self.variance.sqrt()
        return {
            "outputs": f"{self.covariance.shape[1]} of {len(self.mean)} inputs",
            "standard deviation": f"{float(deviations.median()):.3g}, up to {float(deviations.max()):.3g}",
        }

    __repr__ = Result.__str__


def laplace_predictive(
    objective: Objective, inputs: Any, curvature: LinearOperator, *, prior: float, run: Run | None = None
) -> Predictive:
    """The outputs at `inputs` with their covariance J S J^T, S = (N curvature + prior I)^-1 that of the parameters.

    J is the Jacobian of the outputs, and N the number of terms of the objective's data, which is a mean over them.
    `inputs` are a batch of what the model takes, without targets: a tensor, or a tuple or dict of its arguments. They
    are computed one by one.

    `curvature` is a psd matrix of the objective. Of `kfac`, `ekfac` and `ggn_diagonal` the inverse is exact and has no
    more cost; that of `ggn` solves a system for every output. `prior` is the precision of the prior, a normal around 0:
    the weight decay of the mean loss times N. Where the objective has `l2`, its `ggn` has that in it, a precision of N
    l2 that is no longer to be given here; the other matrices have not. The loss has to be a negative log-likelihood:
    "mse" says a noise of variance 1/2, and SquaredError(scale=1 / variance) any other.

    MacKay 1992 (Neural Computation 4); Immer, Korzepa & Bauer 2021 (arXiv:2008.08217); Daxberger et al. 2021
    (arXiv:2106.14806).

    >>> from curvature import SquaredError, ggn_diagonal
    >>> line, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
    >>> objective = Objective.of(line, SquaredError(scale=1), (x, x))
    >>> laplace_predictive(objective, x, ggn_diagonal(objective), prior=1.0).variance  # x^2 / (1 + 4 + prior)
    tensor([[0.1667],
            [0.6667]])
    """
    need_objective("laplace_predictive", objective)
    if not curvature.psd or curvature.domain.size != objective.space.size:
        raise ValueError(
            f"curvature is a psd matrix of the {objective.space.size} parameters of the objective, but got "
            f"{curvature!r}. Take kfac, ekfac, ggn_diagonal or ggn of the same objective."
        )
    if not 0 <= prior < float("inf"):
        raise ValueError(f"prior is a precision, finite and 0 or more, but got {prior}.")
    if not (count := leading(inputs)):
        raise ValueError("inputs are a batch of what the model takes, but there is no example in them.")
    objective.check()
    _, terms = Passes(objective).total(lambda batch: torch.zeros(()))
    options = {"prior": prior, "terms": terms, "inputs": digest(inputs)}
    S = Measurement(inverse(curvature, damping=prior / terms), "laplace_predictive", options=options, run=run)
    means: list[Tensor] = []
    covariances: list[Tensor] = []
    waiting: list[Tensor] = []

    def result(*, complete: bool) -> Predictive:
        covariance = torch.stack(covariances)
        return Predictive(
            mean=torch.stack(means[: len(covariances)]),
            covariance=((covariance + covariance.mT) / 2).to(objective.space.dtype),
            complete=complete,
            cost=replace(S.cost, passes=S.cost.passes + 1),  # that of counting
            origin=S.origin,
        )

    try:
        for mean, rows in _jacobians(objective, inputs, count):
            means.append(mean)
            waiting.append(rows)
            if len(waiting) * len(rows) >= ROWS or len(means) == count:
                J = torch.stack(waiting)  # k inputs, c outputs each, n
                JS = S.apply(J.flatten(0, 1)).view_as(J)
                covariances += [objective.space.inner(j, js) / terms for j, js in zip(J, JS, strict=True)]
                waiting = []
                S.report(len(means), count, unit="inputs")
    except KeyboardInterrupt as stop:
        if not covariances:
            raise KeyboardInterrupt from stop
        raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


def _jacobians(objective: Objective, inputs: Any, count: int) -> Iterator[tuple[Tensor, Float[Tensor, "c n"]]]:
    """The outputs of each input, and their derivatives."""
    batch = moved((inputs, None), objective.space.device, objective.space.dtype)
    try:
        with objective.context(), objective.randomness():
            together = objective.outputs(objective.params, batch)[0].detach()
    except Exception as error:  # models can raise anything
        raise explained(error, 1) from error
    for index, example in enumerate(examples(batch, count)):
        try:
            with objective.context(), objective.randomness(index):
                leaves = objective.leaves()
                outputs, _ = objective.outputs(leaves, example)
                _check_alone(outputs.detach(), together[index : index + 1])
                units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
                pull = partial(_pulled, objective.space, list(leaves.values()), outputs)
                rows = abreast(pull, CHUNK, set())(units)
        except Exception as error:  # models can raise anything
            raise explained(error, index + 1) from error
        yield outputs.detach().reshape(outputs.shape[1:]), rows


def _check_alone(outputs: Tensor, together: Tensor) -> None:
    """BadObjective where an input by itself has other outputs than among the others."""
    same = outputs.shape == together.shape
    near = AGREEMENT[together.dtype] * float(together.abs().max()) if together.numel() else 0.0
    if not same or not float((outputs - together).abs().max()) <= near:
        raise BadObjective(
            "The model gives an input other outputs by itself than among the others.",
            "Give the inputs one by one, with what belongs to all of them, in evaluation mode.",
        )


def _pulled(space: ParamSpace, inputs: list[Tensor], outputs: Tensor, row: Float[Tensor, " c"]) -> Float[Tensor, " n"]:
    return pulled(space, inputs, [outputs], [row.reshape(outputs.shape)])
