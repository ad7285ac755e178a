"""How much of the gradient lies in the few directions in which the loss curves most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.eigenpairs import Eigenpairs
from curvature.objective.objective import Objective
from curvature.objective.work import work_on
from curvature.operators.engine import need_objective
from curvature.result import Estimate, Result


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientShare(Estimate):
    """The share of the gradient's square in the span of the first i eigenvectors, `value` (k,), for i = 1 ... k; a
    random direction has i/n there on average.

    That of the full gradient is exact. `batches` (k,) is the mean of those of the gradients of single batches, and
    `batches_stderr` (k,) its standard error over them, NaN where there is one batch. `eigenvalues` (k,) are those of
    the directions, and `size` is n.
    """

    batches: Float[Tensor, " k"]
    batches_stderr: Float[Tensor, " k"]
    eigenvalues: Float[Tensor, " k"]
    size: int

    def summary(self) -> dict[str, str]:
        last, k = float(self.value[-1]), len(self.value)
        mean, error = float(self.batches[-1]), float(self.batches_stderr[-1])
        return {
            "directions": f"{k} of {self.size:,}; a random gradient has {k / self.size:.2g} there",
            "of the gradient": f"{last:.4g} of its square",
            "of those of batches": f"{mean:.4g} ± {error:.2g}",
        }

    __repr__ = Result.__str__


def gradient_share(objective: Objective, pairs: Eigenpairs) -> GradientShare:
    """How much of the gradient lies in the subspace of `pairs`: |U g|^2 / |g|^2 for the eigenvectors U (k, n) that
    eigsh found of a matrix of the objective, of the largest eigenvalues first.

    In classifiers it soon comes close to 1 with as many directions as there are classes, and stays there (Gur-Ari,
    Roberts & Dyer 2018, arXiv:1812.04754): gradient steps mostly go where the loss curves, and little of them where it
    does not. How far the subspace turned between two points is `subspace_overlap`. One pass over the data for the
    gradient and one for those of the batches. NaN where a gradient is zero.
    """
    need_objective("gradient_share", objective)
    work = work_on(objective, "gradient_share", options={"k": len(pairs.values)})
    rows = _checked(objective.space.size, pairs).to(objective.space.device, objective.space.dtype)

    def shares(gradient: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
        along = objective.space.inner(rows, gradient[None])[:, 0].double().square()
        return (along.cumsum(0) / objective.space.inner(gradient[None], gradient[None])[0, 0]).cpu()

    of_batches = torch.stack([shares(part.gradient()) for _, part in objective.split()])
    value, count = shares(objective.gradient()), len(of_batches)
    return GradientShare(
        value=value,
        stderr=torch.zeros_like(value),
        samples=0,
        dof=0,
        floor=10 * objective.space.eps,
        batches=of_batches.mean(0),
        batches_stderr=of_batches.std(0) / count**0.5 if count > 1 else torch.full_like(value, torch.nan),
        eigenvalues=pairs.values.double().cpu(),
        size=objective.space.size,
        cost=work.cost,
        origin=work.origin,
    )


def subspace_overlap(one: Eigenpairs, other: Eigenpairs) -> float:
    """The mean squared cosine of the principal angles between the spans of two sets of eigenvectors, |U V^T|^2 / k: 1
    where they are one, k/n on average where they are random. Of different numbers k is the smaller.

    >>> from curvature import Dense, eigsh
    >>> A, B = (Dense(torch.diag(torch.tensor(d))) for d in ([9.0, 4, 1], [1.0, 4, 9]))
    >>> round(subspace_overlap(eigsh(A, 2), eigsh(B, 2)), 6)
    0.5
    """
    U, V = one.vectors, _checked(one.vectors.shape[1], other)
    return float((U @ V.to(U).T).square().sum() / min(len(U), len(V)))


def _checked(size: int, pairs: Eigenpairs) -> Float[Tensor, "k n"]:
    if pairs.vectors.shape[1] != size:
        raise ValueError(f"Expected eigenvectors (k, {size}) of this model, but got {tuple(pairs.vectors.shape)}.")
    return pairs.vectors
