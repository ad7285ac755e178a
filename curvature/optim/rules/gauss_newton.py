"""EGN: steps by the exact inverse of the damped Gauss-Newton matrix of a mini-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Unpack

from jaxtyping import Float
from torch import Tensor, distributed

from curvature.distributed import place, summed
from curvature.errors import NonFinite
from curvature.linalg.inverse import inverse
from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import Diagonal
from curvature.operators.egn import egn
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.update import Momentum


@dataclass(frozen=True)
class GaussNewton:
    """(G + damping I)^-1 with the Gauss-Newton matrix G of the mini-batch alone, exact by Woodbury's identity."""

    damping: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})
    grain: ClassVar[Grain] = "model"

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.damping > 0:
            raise ValueError(f"The damping is above 0, but got {self.damping}.")

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        return {}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        pass

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        assert evidence.objective is not None
        group, shift = evidence.objective.group, self.damping if damping is None else damping
        try:
            own = inverse(egn(replace(evidence.objective, group=None)), damping=shift)
        except NonFinite:
            if group is None:
                raise
            own = Diagonal(block.zeros().fill_(math.nan), psd=True)  # others wait for it
        return own if group is None else Mean(own, group)


class Mean(LinearOperator):
    """The mean of matrices of which each process has one: all multiply at once."""

    symmetric = True

    def __init__(self, own: LinearOperator, group: distributed.ProcessGroup) -> None:
        self.group, self.domain, self.codomain, self.psd = group, own.domain, own.codomain, own.psd
        self.parts = (own,)
        self.source = {"operator": "mean over processes", "of": dict(own.source)}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        image = self.parts[0].apply(rows)
        return summed({"": image}, image.device, self.group)[""] / place(self.group)[1]


class EGN(PreconditionedOptimizer):
    """Gauss-Newton steps d = (G + damping I)^-1 g, exact for every mini-batch; averaged with `momentum`.

    For losses that have a Gauss-Newton matrix, such as squared errors and cross-entropy, and batches of few outputs in
    all, m: a step costs some backward passes and O(m^2 n + m^3), and needs the mini-batch,
    `step(objective=Objective.of(model, loss, [batch]))`. Of 64 examples of 10 classes m is 640; for thousands of
    outputs, as of a vocabulary, take KFAC, or NewtonCG: see `egn`, which warns. Without a backward pass before, the
    gradient is that of the objective. lr = 1 is the whole step, of the length that `damping` (in units of curvature of
    the mean loss) leaves it; a learning rate of AdamW says nothing here. `control=LevenbergMarquardt()` adapts the
    damping from step to step, and Armijo() the length.

    All parameters of a group are one system, also those without a gradient, frozen or not used, which stay where they
    are: give it those that move, as in `EGN(p for p in model.parameters() if p.requires_grad)`.

    With several processes the direction is the mean of those that each makes of its share of the mini-batch, by the
    gradient of all (Wang et al. 2018, arXiv:1709.03528), and not that of one process with all data, as of NewtonCG.

    Korbit, Adeoye, Bemporad & Zanon 2024 (arXiv:2405.14402).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        damping: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            GaussNewton(damping),
            momentum=Momentum(momentum, corrected=True, after=True),
            weight_decay=weight_decay,
            **options,
        )
