"""The one `step` of all optimizers: gradient, momentum, preconditioner, finish, step control."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from typing import Any, TypedDict, get_args

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from curvature.distributed import several
from curvature.errors import NeedsEvidence, NonFinite
from curvature.linalg.deflation import derived
from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal
from curvature.objective.function import cast
from curvature.objective.objective import Objective
from curvature.objective.params import ParamSpace
from curvature.operators.hessian import gradient_and_products
from curvature.optim.block import Block, Role, blocks_of, role_of
from curvature.optim.checks import (
    check_closure,
    check_group,
    check_mini_batch,
    check_names,
    check_part,
    check_saved,
    listed,
    number,
)
from curvature.optim.control import Fixed, StepControl
from curvature.optim.evidence import Drawn, Evidence
from curvature.optim.guard import dense, guarded, where
from curvature.optim.preconditioner import Preconditioner, State
from curvature.optim.rules.adam import AdamDiagonal
from curvature.optim.slab import WHOLE, Slab, count, numbers, with_numbers
from curvature.optim.trial import Move, Trial
from curvature.optim.update import Finish, Momentum

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

OWN = ("preconditioner", "momentum", "control", "finish", "fallback", "roles", "seed", "group")


class Options(TypedDict, total=False):
    """What every optimizer takes besides its own arguments: see PreconditionedOptimizer."""

    control: StepControl
    maximize: bool
    fallback: Preconditioner
    roles: Mapping[str, Role] | None
    seed: int
    group: distributed.ProcessGroup | None


class PreconditionedOptimizer(torch.optim.Optimizer):
    """theta <- theta - lr * finish(P m), with decoupled weight decay: m is the momentum of the gradients, and P the
    matrix that `preconditioner` makes of what it has seen.

    `params` are parameters, (name, parameter) pairs or groups of such; names (as `model.named_parameters()` gives them)
    tell embeddings and output layers from other matrices, `roles` says so by globs. What the rule refuses is taken by
    `fallback`; `routing` says which, and why. Every number of the rule is a hyperparameter of each group. `control`
    decides how far to go, and needs a closure, or `step(objective=...)`, where it is not Fixed.

    A step in which the gradient of a parameter is not finite leaves that parameter alone; three in a row raise
    NonFinite, on a GPU at the next refresh. The state holds tensors only, in float32 or better whatever the parameters
    are, and is saved and loaded bit for bit.

    Where several processes train the same parameters (DistributedDataParallel), gradients come as means over them, and
    so do, over the processes of `group`, by default all, the losses and curvature that a rule or control asks for: each
    calls `step` with its share of the mini-batch, and they remain the same to the last bit.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        preconditioner: Preconditioner,
        *,
        momentum: Momentum = Momentum(),
        control: StepControl = Fixed(),
        finish: Sequence[Finish] = (),
        weight_decay: float = 0.0,
        maximize: bool = False,
        fallback: Preconditioner = AdamDiagonal(),
        roles: Mapping[str, Role] | None = None,
        seed: int = 0,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        check_part("preconditioner", preconditioner, Preconditioner, "AdamDiagonal()")
        check_part("fallback", fallback, Preconditioner, "AdamDiagonal()")
        check_part("control", control, StepControl, "Fixed() or Armijo()")
        for part in finish:
            check_part("Each finish", part, Finish, "ClipNorm()")
        number("seed", seed)
        if not isinstance(roles, Mapping | None):
            raise TypeError(f'roles are a dict of roles by globs of names, as {{"head.*": "head"}}, but got {roles!r}.')
        if maximize and control.needs:
            raise ValueError(f"{type(control).__name__} lowers a loss. Give the negative of what is to be maximised.")
        self.preconditioner, self.momentum, self.control = preconditioner, momentum, control
        self.finish, self.fallback = tuple(finish), fallback
        self.roles: dict[str, Role] = dict(roles or {})
        if unknown := set(self.roles.values()) - set(get_args(Role)):
            raise ValueError(f"roles are {', '.join(get_args(Role))}, but got {', '.join(map(str, unknown))}.")
        self.seed, self.group = seed, group
        self._slabs: list[Slab] = []  # this and the next change in place: Lightning's wrapper has the same lists
        self._observed: list[Objective] = []
        self._checked: list[Any] = []  # what the check of the first objective found: the model is the same
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "momentum": momentum.beta, "taken": 0}
        defaults |= {"fallback_momentum": 0.9} | {"fallback_" + name: v for name, v in numbers(fallback).items()}
        defaults |= numbers(preconditioner) | control.begin(numbers(preconditioner))
        super().__init__(listed(params), defaults)

    # What torch expects

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, {*signature(type(self)).parameters, *Options.__annotations__}, self.defaults)
            check_names([name for other in self.param_groups for name in self._names(other)])
            for rule, prefix in ((self.preconditioner, ""), (self.fallback, "fallback_")):
                with_numbers(rule, group, prefix)
            replace(self.momentum, beta=group["momentum"])
        except (TypeError, ValueError):
            self.param_groups.pop()  # as it was before
            raise
        self._slabs.clear()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: torch alone would leave out what is not in the state."""
        kept = {name: value for name, value in self.__dict__.items() if name in OWN}
        return {**super().__getstate__(), **kept, "_slabs": [], "_observed": [], "_checked": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer; tensors keep their own dtype, where torch would give them that of the parameters."""
        check_saved(state_dict["param_groups"], self.defaults, type(self).__name__)
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for p, index in zip(params, saved, strict=True):
            if index in state_dict["state"]:
                tensors = state_dict["state"][index]
                self.state[p] = {name: t.to(p.device, copy=True) for name, t in tensors.items()}
        self._slabs.clear()

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, objective: Objective | None = None
    ) -> Any:
        """One step; returns what the closure does, which is called with gradients enabled.

        `objective` is the mini-batch of this step as a function of the parameters, wherever it was made: rules that
        need more than the gradient ask it. Raises NeedsEvidence where it, or a closure, is needed and missing.
        """
        loss = None
        if closure is not None:
            check_closure(closure)
            with torch.enable_grad():
                loss = closure()
        if objective is None and self._observed:
            objective = self._observed[0]
        if objective is not None:
            check_mini_batch(objective)
        self._need_evidence(closure, objective)
        with torch.no_grad():
            moves = [m for slab in self.slabs for m in self._moves(slab, objective)]
            for group in self.param_groups:
                group["taken"] += 1
            placed = None if objective is None else lambda: self._placed(objective, None)
            trial = Trial(moves, loss, closure, placed, several(self.group))
            self.control.settle(self.param_groups[0], trial)
            trial.decay()
        self._observed.clear()
        return loss

    def observe(self, objective: Objective) -> None:
        """The mini-batch of the next step, for loops that call `step` without one; the closure of the step may do so.

        Of several before one step the last counts, as that of the last part where gradients are accumulated.
        """
        check_mini_batch(objective)
        self._observed[:] = [objective]

    # What it is

    @property
    def slabs(self) -> list[Slab]:
        """The blocks of all groups, each with the rule that takes it."""
        if not self._slabs:
            self._slabs.extend([slab for group in self.param_groups for slab in self._partition(group)])
        return self._slabs

    @property
    def routing(self) -> Routing:
        """Which rule takes each parameter, and why."""
        rows = []
        for slab in self.slabs:
            block, rule = slab.block, type(slab.rule).__name__
            rows += [(n, tuple(p.shape), rule, slab.reason) for n, p in zip(block.names, block.params, strict=True)]
        for group in self.param_groups:
            named = zip(self._names(group), group["params"], strict=True)
            rows += [(n, tuple(p.shape), "none", "no entries") for n, p in named if not p.numel()]
        return Routing(tuple(rows))

    def operator(self, *, copy: bool = False) -> LinearOperator:
        """The matrix that momentum is multiplied by, over all parameters in order: block-diagonal, positive definite.

        It shares memory with the state, and changes with the next step, unless `copy`. Raises ValueError before the
        first step.
        """
        params = {n: p for slab in self.slabs for n, p in zip(slab.block.names, slab.block.params, strict=True)}
        ordered = {n: params[n] for group in self.param_groups for n in self._names(group) if n in params}
        widest = torch.promote_types(next(iter(ordered.values())).dtype, torch.float32)
        space = ParamSpace.of({n: p.detach().to(widest) for n, p in ordered.items()})
        places = space.places("parameter")
        blocks = {}
        where = {}
        for i, slab in enumerate(self.slabs):
            if not slab.begun:
                raise ValueError(f"{', '.join(slab.block.names[:3])} took no step yet. Take one first.")
            state = {name: t.clone() for name, t in slab.state.items()} if copy else slab.state
            blocks[str(i)] = self._operator(slab, slab.current, state, slab.block, self._last(slab, state))
            where[str(i)] = torch.cat([places[name] for name in slab.block.names])
        return BlockDiagonal(blocks, where, space, source={"operator": f"preconditioner of {type(self).__name__}"})

    # How a step is made

    def _moves(self, slab: Slab, objective: Objective | None) -> list[Move]:
        """What the step does to the parameters of a block; nothing where none has a gradient."""
        block, rule, group = slab.block, slab.current, slab.group
        place = None
        if objective is not None and "objective" in rule.needs:
            place = slab.place = cache(partial(self._placed, objective, block))
        moved = [p.grad is not None for p in block.params]
        backward = any(moved)
        if not backward and place is not None:  # the gradient is that of the objective
            moved = [p.requires_grad for p in block.params]
        rows = [i for i, moves in enumerate(moved) if moves]
        if not rows:
            return []
        if len(rows) < block.stack and block.grain == "shape":
            block, moved = block.some(rows), [True] * len(rows)
            place = None if place is None else cache(partial(self._placed, place(), block))
        drawn = None
        if backward:
            grad = block.gathered([torch.zeros_like(p) if p.grad is None else dense(p.grad) for p in block.params])
        else:
            assert place is not None
            grad, drawn = self._differentiated(slab, place(), rows)
        grad = -grad if group["maximize"] else grad
        state = slab.state
        if block.stack < slab.block.stack:
            state = {name: t if name.startswith(WHOLE) else t[rows] for name, t in slab.state.items()}
        direction, grad = self._direction(slab, state, block, rows, grad, place, drawn)
        if state is not slab.state:
            for name, tensor in state.items():
                if not name.startswith(WHOLE):
                    slab.state[name][rows] = tensor
        slab.begun.update(rows)
        views = [self.state[p] for p in block.params]
        if block.grain == "model":  # rules may have made more of it
            first = self.state[slab.block.params[0]]
            first |= {name: t for name, t in state.items() if name.startswith(WHOLE) and name not in first}
        return [Move(block, direction, -float(group["lr"]), grad, moved, group, views)]

    def _differentiated(
        self, slab: Slab, objective: Objective, rows: list[int]
    ) -> tuple[Float[Tensor, " n"], Drawn | None]:
        """The gradient of the objective, and what is drawn of its Hessian where that is due."""
        group, dtype = slab.group, slab.block.dtype
        if "signs" not in slab.rule.needs or not slab.due(rows):
            return objective.gradient().to(dtype), None
        signs = objective.space.draw(group["draws"], seed=derived(self.seed + group["taken"]))
        grad, products = gradient_and_products(objective, signs)
        return grad.to(dtype), (signs, products)

    def _direction(
        self,
        slab: Slab,
        state: State,
        block: Block,
        rows: list[int],
        grad: Float[Tensor, " n"],
        place: Callable[[], Objective] | None,
        drawn: Drawn | None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The finished direction of a block, and the gradient where it is finite; updates the state."""
        steps, rule = count("step", state).view(-1, 1), slab.rule
        due = slab.due(rows)
        asks = "objective" in rule.needs
        look, failures = due and (rule.every > 1 or asks), count("failures", state)
        before = failures.clone() if asks else None
        grad, fine = guarded(grad, failures, block, look)
        steps += 1 if fine is None else fine
        momentum = slab.averaging
        averaged = grad if momentum.after else momentum(state, grad, steps)
        evidence = Evidence(grad, averaged, steps, self.seed, place, slab.group["taken"], drawn, several(self.group))
        kept = rule.update(state, block, evidence, due)
        direction = self._multiplied(slab, rule, state, block, evidence, averaged if kept is None else kept)
        if asks:  # the mini-batch may have no finite matrix where the gradient is finite
            direction, good = guarded(direction, failures, block, look, before)
            fine = good if fine is None else fine if good is None else fine & good
        if momentum.after:
            direction = momentum(state, where(fine, direction), steps)
        for finish in self.finish if slab.covered else ():
            direction = finish(state, block, direction, evidence)
        return where(fine, direction), grad

    def _multiplied(
        self,
        slab: Slab,
        rule: Preconditioner,
        state: State,
        block: Block,
        evidence: Evidence,
        vector: Float[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """The matrix of a rule times a vector; not a number where that of the mini-batch is none."""
        try:
            return self._operator(slab, rule, state, block, evidence).apply(vector[None])[0]
        except NonFinite:
            if "objective" not in rule.needs:
                raise
            return torch.full_like(vector, math.nan)

    def _operator(
        self, slab: Slab, rule: Preconditioner, state: State, block: Block, evidence: Evidence
    ) -> LinearOperator:
        damping = self.control.damping(self.param_groups[0]) if slab.covered else None
        return rule.operator(state, block, evidence, damping)

    def _last(self, slab: Slab, state: State) -> Evidence:
        """What is left of the evidence of the last step."""
        block = slab.block
        steps = count("step", state).view(-1, 1)
        momentum = state["momentum"].view(-1) if "momentum" in state else block.zeros().view(-1)
        return Evidence(momentum, momentum, steps, place=slab.place)

    def _partition(self, group: dict[str, Any]) -> list[Slab]:
        """The blocks of a group: of the rule, and of the fallback for what it refuses; in none what has no entries."""
        taken: list[tuple[str, Tensor, Role]] = []
        refused: dict[str, list[tuple[str, Tensor, Role]]] = {}
        named = zip(self._names(group), group["params"], strict=True)
        for name, p in ((name, p) for name, p in named if p.numel()):
            role = role_of(name, p, self.roles)
            reason = self.preconditioner.refuses(Block((name,), (p,), self.preconditioner.grain, role))
            (taken if reason is None else refused.setdefault(reason, [])).append((name, p, role))
        blocks = blocks_of(taken, self.preconditioner.grain)
        slabs = [Slab(b, group, True, b.role, self.preconditioner, self.momentum) for b in blocks]
        for reason, some in refused.items():
            blocks = blocks_of(some, self.fallback.grain)
            slabs += [Slab(b, group, False, reason, self.fallback, Momentum(corrected=True)) for b in blocks]
        for slab in slabs:
            slab.fill(self.state, self.finish if slab.covered else (), self.control)
        return slabs

    def _names(self, group: dict[str, Any]) -> list[str]:
        if "param_names" in group:
            return list(group["param_names"])
        place = next(i for i, other in enumerate(self.param_groups) if other is group)
        first = sum(len(other["params"]) for other in self.param_groups[:place])
        return [str(first + i) for i in range(len(group["params"]))]

    def _placed(self, objective: Objective, block: Block | None) -> Objective:
        """The objective where the parameters are now, as a function of those of a block, in its order."""
        module = objective.function.module
        names = {id(p): name for name, p in module.named_parameters()}
        params = block.params if block else [p for group in self.param_groups for p in group["params"]]
        unknown = [name for name, p in zip(block.names if block else (), params, strict=False) if id(p) not in names]
        if unknown:
            raise NeedsEvidence(
                f"The objective is of a {type(module).__name__} that has no parameter {unknown[0]}.",
                "Make it of the model that is trained: Objective.of(model, loss, [batch]).",
            )
        place = objective.space.device, block.dtype if block else objective.space.dtype
        live = cast(dict(module.named_parameters()), *place)  # copies, which stay where they are when steps are taken
        own = {names[id(p)]: live[names[id(p)]] for p in params if id(p) in names}
        return replace(
            objective,
            params=own,
            frozen={name: p for name, p in live.items() if name not in own},
            buffers=cast(dict(module.named_buffers()), *place),
            group=several(self.group),
            _health=self._checked,
        )

    def _asked(self) -> bool:
        """Whether this step needs the objective: for the control, or what is due of parameters that have gradients, or
        of all where none has."""
        given = [[i for i, p in enumerate(slab.block.params) if p.grad is not None] for slab in self.slabs]
        due = (
            "objective" in slab.current.needs and slab.due(rows)
            for slab, rows in zip(self.slabs, given, strict=True)
            if rows or not any(given)
        )
        return "objective" in self.control.needs or any(due)

    def _need_evidence(self, closure: Callable[[], Any] | None, objective: Objective | None) -> None:
        name = type(self).__name__
        if objective is None and self._asked():
            raise NeedsEvidence(
                f"{name} needs the mini-batch as a function of the parameters, and not only its gradient.",
                "Call step(objective=curvature.Objective.of(model, loss, [batch])), or observe(...) before step().",
            )
        if closure is None and objective is None and "loss" in self.control.needs:
            raise NeedsEvidence(
                f"{type(self.control).__name__} compares the loss before and after a step.",
                "Call step(closure), or step(objective=curvature.Objective.of(model, loss, [batch])).",
            )


@dataclass(frozen=True)
class Routing:
    """Rows of (name, shape, rule, why), one for each parameter; prints as a table."""

    rows: tuple[tuple[str, tuple[int, ...], str, str], ...]

    def __str__(self) -> str:
        table = [("parameter", "shape", "rule", "because"), *((n, str(s), r, why) for n, s, r, why in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )

    __repr__ = __str__
