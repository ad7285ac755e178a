"""How much of a loss at many points is computed together: batches of examples, and points.

Calls take time, and so do tensors that no cache holds: what goes together are so many examples, then so many points,
that the largest tensor is neither small nor large. What goes together is never timed, so that the same question has the
same answer to the last bit; and what comes out is compared with the loss of each batch and point by itself, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvature.objective.batches import leading, moved
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.operators.engine import SMALL, vmapped

T = TypeVar("T")
Program = Callable[[Tensor], Tensor]  # a point (n,) -> sums over the terms of a batch, (s,)
Share = Callable[[Tensor], Tensor]  # points (k, n) -> (k, s), in float64
Programs = Callable[[Objective, Any], Program]  # of a batch

TOGETHER = 4  # times as large as SMALL: the largest tensors of batches made one, and of points together
PATIENCE = 1024  # points one by one until their operations are traced: by then their layers took as long as tracing


def joined(objective: Objective, programs: Programs) -> Objective:
    """The same function of the same data in fewer batches, in which tensors are as large as is fast.

    The objective itself where a batch is that large, in "train" mode, whose normalisations see batches, and where the
    batches do not fit together, or make another value when they do: a model may couple its examples.
    """
    first = objective.batches.of_several()
    length = leading(first)
    if objective.mode == "train" or not length:
        return objective
    point = generic(objective)

    def largest(batch: Any) -> int:
        with Sizes() as sizes:
            programs(objective, batch)(point)
        return sizes.largest

    sizes = Passes(objective.first(length)).each(largest)
    count = bound(objective) // max(sizes) if any(sizes) else 1
    if count < 2:
        return objective
    some = objective.first(count * length)

    def total(objective: Objective) -> tuple[Tensor, float]:
        return Passes(objective).total(lambda batch: programs(objective, batch)(point).detach().double())

    with suppress(Exception):  # models and losses can raise anything
        (apart, terms), (one, same) = total(some), total(_fewer(some, count))
        if terms == same and alike(one, apart, objective.space.dtype):
            return _fewer(objective, count)
    return objective


def fastest(objective: Objective, index: int, program: Program) -> Share:
    """Many points at once where torch can, with the program as it is written or else without its autograd; one by one
    where convolutions would have several weights at once, which is slow."""
    point = generic(objective)
    with Sizes() as sizes, objective.randomness(index):
        alone = program(point).detach()
    most = bound(objective) // max(1, sizes.largest)
    if most > 1 and not sizes.convolutions:
        for make in (lambda: program, lambda: traced(program, objective.position)):
            with suppress(Exception), objective.randomness(index):  # what neither vmap nor the tracer can do
                stacked = partial(_stacked, make())
                if alike(stacked(point[None])[0], alone, objective.space.dtype):
                    return _by_parts(objective, index, stacked, most)
    return _by_parts(objective, index, _Settling(objective, index, fused(program)), 1)


def one_by_one(objective: Objective, index: int, program: Program) -> Share:
    return _by_parts(objective, index, lambda rows: program(rows[0]).unsqueeze(0), 1)


def traced(program: Program, row: Float[Tensor, " n"]) -> Program:
    """The operations that the program does, without its layers and its autograd."""
    with _NothingRead():
        return make_fx(program)(row)


def fused(program: Program) -> Program:
    """The same with torch's own batch normalisation."""

    def fast(row: Float[Tensor, " n"]) -> Float[Tensor, " s"]:
        with _OwnNormalisation():
            return program(row)

    return fast


def _stacked(program: Program, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k s"]:
    return vmapped(program, rows, len(rows), strict=True)


@dataclass
class _Settling:
    """A program of one point, and after PATIENCE points the operations that it comes to, if they make the same bits: in
    small networks the layers' own code takes as long."""

    objective: Objective
    index: int
    program: Program
    done: int = 0

    def __call__(self, rows: Float[Tensor, "1 n"]) -> Float[Tensor, "1 s"]:
        self.done += 1
        if self.done == PATIENCE:
            with suppress(Exception):  # no tracer can follow everything
                operations = self._fresh(lambda row: traced(self.program, row), self.objective.position)
                point = generic(self.objective)
                if torch.equal(self._fresh(operations, point), self._fresh(self.program, point)):
                    self.program = operations
        return self.program(rows[0]).unsqueeze(0)

    def _fresh(self, function: Callable[[Tensor], T], row: Float[Tensor, " n"]) -> T:
        """`function(row)` from the random state of the batch."""
        with self.objective.randomness(self.index):
            return function(row)


def _by_parts(objective: Objective, index: int, compute: Callable[[Tensor], Tensor], most: int) -> Share:
    """So many points at once, as evenly as can be, each part from the random state of the batch."""

    def share(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k s"]:
        found = []
        for some in rows.tensor_split(-(-len(rows) // most)):
            with objective.randomness(index):
                found.append(compute(some).detach().double())
        return torch.cat(found)

    return share


def generic(objective: Objective) -> Float[Tensor, " n"]:
    """A point near the parameters where nothing cancels: there the same value means the same function."""
    (signs,) = objective.space.draw(1, seed=0)
    return objective.position + 0.01 * signs


def bound(objective: Objective) -> int:
    """How many bytes the largest tensor may have."""
    return TOGETHER * SMALL.get(objective.space.device.type, SMALL["other"])


def alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by rounding at most, and in the same places are not finite."""
    return torch.allclose(one, other, rtol=torch.finfo(dtype).eps ** 0.5, atol=0, equal_nan=True)


def _fewer(objective: Objective, count: int) -> Objective:
    batches, space = objective.batches, objective.space
    return replace(objective, batches=replace(batches, source=_Joined(batches, count, space.device, space.dtype)))


@dataclass(frozen=True)
class _Joined:
    """Batches with up to `count` in a row made one, as long as all they hold are tensors of examples, of one kind."""

    batches: Iterable[Any]
    count: int
    device: torch.device
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Any]:
        group: list[Any] = []
        for given in self.batches:
            batch = moved(given, self.device, self.dtype)
            if group and (len(group) == self.count or _kind(batch) != _kind(group[0])):
                yield _joint(group)
                group = []
            group.append(batch)
        if group:
            yield _joint(group)


def _kind(batch: Any) -> Any:
    """What batches have in common that can be made one; of others, themselves."""
    parts, structure = tree_flatten(batch)
    if all(isinstance(part, Tensor) and part.ndim for part in parts):
        return structure, [(part.shape[1:], part.dtype, part.layout) for part in parts]
    return id(batch)


def _joint(group: list[Any]) -> Any:
    if len(group) == 1:
        return group[0]
    parts, structures = zip(*map(tree_flatten, group), strict=True)
    return tree_unflatten([torch.cat(column) for column in zip(*parts, strict=True)], structures[0])


class _NothingRead(TorchFunctionMode):
    """Refuses what would tell a program its numbers behind the tracer's back, which takes them for constants."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__):
            raise TypeError(f"{function.__name__} cannot be traced.")
        return function(*args, **(kwargs or {}))


class _OwnNormalisation(TorchFunctionMode):
    """Batch normalisation by torch's kernel, which is fast where no second derivative is taken."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            with torch._C.DisableTorchFunction():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """Sees how many bytes the largest tensor has that is made, and whether there are convolutions."""

    largest = 0
    convolutions = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:  # data that are copied are the same at all points
            return result
        self.convolutions |= "convolution" in str(func)
        made = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() * t.element_size() for t in made)])
        return result
