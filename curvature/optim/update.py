"""What is done to gradients before they are preconditioned, and to directions after: the one home of momentum, of
grafting, clipping and matching of scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.optim.block import Block
from curvature.optim.checks import check_numbers, number
from curvature.optim.evidence import Evidence, debiased
from curvature.optim.preconditioner import Preconditioner, State

TINY = 1e-16  # below the norm of any direction that is not zero


@dataclass(frozen=True)
class Momentum:
    """m <- beta m + (1 - beta) g ("ema") or beta m + g ("heavy-ball"); zero beta is the gradient itself.

    `nesterov` looks a step ahead: beta m + (1 - beta) g, or beta m + g, of the new m. `corrected` divides an average by
    1 - beta^t, so that it starts at the first gradient. With `after` it is the direction that is averaged, not the
    gradient.
    """

    beta: float = 0.9
    kind: Literal["ema", "heavy-ball"] = "ema"
    nesterov: bool = False
    corrected: bool = False
    after: bool = False

    def __post_init__(self) -> None:
        number("momentum", self.beta)
        if not 0 <= self.beta < 1:
            raise ValueError(f"The decay of a momentum is at least 0 and less than 1, but got {self.beta}.")

    def init(self, block: Block) -> State:
        if not self.beta:
            return {}
        return {"momentum": block.zeros()}

    def __call__(self, state: State, vector: Float[Tensor, " n"], step: Float[Tensor, "b 1"]) -> Float[Tensor, " n"]:
        """The average after this vector; updates the state."""
        if not self.beta:
            return vector
        m, fresh = state["momentum"].view(-1), 1 - self.beta if self.kind == "ema" else 1.0
        m.lerp_(vector, fresh) if self.kind == "ema" else m.mul_(self.beta).add_(vector)
        ahead = m
        if self.nesterov:
            ahead = vector.lerp(m, self.beta) if self.kind == "ema" else vector.add(m, alpha=self.beta)
        return debiased(ahead, self.beta, step) if self.corrected else ahead


@runtime_checkable
class Finish(Protocol):
    """What is done to a direction."""

    def init(self, block: Block) -> State: ...

    def __call__(
        self, state: State, block: Block, direction: Float[Tensor, " n"], evidence: Evidence
    ) -> Float[Tensor, " n"]: ...


@dataclass(frozen=True)
class ClipEntries:
    """No entry of the direction is beyond -limit and limit."""

    limit: float = 1.0

    def init(self, block: Block) -> State:
        return {}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        return direction.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class ClipNorm:
    """The direction of each parameter is at most so long, by its root mean square where `mean`."""

    limit: float = 1.0
    mean: bool = False

    def init(self, block: Block) -> State:
        return {}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        rows = _rows(block, direction)
        lengths = rows.norm(dim=1, keepdim=True) / (rows.shape[1] ** 0.5 if self.mean else 1.0)
        return (rows * (self.limit / lengths.clamp(min=TINY)).clamp(max=1.0)).view(-1)


@dataclass(frozen=True)
class ClipKL:
    """The direction d = P m is shortened until d . P^-1 d <= limit: for P the inverse of a Fisher matrix about twice
    the KL divergence between the model and the model after d (Ba, Grosse & Martens 2017)."""

    limit: float = 1e-3

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.limit > 0:
            raise ValueError(f"The limit of a KL divergence is above 0, but got {self.limit}.")

    def init(self, block: Block) -> State:
        return {}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        rows = _rows(block, direction)
        length = (rows * _rows(block, evidence.momentum)).sum(1, keepdim=True, dtype=torch.float64).abs()
        return (rows * (self.limit / length.clamp(min=TINY)).sqrt().clamp(max=1.0).to(rows)).view(-1)


@dataclass(frozen=True)
class MatchRMS:
    """An orthogonal direction of o x i has the root mean square 1 / sqrt(max(o, i)): times this it has `target`, which
    is 0.2 for updates of AdamW, so that its learning rate and decay carry over (Liu et al. 2025, arXiv:2502.16982)."""

    target: float = 0.2

    def init(self, block: Block) -> State:
        return {}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        return direction * (self.target * max(block.matrix) ** 0.5)


@dataclass(frozen=True)
class MatchSpectral:
    """The largest singular value of an orthogonal direction of o x i becomes sqrt(o / i): learning rates carry over
    between widths (Yang, Simon & Bernstein 2023, arXiv:2310.17813)."""

    def init(self, block: Block) -> State:
        return {}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        rows, columns = block.matrix
        return direction * (rows / columns) ** 0.5


@dataclass(frozen=True)
class Graft:
    """The direction of each parameter is as long as that of another rule (Agarwal et al. 2020, arXiv:2002.11803)."""

    onto: Preconditioner
    prefix: str = field(default="graft_", init=False)

    def init(self, block: Block) -> State:
        return {self.prefix + name: tensor for name, tensor in self.onto.init(block).items()}

    def __call__(self, state: State, block: Block, direction: Tensor, evidence: Evidence) -> Tensor:
        own = {name.removeprefix(self.prefix): t for name, t in state.items() if name.startswith(self.prefix)}
        self.onto.update(own, block, evidence, True)
        other = self.onto.operator(own, block, evidence, None).apply(evidence.momentum[None])[0]
        lengths, wanted = (_rows(block, vector).norm(dim=1, keepdim=True) for vector in (direction, other))
        return (_rows(block, direction) * (wanted / (lengths + TINY))).view(-1)


def _rows(block: Block, vector: Float[Tensor, " n"]) -> Float[Tensor, "b m"]:
    """A row for each parameter, or one for the whole model."""
    return vector.view(block.stack if block.grain == "shape" else 1, -1)
