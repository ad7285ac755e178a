"""A matrix in other coordinates."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator


class Congruence(LinearOperator):
    """P^T A P, lazily."""

    def __init__(self, P: LinearOperator, A: LinearOperator) -> None:
        if P.shape[0] != A.shape[1] or A.shape[0] != A.shape[1]:
            raise ValueError(f"A congruence is P^T A P with a square A, but P is {P.shape} and A is {A.shape}.")
        self.domain = self.codomain = P.domain
        self.symmetric, self.psd = A.symmetric, A.psd
        self.parts = (P, A)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        P, A = self.parts
        return P.adjoint().apply(A.apply(P.apply(rows)))

    def adjoint(self) -> LinearOperator:
        P, A = self.parts
        return self if self.symmetric else Congruence(P, A.adjoint())


def congruence(P: LinearOperator, A: LinearOperator) -> Congruence:
    """P^T A P: what A is for steps that are measured by P, symmetric and psd where A is.

    With P = diag(|theta|) and the Hessian for A its eigenvalues are curvatures for relative changes of the weights;
    with the root of a preconditioner they are those that an optimizer meets.

    >>> import torch
    >>> from curvature import Dense, Diagonal
    >>> congruence(Diagonal(torch.tensor([1.0, 2.0])), Dense(torch.ones(2, 2))).dense()
    tensor([[1., 2.],
            [2., 4.]])
    """
    return Congruence(P, A)
