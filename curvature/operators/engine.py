"""How products with a matrix of an objective are computed: engines, which change the cost and never the answer.

Every matrix here is a sum over batches of linear maps, and each is known as a function of one vector that autograd
can run again and again. An engine turns it into a function of a block of vectors, which is kept between products where
that fits into memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
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
from curvature.objective.check import Health
from curvature.objective.objective import Objective
from curvature.objective.params import ParamSpace
from curvature.objective.passes import Passes

Engine = Literal["auto", "retained", "batched", "recomputed", "linearized", "compiled", "forward"]
Memory = float | Literal["auto"]
Linear = Callable[[Tensor], Tensor]  # a vector (n,) -> its product
Build = Callable[[Objective, int, Any], Linear]  # of the batch of that number in a pass
Share = Callable[[Tensor], Tensor]  # rows (k, n) -> the products of each, summed over the terms of a batch

SHARE = 0.25  # of the free memory that graphs may take by default
PATIENCE = 64  # products with one graph until it is linearized: tracing takes as long as some 20 to 60 gradients
CHUNK = 16  # vectors at once, at most
SMALL = {"cpu": 512 << 10, "other": 16 << 20}  # bytes of a tensor that takes about as long as the call that makes it


class Recipe(NamedTuple):
    """The share of one batch in a matrix: by reverse over reverse, and by forward derivatives.

    `spare` says that backward passes compute more than is asked for, so that tracing them saves arithmetic.
    """

    reverse: Build
    forward: Build
    spare: bool = False


class Work(NamedTuple):
    """What an engine makes the share of a batch from.

    `chunk` and `bulk` are what `at_once` says; the engines that come into play add their names to `used`.
    """

    recipe: Recipe
    objective: Objective
    index: int
    batch: Any
    chunk: int
    bulk: float
    used: set[str]

    def reverse(self) -> Linear:
        """The share as a function of one vector, on the graph of reverse over reverse that is built here."""
        return self.recipe.reverse(self.objective, self.index, self.batch)


class ObjectiveOperator(LinearOperator):
    """A symmetric matrix that is an average over the terms of an objective's data; `regularised`, plus l2 I.

    The matrix never changes: parameters, data and random masks are those of the objective it was made from. A product
    with a block of vectors is one pass over the data, which are read only once if what is kept of them fits into
    `memory` bytes. Engines:

    "retained": the graph of reverse over reverse, once a batch, and a backward through it for each vector.
    "batched": the same, with as many vectors at once as fit into `memory`, by torch.vmap.
    "recomputed": the same graph, built again in each pass: least memory. What "retained" is where memory is short.
    "linearized": the backward passes through the retained graph, traced into a plain program without autograd.
    "compiled": that program, compiled by torch.compile.
    "forward": forward over reverse through `torch.func`, as many vectors at once as fit into `memory`.
    "auto": retained; batched where tensors are so small that the calls are what takes time, and one by one again where
        torch cannot; linearized after some products where that saves arithmetic, with convolutions.

    All but "batched" and "forward" send the vectors of a block through the graph one after another: sent together they
    take the same arithmetic and several times the memory, which on CPUs is slower once tensors outgrow the caches
    (benchmarks/operators.py). What "auto" came to use is in `source`.
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
        self.used: set[str] = set()
        self._passes: Passes | None = None

    @property
    def source(self) -> Mapping[str, Any]:
        """The operator, its function and the fingerprints of model and data; how products were computed until now."""
        engine = {"engine": self.engine, "engines": sorted(self.used)}
        return {**source_of(self.name, self.objective), "l2": self.l2, **engine}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        health = self.objective.check()
        if len(rows) == 0:
            return torch.empty_like(rows)
        if self._passes is None:
            held = 0.0 if self.engine in ("recomputed", "forward") else health.example_bytes
            budget = budget_of(self.memory, self.device)
            self._passes = Passes(self.objective, partial(self._share, budget, health), budget=budget, example=held)
        products, terms = self._passes.total(lambda share: share(rows))
        products.div_(terms)
        return products.add_(rows, alpha=self.l2) if self.l2 else products

    def _share(self, budget: float, health: Health, index: int, batch: Any) -> Share:
        chunk, bulk = at_once(health, batch, budget, self.objective.space)
        return ENGINES[self.engine](Work(self.recipe, self.objective, index, batch, chunk, bulk, self.used))


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


def at_once(health: Health, batch: Any, budget: float, space: ParamSpace) -> tuple[int, float]:
    """How many vectors fit into `budget` bytes on their way through the graph of a batch; and how large its tensors and
    the parameters are: up to 1, computing with one takes no longer than calling for it."""
    examples = leading(batch) or 1
    graph = health.example_bytes * examples  # the memory of one vector's backward pass, about
    chunk = int(min(max(budget / graph, 1), CHUNK)) if graph else CHUNK
    small = SMALL.get(space.device.type, SMALL["other"])
    largest = max(shape.numel() for shape in space.shapes) * torch.empty(0, dtype=space.dtype).element_size()
    return chunk, max(health.example_tensor * examples, largest / 2) / small


def source_of(name: str, objective: Objective) -> dict[str, Any]:
    """What an operator of an objective was made from."""
    return {"operator": name, **objective.facts, "rewrites": dict(objective.check().rewrites)}


def _retained(work: Work) -> Share:
    work.used.add("retained")
    return _one_by_one(work.reverse())


def _batched(work: Work) -> Share:
    work.used.add("batched")
    linear = work.reverse()
    return lambda rows: vmapped(linear, [rows], work.chunk)


def _recomputed(work: Work) -> Share:
    work.used.add("recomputed")
    return lambda rows: _one_by_one(work.reverse())(rows)


def _forward(work: Work) -> Share:
    work.used.add("forward")
    return lambda rows: vmapped(work.recipe.forward(work.objective, work.index, work.batch), [rows], work.chunk)


def _linearized(work: Work) -> Share:
    work.used.add("linearized")
    return _one_by_one(_traced(work.reverse(), work.objective))


def _compiled(work: Work) -> Share:
    work.used.add("compiled")
    compiled = torch.compile(_traced(work.reverse(), work.objective))

    def linear(row: Tensor) -> Tensor:
        with torch.compiler.set_stance("default"):  # models run eagerly here, but this is no model
            return compiled(row)

    return _one_by_one(linear)


def _auto(work: Work) -> Share:
    """Retained; linearized when there have been enough products that tracing pays, with convolutions; and batched."""
    linear = work.reverse()
    modules = work.objective.function.module.modules()
    spare = work.recipe.spare and any(isinstance(m, nn.modules.conv._ConvNd) for m in modules)
    through, done = abreast(linear, work.chunk if work.bulk <= 1 else 1, work.used), 0

    def share(rows: Tensor) -> Tensor:
        nonlocal linear, through, done
        if spare and done < PATIENCE <= done + len(rows):
            with suppress(Exception):  # no tracer can follow NumPy, say: what is there is right, and stays
                linear = _traced(linear, work.objective)
                through = abreast(linear, work.chunk if work.bulk <= 2 else 1, work.used)  # fewer tensors are alive
                work.used.add("linearized")
        done += len(rows)
        return through(rows)

    return share


def abreast(linear: Linear, chunk: int, used: set[str]) -> Share:
    """`linear` of rows, so many at once, or one by one from when on that turns out to be beyond torch."""
    together = chunk > 1

    def share(rows: Tensor) -> Tensor:
        nonlocal together
        if together and len(rows) > 1:
            try:
                products = vmapped(linear, [rows], chunk, strict=True)
            except Exception:  # what vmap cannot do, or only in a loop of its own
                together = False
            else:
                used.add("batched")
                return products
        used.add("retained")
        return _one_by_one(linear)(rows)

    return share


ENGINES: dict[Engine, Callable[[Work], Share]] = {
    "auto": _auto,
    "retained": _retained,
    "batched": _batched,
    "recomputed": _recomputed,
    "linearized": _linearized,
    "compiled": _compiled,
    "forward": _forward,
}


def _one_by_one(linear: Linear) -> Share:
    # for one vector a view, not a copy: where products are large, copies are what is left to save
    return lambda rows: linear(rows[0]).unsqueeze(0) if len(rows) == 1 else torch.stack([linear(row) for row in rows])


def vmapped(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    chunk: int | None = None,
    *,
    strict: bool = False,
) -> Tensor:
    """A function of the rows of tensors by vmap, so many at once; `strict` if a loop that vmap makes inside, slower
    than ours, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)  # torch's own use
        warnings.filterwarnings("error" if strict else "ignore", message="There is a performance drop")
        return torch.vmap(function, randomness="same", chunk_size=chunk)(*tensors)


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
