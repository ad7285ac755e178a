"""How much of a loss at many points is computed together: batches of examples, and points.

Calls take time, and so do tensors that no cache holds: what goes together are so many examples, then so many points,
that the largest tensor is neither small nor large. What goes together is never timed, so that the same question has the
same answer to the last bit; and what comes out is compared with the loss of each batch and point by itself, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvature.objective.batches import leading, moved
from curvature.objective.objective import Objective
from curvature.objective.operations import Bare, Program
from curvature.objective.passes import Passes
from curvature.operators.engine import SMALL, budget_of, vmapped
from curvature.probes.programs import Settling, fused, generic

Share = Callable[[Tensor], Tensor]  # points (k, n) -> (k, s), in float64

TOGETHER = 4  # times as large as SMALL: the largest tensors of batches made one, and of points together
FEW = 16  # examples, of which a batch is made at least: processors share the work of so many
PATIENCE = 128  # calls for one point until they are traced
STACKED = 32  # and calls for several, of which each takes vmap as long as four
ROOM = 16 << 20  # bytes: several times what TOGETHER allows a tensor


def resized(objective: Objective, program: Program) -> Objective:
    """The same function of the same data in batches in which tensors are as large as is fast.

    The objective itself where they are; in "train" mode, whose normalisations see batches; where batches would be of
    few examples, and tensors are large for another reason; and where batches do not fit together, or make another value
    when they are others: a model may couple its examples.
    """
    first = objective.batches.of_several()
    length = leading(first)
    if objective.mode == "train" or not length:
        return objective
    point = generic(objective)

    def largest(objective: Objective) -> int:
        def of_batch(batch: Any) -> int:
            with Sizes() as sizes:
                program(point, batch)
            return sizes.largest

        return max(Passes(objective).each(of_batch), default=0)

    def total(objective: Objective) -> tuple[Tensor, float]:
        return Passes(objective).total(lambda batch: program(point, batch).detach().double())

    most, size = bound(objective), largest(objective.first(length))
    if not size:  # of a batch without terms
        return objective
    examples = length * (most // size) if size <= most else -(-length // -(-size // most))
    if examples < 2 * length and not FEW <= examples < length:
        return objective
    change = _joined if examples > length else _cut
    some = objective.first(max(examples, length))
    with suppress(Exception):  # models and losses can raise anything
        (apart, terms), (one, same) = total(some), total(change(some, examples))
        fits = examples > length or largest(change(some, examples)) <= most
        if fits and terms == same and alike(one, apart, objective.space.dtype):
            return change(objective, examples)
    return objective


class Together:
    """What a program makes of all data of an objective, at many points.

    Many points at once where torch can, with the program as it is written or else as its operations; one by one where
    tensors are large, and where layers are slow with several weights at once.
    """

    def __init__(self, objective: Objective, program: Program) -> None:
        self.objective, self.program = resized(objective, program), program
        self.stacked = [Settling(self.objective, _stacked(each), STACKED) for each in (program, Bare(program))]
        self.single = Settling(self.objective, _single(fused(program)), PATIENCE)
        self.passes = Passes(self.objective, self._share, budget=budget_of("auto", objective.space.device))
        _keep_memory(objective.space.device)

    def __call__(self, rows: Float[Tensor, "k n"]) -> tuple[Float[Tensor, "k s"], float]:
        """The sums over all terms at each point, in float64, and the number of terms."""
        return self.passes.total(lambda share: share(rows))

    def expect(self, count: int) -> None:
        """So many points are to come."""
        for settling in (*self.stacked, self.single):
            settling.ahead = count

    def _share(self, index: int, batch: Any) -> Share:
        """That of a batch."""
        point = generic(self.objective)
        with Sizes() as sizes, self.objective.randomness(index):
            alone = self.program(point, batch).detach()
        most = bound(self.objective) // max(1, sizes.largest)
        if most > 1 and not sizes.slow:
            for settling in self.stacked:
                with suppress(Exception), self.objective.randomness(index):  # what neither vmap nor the tracer can do
                    if alike(settling.program(point[None], batch)[0], alone, self.objective.space.dtype):
                        return _by_parts(settling.on(index, batch), most)
        return _by_parts(self.single.on(index, batch), 1)


def _keep_memory(device: torch.device) -> None:
    """Have one large tensor come and go.

    glibc gives the memory of a tensor back to the system and takes it again, page by page, for the next one, which is
    a sixth of the time, until larger ones have been freed (M_MMAP_THRESHOLD in mallopt(3)).
    """
    if device.type == "cpu":
        torch.empty(ROOM, dtype=torch.uint8)


def _stacked(program: Program) -> Program:
    return lambda rows, batch: vmapped(lambda row: program(row, batch), [rows], strict=True)


def _single(program: Program) -> Program:
    return lambda rows, batch: program(rows[0], batch).unsqueeze(0)


def _by_parts(compute: Callable[[Tensor], Tensor], most: int) -> Share:
    """So many points at once at most; the last of equal parts is filled up with its last point, so that operations are
    those of the others."""

    def share(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k s"]:
        size = -(-len(rows) // -(-len(rows) // most))
        short = -len(rows) % size
        full = torch.cat([rows, rows[-1:].expand(short, -1)]) if short else rows
        return torch.cat([compute(some) for some in full.split(size)])[: len(rows)].double()

    return share


def bound(objective: Objective) -> int:
    """How many bytes the largest tensor may have."""
    return TOGETHER * SMALL.get(objective.space.device.type, SMALL["other"])


def alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by rounding at most, and in the same places are not finite."""
    return torch.allclose(one, other, rtol=torch.finfo(dtype).eps ** 0.5, atol=0, equal_nan=True)


def _cut(objective: Objective, examples: int) -> Objective:
    return replace(objective, batches=objective.batches.at_most(examples))


def _joined(objective: Objective, examples: int) -> Objective:
    batches, space = objective.batches, objective.space
    return replace(objective, batches=replace(batches, source=_Joined(batches, examples, space.device, space.dtype)))


@dataclass(frozen=True)
class _Joined:
    """Batches in a row made one, up to so many examples, as long as all they hold are tensors of examples, of one
    kind."""

    batches: Iterable[Any]
    examples: int
    device: torch.device
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Any]:
        group: list[Any] = []
        room = self.examples
        for given in self.batches:
            batch = moved(given, self.device, self.dtype)
            length = leading(batch) or 1
            if group and (length > room or _kind(batch) != _kind(group[0])):
                yield _joint(group)
                group, room = [], self.examples
            group.append(batch)
            room -= length
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


class Sizes(TorchDispatchMode):
    """Sees how many bytes the largest tensor has that is made, and whether there are operations that are slow, or a
    loop, with several weights at once: convolutions and fused recurrent layers."""

    largest = 0
    slow = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:  # data that are copied are the same at all points
            return result
        self.slow |= any(name in str(func) for name in ("convolution", "rnn", "lstm", "gru"))
        made = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() * t.element_size() for t in made)])
        return result
