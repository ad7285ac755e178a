"""Newton-CG: Newton steps of a mini-batch, its matrix known by products alone, solved for by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NotConverged
from curvature.linalg.operator import LinearOperator
from curvature.linalg.solve import solve
from curvature.operators.gauss_newton import ggn
from curvature.operators.hessian import hessian
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.update import Momentum

Matrix = Literal["ggn", "hessian"]


@dataclass(frozen=True)
class TruncatedNewton:
    """(A + damping I)^-1 by at most `max_steps` steps of conjugate gradients: see `TruncatedInverse`. A is the
    Gauss-Newton matrix of the mini-batch, or its Hessian, and they begin with the last direction."""

    matrix: Matrix = "ggn"
    damping: float = 1.0
    rtol: float = 1e-2
    max_steps: int = 100
    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})
    grain: ClassVar[Grain] = "model"

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.matrix not in ("ggn", "hessian"):
            raise ValueError(f"matrix is 'ggn' or 'hessian', but got {self.matrix!r}.")
        if not self.damping >= 0 or not 0 < self.rtol < 1 or self.max_steps < 1:
            raise ValueError(
                "Expected damping >= 0, 0 < rtol < 1 and max_steps >= 1, "
                f"but got {self.damping}, {self.rtol} and {self.max_steps}."
            )

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        return {"direction": block.zeros()}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        assert evidence.objective is not None
        evidence.objective.average(lambda batch: torch.zeros(()))  # has terms, or else the zero gradient is no minimum

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> TruncatedInverse:
        assert evidence.objective is not None
        A = (ggn if self.matrix == "ggn" else hessian)(evidence.objective)
        shift = self.damping if damping is None else damping
        return TruncatedInverse(A, shift, state["direction"], self.rtol, self.max_steps)


class TruncatedInverse(LinearOperator):
    """(A + damping I)^-1 b to the relative residual `rtol`, or as near as so many steps of conjugate gradients come.

    They begin with the multiple of `start` that is best for the quadratic x.(A + damping I)x/2 - b.x, and end where a
    direction has no positive curvature; x is b itself where it would be no direction of descent, b.x > 0. So it is
    linear, and an inverse, only as far as it converges.
    """

    symmetric = True

    def __init__(
        self, A: LinearOperator, damping: float, start: Float[Tensor, " n"], rtol: float, max_steps: int
    ) -> None:
        self.damping, self.start, self.rtol, self.max_steps = damping, start, rtol, max_steps
        self.domain = self.codomain = A.domain
        self.parts, self.psd = (A,), A.psd and damping >= 0
        self.source = {"operator": "truncated inverse", "damping": damping, "rtol": rtol, "max_steps": max_steps}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return torch.stack([self._solved(row) for row in rows])

    def _solved(self, b: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        A, x, left = self.parts[0], torch.zeros_like(b), b
        if self.start.any():
            image = A.apply(self.start[None])[0] + self.damping * self.start
            bend = self._dot(self.start, image)
            if bend > 0:
                share = self._dot(self.start, b) / bend
                x, left = share * self.start, b - share * image
        length, wanted = self._dot(left, left) ** 0.5, self.rtol * self._dot(b, b) ** 0.5
        if length > wanted:
            options = {"damping": self.damping, "rtol": wanted / length, "max_steps": self.max_steps}
            try:
                x = x + solve(A, left, method="cg", **options).x
            except NotConverged as stop:  # out of steps, or of positive curvature
                x = x + stop.solution.x
        return x if self._dot(b, x) > 0 else b

    def _dot(self, u: Tensor, v: Tensor) -> float:
        return float(self.domain.inner(u[None], v[None]))


@dataclass(frozen=True)
class Kept:
    """The direction as it is, which the state keeps for the next solve to begin with."""

    def init(self, block: Block) -> State:
        return {}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        state["direction"].copy_(direction)
        return direction


class NewtonCG(PreconditionedOptimizer):
    """Newton steps d = (A + damping I)^-1 g by conjugate gradients: with the Gauss-Newton matrix, Hessian-free
    optimisation.

    A step takes as many products with A, each about two gradients, as it takes to the relative residual `rtol`, and
    `max_steps` at most; it needs the mini-batch, `step(objective=Objective.of(model, loss, [batch]))`, which may be a
    part of the one that the gradient is of. Without a backward pass before, the gradient is that of the objective.
    lr = 1 is the whole step, of the length that `damping` (in units of curvature of the mean loss) leaves it; a
    learning rate of AdamW says nothing here. `control=LevenbergMarquardt()` adapts the damping, Armijo() the length.

    All parameters of a group are one system, also those without a gradient, frozen or not used, which stay where they
    are: give it those that move, as in `NewtonCG(p for p in model.parameters() if p.requires_grad)`.

    With matrix="hessian" the step that conjugate gradients have come to is taken where they meet a direction without
    positive curvature, and that of the gradient where this is the first one: take Armijo() with it.

    Martens 2010 (ICML); Martens & Sutskever 2012 (LNCS 7700), who begin at 0.95 of the last direction, where this takes
    the best multiple; Nocedal & Wright 2006, section 7.1.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        damping: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        matrix: Matrix = "ggn",
        rtol: float = 1e-2,
        max_steps: int = 100,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            TruncatedNewton(matrix, damping, rtol, max_steps),
            momentum=Momentum(momentum, corrected=True, after=True),
            finish=(Kept(),),
            weight_decay=weight_decay,
            **options,
        )
