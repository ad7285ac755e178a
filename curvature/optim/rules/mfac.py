"""M-FAC and EFCP: gradients times the inverse Fisher matrix of those of the last steps, whole or compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from curvature.linalg.compressed import LowRankWindow, SparseWindow
from curvature.linalg.inverse import inverse
from curvature.linalg.operator import LinearOperator, identity
from curvature.linalg.window import GradientWindow, Window
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers, number
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import WHOLE, Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, Preconditioner, State
from curvature.optim.rules.adam import AdamDiagonal
from curvature.optim.update import Graft, Momentum

COLUMNS = ("rows", "error")  # tensors of a window whose last axis is that of the vectors


class WindowFisher(ABC):
    """(F + damping I)^-1, where F = (1/k) sum g g^T over the last k gradients, at most as many as the window holds.

    The tensors of the window are the state. A gradient is in the window when it is multiplied; one that was not finite
    is left out. Where a window compresses, what it keeps of the gradient is multiplied.
    """

    window: int
    damping: float
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "model"

    @property
    def every(self) -> int:
        return 1

    @abstractmethod
    def over(self, block: Block, state: Mapping[str, Tensor] | None, seen: int) -> Window:
        """The window of these tensors, or an empty one."""

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        tensors = {_name(name): tensor for name, tensor in self.over(block, None, 0).state.items()}
        return {**tensors, "block.seen": torch.zeros((), dtype=torch.int64, device=block.space.device)}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> Tensor | None:
        kept = evidence.grad
        if kept.any():  # a gradient that was not finite is zero here, and would push out the oldest
            kept = self._window(state, block).add(kept)
            state["block.seen"] += 1
        return kept if "error" in state else None

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        window, damping = self._window(state, block), self.damping if damping is None else damping
        return inverse(window.fisher, damping=damping) if len(window) else identity(block.space) / damping

    def _window(self, state: State, block: Block) -> Window:
        tensors = {name.removeprefix(WHOLE): tensor for name, tensor in state.items()}
        return self.over(block, tensors, int(state["block.seen"]))


@dataclass(frozen=True)
class DenseFisher(WindowFisher):
    """Of the gradients as they are. Frantar, Kurtic & Alistarh 2021 (arXiv:2107.03356)."""

    window: int = 32
    damping: float = 1e-5

    def __post_init__(self) -> None:
        _check(self)

    def over(self, block: Block, state: Mapping[str, Tensor] | None, seen: int) -> GradientWindow:
        return GradientWindow(self.window, block.space, state=state, seen=seen)


@dataclass(frozen=True)
class SparseFisher(WindowFisher):
    """Of the largest entries, a share `density` of them. Modoranu et al. 2023 (arXiv:2306.06098)."""

    window: int = 32
    damping: float = 1e-4
    density: float = 0.01

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density, the share of entries that are kept, is above 0 and up to 1, but got {self.density}."
            )

    def over(self, block: Block, state: Mapping[str, Tensor] | None, seen: int) -> SparseWindow:
        return SparseWindow(self.window, block.space, share=self.density, state=state, seen=seen)


@dataclass(frozen=True)
class LowRankFisher(WindowFisher):
    """Of matrices of low `rank`, one for each parameter. Modoranu et al. 2023 (arXiv:2306.06098)."""

    window: int = 32
    damping: float = 1e-4
    rank: int = 4

    def __post_init__(self) -> None:
        _check(self)
        if self.rank < 1:
            raise ValueError(f"rank is 1 or more, or None to keep the largest entries, but got {self.rank}.")

    def over(self, block: Block, state: Mapping[str, Tensor] | None, seen: int) -> LowRankWindow:
        shapes = [p.shape for p in block.params]
        return LowRankWindow(self.window, block.space, shapes=shapes, rank=self.rank, state=state, seen=seen)


def _name(name: str) -> str:
    """What a tensor of a window is called in the state of a block."""
    return name if name in COLUMNS else WHOLE + name


def _check(rule: DenseFisher | SparseFisher | LowRankFisher) -> None:
    check_numbers(rule)
    if rule.window < 1:
        raise ValueError(f"window is a whole number, 1 or more, but got {rule.window}.")
    if not rule.damping > 0:
        raise ValueError(f"damping is above 0, but got {rule.damping}.")


class MFAC(PreconditionedOptimizer):
    """M-FAC: (F + damping I)^-1 g, the full matrix over all parameters of a group, exact in O(window n) per step.

    F is the mean over the last `window` gradients, this one included, of g g^T: it takes `window` numbers for each
    parameter. While it fills up the mean is over those that are there. (M-FAC's own code divides by `window` from the
    start: its first steps, of t gradients, are window/t times as long, with as many times the damping.) Damping has the
    units of |g|^2; far below |g|^2 / window in float32, directions are rounding.

    The direction is as long as that of `graft`, over the whole group, so that learning rates are of the order of
    AdamW's, and the best on small networks a third to three times that; momentum is then that of the gradients.
    Without graft it is M-FAC as published, momentum being that of the directions: g.(F + damping I)^-1 g is up to
    `window`, so that what counts is lr times window, 1 in the paper.

    On a GPU a step waits for it a few times, for numbers and a system of `window` equations. Frantar, Kurtic & Alistarh
    2021 (arXiv:2107.03356).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        window: int = 32,
        damping: float = 1e-5,
        graft: Preconditioner | None = AdamDiagonal(),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            DenseFisher(window, damping),
            momentum=Momentum(momentum, corrected=graft is not None, after=graft is None),
            finish=() if graft is None else (Graft(graft),),
            weight_decay=weight_decay,
            **options,
        )


class EFCP(PreconditionedOptimizer):
    """M-FAC with a compressed window: of each gradient a share `density` of the entries, the largest; or, with `rank`,
    of each matrix one of low rank. What is left out is added to the next gradient.

    What is kept of a gradient is what is multiplied. It takes 8 window density + 4 bytes for each parameter, or those
    of window rank (o + i) numbers for a matrix (o, i), and 4 more: vectors are kept whole then.

    As in MFAC, the direction is as long as that of `graft`. Momentum is heavy-ball, of the directions, whose lengths
    differ by orders: it takes graft=None, as published, where what counts is lr times window, 1 in the paper.

    Modoranu, Kalinov, Kurtic, Frantar & Alistarh 2023 (arXiv:2306.06098).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        window: int = 32,
        density: float = 0.01,
        rank: int | None = None,
        damping: float = 1e-4,
        graft: Preconditioner | None = AdamDiagonal(),
        **options: Unpack[Options],
    ) -> None:
        number("momentum", momentum)
        if momentum and graft is not None:
            raise ValueError(
                f"Momentum {momentum} is of directions whose lengths differ by orders, and grafting would follow the "
                "longest. Give graft=None with it."
            )
        rule = SparseFisher(window, damping, density) if rank is None else LowRankFisher(window, damping, rank)
        super().__init__(
            params,
            lr,
            rule,
            momentum=Momentum(momentum, kind="heavy-ball", after=True),
            finish=() if graft is None else (Graft(graft),),
            weight_decay=weight_decay,
            **options,
        )
