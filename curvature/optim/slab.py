"""Slabs: blocks with the rules that take them, and their states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.objective.objective import Objective
from curvature.optim.block import Block
from curvature.optim.checks import check_fits
from curvature.optim.control import StepControl
from curvature.optim.preconditioner import Preconditioner, State
from curvature.optim.update import Finish, Momentum

WHOLE = "block."  # how the names begin of what belongs to a block as a whole
NUMBER = (int, float)


@dataclass
class Slab:
    """A block with the rule that takes it, its state, and which of its parameters have taken a step before."""

    block: Block
    group: dict[str, Any]
    covered: bool  # by the rule of the optimizer, or else by its fallback
    reason: str
    rule: Preconditioner  # these two as the group had them when they were last asked for
    momentum: Momentum
    state: State = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    place: Callable[[], Objective] | None = None  # makes that of the last step, or gives it again

    @property
    def current(self) -> Preconditioner:
        """The rule with the hyperparameters that the group has now."""
        self.rule = with_numbers(self.rule, self.group, "" if self.covered else "fallback_")
        return self.rule

    @property
    def averaging(self) -> Momentum:
        """The momentum with the beta that the group has now."""
        beta = self.group["momentum" if self.covered else "fallback_momentum"]
        if beta != self.momentum.beta:
            self.momentum = replace(self.momentum, beta=beta)
        return self.momentum

    def due(self, rows: Iterable[int]) -> bool:
        """Whether a step of these parameters makes anew what is dear."""
        return self.group["taken"] % self.rule.every == 0 or not self.begun.issuperset(rows)

    def fill(
        self, held: MutableMapping[Tensor, dict[str, Tensor]], finish: Sequence[Finish], control: StepControl
    ) -> None:
        """Make the state, or take that which is `held` of parameters; then views of it are."""
        block = self.block
        whole = block.grain == "model"
        state = {**self.averaging.init(block), **self.current.init(block)}
        for part in (*finish, control):
            state |= part.init(block)
        steps = 1 if whole else block.stack
        for name in ("step", "failures"):
            state[WHOLE + name if whole else name] = torch.zeros(steps, dtype=torch.float64, device=block.space.device)
        for i, p in enumerate(block.params):
            saved = held.get(p, {})
            places = _parts(state, block, i)
            made = {n: t for n, t in saved.items() if n.startswith(WHOLE) and n not in places}
            if saved:
                check_fits(block.names[i], {n: t for n, t in saved.items() if n not in made}, places)
                for name, place in places.items():
                    place.copy_(saved[name])
            state |= made  # by the rule, when it saw the model
        self.state = state
        counts = count("step", state)
        self.begun = {i for i in range(block.stack) if counts[0 if whole else i] > 0}
        for i, p in enumerate(block.params):
            held[p] = _parts(state, block, i)


def count(name: str, state: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
    """The tensor of a state that counts something of a block, by parameters or as a whole."""
    return state[name] if name in state else state[WHOLE + name]


def numbers(rule: Any) -> dict[str, float]:
    """The fields of a rule that are numbers."""
    return {name: v for name in _fields(type(rule)) if isinstance(v := getattr(rule, name), NUMBER)}


def with_numbers(rule: Preconditioner, group: Mapping[str, Any], prefix: str) -> Preconditioner:
    """A rule with the numbers of a group."""
    changed = {name: group[prefix + name] for name, v in numbers(rule).items() if group[prefix + name] != v}
    return replace(rule, **changed) if changed else rule  # pyright: ignore[reportArgumentType]


@cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _parts(state: State, block: Block, i: int) -> dict[str, Tensor]:
    """What of a state belongs to parameter i, as views; what belongs to the block as a whole is with the first."""
    first = sum(p.numel() for p in block.params[:i])
    own = i if block.grain == "shape" else (..., slice(first, first + block.params[i].numel()))
    parts = {name: tensor if name.startswith(WHOLE) else tensor[own] for name, tensor in state.items()}
    return {name: part for name, part in parts.items() if i == 0 or not name.startswith(WHOLE)}
