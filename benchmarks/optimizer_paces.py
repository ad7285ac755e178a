"""What a step of an optimizer costs, in time and memory: the question "paces" of `optimizers.py`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import Clock
from operators import failure
from optimizer_contenders import BASELINES, EVERY, Contender
from problems import MeanCrossEntropy, Problem, problem_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature as cv

CPU = torch.device("cpu")
PARTS = 2  # of a batch, which give different gradients
Rows = list[dict[str, Any]]


def paces(problem_name: str, contenders: Sequence[Contender], quick: bool, rounds: int) -> Rows:
    """The rows of a network."""
    problem = problem_of(problem_name, "quick" if quick else "cpu", CPU)
    racers, rows = [], []
    for contender in contenders:
        if contender.solves:  # made for fewer parameters
            continue
        row = {"problem": problem_name, "method": contender.method, "library": contender.source}
        rows.append(row)
        if contender.missing:
            row["error"] = "missing"
            continue
        try:
            racers.append((Racer(contender, problem), row))
            racers[-1][0].lap()
        except Exception as error:  # what a library fails with is a finding
            racers = [pair for pair in racers if pair[1] is not row]
            row["error"] = failure(error)
    laps: dict[int, list[float]] = {i: [] for i in range(len(racers))}
    gradients = []
    for seed in range(rounds):
        gradients.append(Clock(CPU)(lambda: gradients_of(problem.module, problem))[0])
        order = list(laps)
        random.Random(seed).shuffle(order)
        for i in order:
            laps[i].append(racers[i][0].lap())
    adam = next(i for i, (racer, _) in enumerate(racers) if racer.contender is BASELINES[0])
    for i, (racer, row) in enumerate(racers):
        row["ms"] = 1e3 * median(laps[i])
        row["of AdamW"] = median(own / his for own, his in zip(laps[i], laps[adam], strict=True))
        row["of a gradient"] = median(own / one for own, one in zip(laps[i], gradients, strict=True))
        row["bytes a parameter"] = state_bytes(racer.optimizer, racer.model) / problem.size
    return rows


class Racer:
    """A contender with a network of its own, and gradients for its steps."""

    def __init__(self, contender: Contender, problem: Problem) -> None:
        self.contender, self.problem, self.model = contender, problem, problem.copied()
        self.optimizer = contender.optimizer(self.model, contender.values[0] / 10)
        self.gradients = [gradients_of(self.model, problem, part) for part in range(PARTS)]
        self.start = [tensor.clone() for tensor in self.model.state_dict().values()]

    def lap(self) -> float:
        """The seconds of one of ten steps, and of what a gradient that can be differentiated takes longer.

        All begin where all others do: what derivatives take depends on how many of their numbers are subnormal.
        """
        params, seconds = list(self.model.parameters()), 0.0
        for tensor, first in zip(self.model.state_dict().values(), self.start, strict=True):
            tensor.copy_(first)
        for step in range(EVERY):
            grads, extra = self._gradients(step)
            for p, g in zip(params, grads, strict=True):
                p.grad = None if self.contender.differentiates(step) else g
            seconds += extra + Clock(CPU).once(partial(self._step, step))[0]
        for p in params:
            p.grad = None  # which a graph may hold
        return seconds / EVERY

    def _gradients(self, step: int) -> tuple[list[Tensor], float]:
        """The gradients of a step, and the seconds beyond those of plain ones: fewer, where the step computes them."""
        part = step % PARTS
        if not self.contender.graph or (self.contender.objective and not self.contender.asks(step)):
            return [g.clone() for g in self.gradients[part]], 0.0  # some write into them
        made: list[Tensor] = []
        plain = Clock(CPU).once(lambda: gradients_of(self.model, self.problem, part))[0]
        if self.contender.objective:
            return [g.clone() for g in self.gradients[part]], -plain
        longer = Clock(CPU).once(lambda: made.extend(gradients_of(self.model, self.problem, part, graph=True)))[0]
        return made, longer - plain

    def _step(self, step: int) -> None:
        if not self.contender.asks(step):
            self.optimizer.step()
            return
        batch = part_of(self.problem, step % PARTS)
        self.optimizer.step(objective=cv.Objective.of(self.model, cv.CrossEntropy(axis=-1), [batch]))


def part_of(problem: Problem, part: int) -> tuple[Tensor, Tensor]:
    return problem.inputs.chunk(PARTS)[part], problem.targets.chunk(PARTS)[part]


def gradients_of(module: nn.Module, problem: Problem, part: int | None = None, *, graph: bool = False) -> list[Tensor]:
    """Those of all of the batch, or of a part of it."""
    inputs, targets = (problem.inputs, problem.targets) if part is None else part_of(problem, part)
    with attention(graph):
        loss = MeanCrossEntropy()(module(inputs), targets)
        return list(torch.autograd.grad(loss, list(module.parameters()), create_graph=graph))


def attention(plain: bool) -> AbstractContextManager[Any]:
    """torch's plain attention, or whatever it takes, which has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def state_bytes(optimizer: Any, model: nn.Module) -> int:
    """Those of all tensors that are kept for the next step; views of one storage count once."""
    own = {storage_of(p) for p in model.parameters()}
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if storage_of(value) not in own:
                found[storage_of(value)] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(optimizer.state)
    return sum(found.values())


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
