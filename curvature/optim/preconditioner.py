"""The rules that turn a stream of evidence into a matrix that gradients are multiplied by."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.optim.block import Block, Grain
from curvature.optim.evidence import Evidence

State = dict[str, Tensor]
Need = Literal["grad", "objective", "signs"]


@runtime_checkable
class Preconditioner(Protocol):
    """Frozen hyperparameters, and what is done with them to the state of a block.

    The state is tensors only. For the grain "shape" each has a row for every parameter of the stack, for "model" the
    last axis of each is that of the block's vectors; what belongs to the block as a whole has a name that begins with
    "block.". Numbers among the fields of a rule are hyperparameters of a parameter group, where they may be changed.
    One that `needs` "signs" has a number `draws` of products of the Hessian with random signs: where the gradient is
    not given, they come along with it, and else it asks the objective.
    """

    needs: ClassVar[frozenset[Need]]
    grain: ClassVar[Grain]

    @property
    def every(self) -> int:
        """Steps between refreshes."""
        ...

    def refuses(self, block: Block) -> str | None:
        """Why the rule is not for a block, in a few words; None where it is."""
        ...

    def init(self, block: Block) -> State:
        """The state before the first step."""
        ...

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> Tensor | None:
        """Take the evidence of a step into the state, in place, without looking at values. What is dear, roots and
        eigenbases, is made anew where it is `due`: at the first step of a parameter, and then every so many; only then
        need there be an objective. Returns what is to be preconditioned, where that is not the momentum but what the
        rule has kept of the gradient."""
        ...

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        """The positive definite matrix by which vectors of the block are multiplied; it shares storage with the state.
        `damping` is that of the step control, where it has one."""
        ...
