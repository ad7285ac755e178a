"""Inverses of symmetric matrices as operators: exact by structure, else by conjugate gradients at every product."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curvature.linalg.functions import Unstructured, power
from curvature.linalg.measurement import describe
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.outer import Outer, OuterBlocks
from curvature.linalg.solve import solve
from curvature.linalg.structured import BlockDiagonal


def inverse(
    A: LinearOperator,
    *,
    damping: float = 0.0,
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    max_steps: int = 500,
) -> LinearOperator:
    """(A + damping I)^-1 for symmetric A, as an operator: exact where the structure of A tells it, see `power`.

    Damping is added to the eigenvalues themselves, not to the factors of Kronecker products. Of other matrices every
    product is a `solve`, with the other arguments, which raises NotConverged where it does not come to `rtol`: so
    linear to that accuracy only.

    >>> import torch
    >>> from curvature import MatrixFree, Space
    >>> A = MatrixFree(lambda rows: 2 * rows, Space(3), psd=True)
    >>> (inverse(A, damping=2.0) @ torch.ones(3)).tolist()
    [0.25, 0.25, 0.25]
    """
    A = as_operator(A)
    if not math.isfinite(damping):
        raise ValueError(f"The damping is finite, but got {damping}.")
    match A:
        case Outer() | OuterBlocks():
            return A.inverse(damping)
        case BlockDiagonal():
            options = {"damping": damping, "rtol": rtol, "max_steps": max_steps}
            blocks = {name: inverse(block, **options) for name, block in A.blocks.items()}
            return BlockDiagonal(blocks, A.places, A.domain, source=_source(A, damping))
    try:
        return power(A, -1, damping=damping)
    except Unstructured:
        return Inverse(A, damping, preconditioner, rtol, max_steps)


class Inverse(LinearOperator):
    """(A + damping I)^-1 of symmetric A by a `solve` for each product."""

    symmetric = True

    def __init__(
        self, A: LinearOperator, damping: float, preconditioner: LinearOperator | None, rtol: float, max_steps: int
    ) -> None:
        if not A.symmetric:
            raise ValueError(f"inverse is for symmetric matrices, but {A!r} is none. See lstsq.")
        self.damping, self.preconditioner = damping, preconditioner
        self.rtol, self.max_steps = rtol, max_steps
        self.domain = self.codomain = A.domain
        self.psd = A.psd and damping >= 0
        self.parts = (A,)
        self.source = _source(A, damping) | {"rtol": rtol}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        options = {"damping": self.damping, "rtol": self.rtol, "max_steps": self.max_steps}
        return solve(self.parts[0], rows.T, preconditioner=self.preconditioner, **options).x.T.contiguous()


def _source(A: LinearOperator, damping: float) -> dict[str, Any]:
    return {"operator": "power", "exponent": -1, "damping": damping, "of": describe(A)}
