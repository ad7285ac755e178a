"""The diagonal of Adam: what parameters get for which a rule has no matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from curvature.linalg.structured import Diagonal
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence, debiased
from curvature.optim.preconditioner import Need, State


@dataclass(frozen=True)
class AdamDiagonal:
    """1 / (sqrt(v) + eps), where v is the average of squared gradients, divided by 1 - beta2^t.

    Kingma & Ba 2015 (arXiv:1412.6980).
    """

    beta2: float = 0.999
    eps: float = 1e-8
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.beta2 < 1 or not self.eps >= 0:
            raise ValueError(f"Expected 0 <= beta2 < 1 and eps >= 0, but got {self.beta2} and {self.eps}.")

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        return {"square": block.zeros()}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        state["square"].view(-1).mul_(self.beta2).addcmul_(evidence.grad, evidence.grad, value=1 - self.beta2)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> Diagonal:
        square = debiased(state["square"].view(-1), self.beta2, evidence.step)
        return Diagonal(square.sqrt_().add_(self.eps).reciprocal_(), space=block.space, psd=True)
