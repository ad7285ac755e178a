"""Linear systems (A + damping I) x = b with a symmetric matrix that is known by its products."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

from torch import Tensor

from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.memory import need_basis
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.structured import Dense
from curvature.linalg.symmetric import ConjugateGradients, Minres, Neumann, NewtonSchulz, Symmetric
from curvature.linalg.systems import Solution, check
from curvature.progress import Run

SolveMethod = Literal["auto", "cg", "minres", "neumann", "newton-schulz"]

METHODS: dict[str, type[Symmetric]] = {
    "cg": ConjugateGradients,
    "minres": Minres,
    "neumann": Neumann,
    "newton-schulz": NewtonSchulz,
}
ALONE = ("neumann", "newton-schulz")  # which take no preconditioner
RECYCLED = 5  # times the directions that are kept: the vectors that takes, at most


def solve(
    A: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    method: SolveMethod = "auto",
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    max_steps: int = 500,
    recycle: int = 0,
    run: Run | None = None,
) -> Solution:
    """x with (A + damping I) x = b, for symmetric A and one right-hand side (n,) or many (n, k).

    Until every residual is below `rtol` times its right-hand side; raises NotConverged, which holds the Solution, where
    `max_steps` or rounding come first. `rtol=0` does `max_steps` steps, or as many as rounding allows, and raises
    nothing: a truncated solve inverts the large eigenvalues only, and its number of steps is a regulariser of its own.

    - "cg", conjugate gradients (the "auto" where A is psd), takes the fewest products. It is for positive definite
      matrices: where it meets a direction of negative curvature that system ends, and says so.
    - "minres" (the "auto" for others) is for indefinite ones too. Where A is that, x is no direction of descent.
    - "neumann" is the truncated series: steps of gradient descent on the quadratic from 0, of the length that one over
      the largest eigenvalue gives, which is found first. It is what differentiating through as many training steps
      gives; as a solver it is slow, and diverges where an eigenvalue is negative.
    - "newton-schulz" iterates the whole inverse X <- X (2I - (A + damping I) X), of a Dense A, indefinite or not: some
      2 log2(condition) steps of n products each, that are matrix products and nothing else.

    `preconditioner`, positive definite, is about the inverse of A + damping I: `inverse(kfac(objective), damping=mu)`,
    `inverse(nystrom(A, damping=mu), damping=mu)`. It changes the number of steps, and what they aim for until the end.

    `recycle` is for sequences of related systems with psd A, by "cg": as many directions and their products, which the
    solve has anyway, become the LowRank `solution.recycled`, and `inverse(solution.recycled, damping=mu)` the
    preconditioner of the next system. What a preconditioner that was made so knew is kept as far as the new directions
    say nothing else. One and a half times as many as A has outliers, for each right-hand side, are enough; it takes the
    memory of five times as many vectors. Where A has changed by more than a fraction of its outliers, it is worse than
    none.

    Hestenes & Stiefel 1952; Paige & Saunders 1975 (SIAM J. Numer. Anal. 12); Lorraine, Vicol & Duvenaud 2020
    (arXiv:1911.02590); Schulz 1933 (Z. Angew. Math. Mech. 13); Morales & Nocedal 2000 (SIAM J. Optim. 10).

    >>> import torch
    >>> from curvature import Diagonal
    >>> solve(Diagonal(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 2.0]), damping=1.0).x
    tensor([1.0000, 0.5000])
    """
    A = as_operator(A)
    preconditioner = None if preconditioner is None else as_operator(preconditioner)
    check(A, b, damping, rtol, max_steps)
    if method == "auto":
        method = "cg" if A.psd and damping >= 0 else "minres"
    _check(A, method, preconditioner, recycle)
    options = {"damping": damping, "method": method, "rtol": rtol, "max_steps": max_steps, "recycle": recycle}
    options |= {"preconditioner": None if preconditioner is None else describe(preconditioner)}
    measurement = Measurement(A, "solve", options=options, run=run)
    return METHODS[method](measurement, b, rtol, max_steps, damping, preconditioner, recycle).solved()


def _check(A: LinearOperator, method: str, preconditioner: LinearOperator | None, recycle: int) -> None:
    if not A.symmetric:
        raise ValueError(f"solve is for symmetric matrices, but {A!r} is none. Take lstsq.")
    if method not in METHODS:
        raise ValueError(f"method is 'auto', {', '.join(map(repr, METHODS))}, but got {method!r}.")
    if method == "newton-schulz" and not isinstance(A, Dense):
        raise ValueError(f"newton-schulz takes a matrix that is held whole, not {A!r}. Give Dense(A.dense()).")
    if preconditioner is not None and (preconditioner.shape != A.shape or method in ALONE):
        what = f"{method} takes none" if method in ALONE else f"A is {A.shape}"
        raise ValueError(f"The preconditioner is {preconditioner.shape}, but {what}.")
    if preconditioner is not None and (preconditioner.domain.dtype, preconditioner.symmetric) != (A.dtype, True):
        raise ValueError(f"A preconditioner is symmetric and of {A.dtype} as A is, but got {preconditioner!r}.")
    if not isinstance(recycle, Integral) or recycle < 0:
        raise ValueError(f"recycle is a number of directions, 0 or more, but got {recycle}.")
    if recycle and (method != "cg" or not A.psd):
        raise ValueError(f"Only directions of cg with a psd matrix are recycled, but got {method} and {A!r}.")
    need_basis(RECYCLED * recycle, A.domain)
