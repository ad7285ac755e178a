"""How products with a matrix of an objective are computed: engines, which change the cost and never the answer.

Every matrix here is a sum over batches of linear maps, and each is known as a function of one vector that autograd
can run again and again. An engine turns it into a function of a block of vectors, which is kept between products where
that fits into memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from curvature.linalg.memory import free_bytes
from curvature.linalg.operator import LinearOperator
from curvature.objective.batches import leading
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes

Engine = Literal["auto", "retained", "recomputed", "linearized", "compiled", "forward"]
Memory = float | Literal["auto"]
Linear = Callable[[Tensor], Tensor]  # a vector (n,) -> its product
Build = Callable[[Objective, int, Any], Linear]  # of the batch of that number in a pass
Share = Callable[[Tensor], Tensor]  # rows (k, n) -> the products of each, summed over the terms of a batch

SHARE = 0.25  # of the free memory that graphs may take by default
PATIENCE = 64  # products with one graph until it is linearized: tracing takes as long as some 20 to 60 gradients
CHUNK = 16  # vectors at once, at most


class Recipe(NamedTuple):
    """The share of one batch in a matrix: by reverse over reverse, and by forward derivatives.

    `spare` says that backward passes compute more than is asked for, so that tracing them saves arithmetic.
    """

    reverse: Build
    forward: Build
    spare: bool = False


class ObjectiveOperator(LinearOperator):
    """A symmetric matrix that is an average over the terms of an objective's data; `regularised`, plus l2 I.

    The matrix never changes: parameters, data and random masks are those of the objective it was made from. A product
    with a block of vectors is one pass over the data, which are read only once if what is kept of them fits into
    `memory` bytes. Engines:

    "retained": the graph of reverse over reverse, once a batch, and a backward through it for each vector.
    "recomputed": the same graph, built again in each pass: least memory. What "retained" is where memory is short.
    "linearized": the backward passes through the retained graph, traced into a plain program without autograd.
    "compiled": that program, compiled by torch.compile.
    "forward": forward over reverse through `torch.func`, as many vectors at once as fit into `memory`.
    "auto": retained; linearized after some products where that saves arithmetic, with convolutions.

    All but "forward" send the vectors of a block through the graph one after another. Batched forms of the same
    backward passes take the same arithmetic and several times the memory, and on CPUs were never faster
    (benchmarks/operators.py).
    """

    symmetric = True

    def __init__(
        self,
        name: str,
        objective: Objective,
        recipe: Recipe,
        *,
        psd: bool = False,
        regularised: bool = False,
        engine: Engine = "auto",
        memory: Memory = "auto",
    ) -> None:
        need_objective(name, objective)
        if engine not in ENGINES:
            raise ValueError(f"engine is one of {', '.join(ENGINES)}, but got {engine!r}.")
        self.name, self.objective, self.recipe, self.psd = name, objective, recipe, psd
        self.l2 = objective.l2 if regularised else 0.0
        self.engine: Engine = engine
        self.memory: Memory = memory
        self.domain = self.codomain = objective.space
        self.meter = objective.meter
        self._passes: Passes | None = None

    @property
    def source(self) -> Mapping[str, Any]:
        """The operator, its function and the fingerprints of model and data."""
        return {**source_of(self.name, self.objective), "l2": self.l2, "engine": self.engine}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        example = self.objective.check().example_bytes
        if self._passes is None:
            held = 0.0 if self.engine in ("recomputed", "forward") else example
            budget = budget_of(self.memory, self.device)
            self._passes = Passes(self.objective, partial(self._share, budget, example), budget=budget, example=held)
        products, terms = self._passes.total(lambda share: share(rows))
        products.div_(terms)
        return products.add_(rows, alpha=self.l2) if self.l2 else products

    def _share(self, budget: float, example: float, index: int, batch: Any) -> Share:
        graph = example * (leading(batch) or 1)  # the memory of one vector's backward pass, about
        chunk = int(min(max(budget / graph, 1), CHUNK)) if graph else CHUNK
        return ENGINES[self.engine](self.recipe, self.objective, index, batch, chunk)


def need_objective(name: str, objective: object) -> None:
    """TypeError for the arguments of other libraries, with how to write it here."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{name} takes an Objective, but got a {type(objective).__name__}. "
            f"Write {name}(Objective.of(model, loss, data))."
        )


def budget_of(memory: Memory, device: torch.device) -> float:
    """The bytes that what is kept of the data may take."""
    return SHARE * (free_bytes(device) or 0) if memory == "auto" else memory


def source_of(name: str, objective: Objective) -> dict[str, Any]:
    """What an operator of an objective was made from."""
    return {
        "operator": name,
        "model": type(objective.function.module).__name__,
        "loss": objective.function.name,
        "mode": objective.mode,
        "parameters": objective.space.size,
        "fingerprint": objective.fingerprint,
        "rewrites": dict(objective.check().rewrites),
    }


def _retained(recipe: Recipe, objective: Objective, index: int, batch: Any, chunk: int) -> Share:
    return _one_by_one(recipe.reverse(objective, index, batch))


def _recomputed(recipe: Recipe, objective: Objective, index: int, batch: Any, chunk: int) -> Share:
    return lambda rows: _one_by_one(recipe.reverse(objective, index, batch))(rows)


def _forward(recipe: Recipe, objective: Objective, index: int, batch: Any, chunk: int) -> Share:
    return lambda rows: _together(recipe.forward(objective, index, batch), rows, chunk)


def _linearized(recipe: Recipe, objective: Objective, index: int, batch: Any, chunk: int) -> Share:
    return _one_by_one(_traced(recipe.reverse(objective, index, batch), objective))


def _compiled(recipe: Recipe, objective: Objective, index: int, batch: Any, chunk: int) -> Share:
    compiled = torch.compile(_traced(recipe.reverse(objective, index, batch), objective))

    def linear(row: Tensor) -> Tensor:
        with torch.compiler.set_stance("default"):  # models run eagerly here, but this is no model
            return compiled(row)

    return _one_by_one(linear)


def _auto(recipe: Recipe, objective: Objective, index: int, batch: Any, chunk: int) -> Share:
    """Retained, until there have been enough products that tracing pays: with convolutions."""
    linear = recipe.reverse(objective, index, batch)
    spare = recipe.spare and any(isinstance(m, nn.modules.conv._ConvNd) for m in objective.function.module.modules())
    done = 0

    def share(rows: Tensor) -> Tensor:
        nonlocal linear, done
        if spare and done < PATIENCE <= done + len(rows):
            with suppress(Exception):  # no tracer can follow NumPy, say: what is there is right, and stays
                linear = _traced(linear, objective)
        done += len(rows)
        return _one_by_one(linear)(rows)

    return share


ENGINES: dict[Engine, Callable[[Recipe, Objective, int, Any, int], Share]] = {
    "auto": _auto,
    "retained": _retained,
    "recomputed": _recomputed,
    "linearized": _linearized,
    "compiled": _compiled,
    "forward": _forward,
}


def _one_by_one(linear: Linear) -> Share:
    # for one vector a view, not a copy: where products are large, copies are what is left to save
    return lambda rows: linear(rows[0]).unsqueeze(0) if len(rows) == 1 else torch.stack([linear(row) for row in rows])


def _together(linear: Linear, rows: Tensor, chunk: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)  # torch's own use
        return torch.vmap(linear, randomness="same", chunk_size=chunk)(rows)


def _traced(linear: Linear, objective: Objective) -> Linear:
    """The operations that `linear` does, as a program without autograd; what its result does not need is left out.

    The graph's tensors are constants of the program. Backward passes compute all derivatives of a convolution if they
    need one: here only the needed ones are left, which halves the cost of a Jacobian-vector product.
    """
    space = objective.space
    program = make_fx(linear)(torch.zeros(space.size, dtype=space.dtype, device=space.device))
    program.graph.eliminate_dead_code()
    program.recompile()

    def traced(vector: Tensor) -> Tensor:
        with torch.no_grad():
            return program(vector)

    return traced
