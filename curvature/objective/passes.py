"""Passes over the data: the only loop over batches, and what is kept of them between passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from curvature.distributed import place, summed
from curvature.errors import BadObjective
from curvature.objective.batches import bytes_of, leading, moved
from curvature.objective.check import explained

if TYPE_CHECKING:
    from curvature.objective.objective import Objective

T = TypeVar("T")
Prepare = Callable[[int, Any], Any]  # number and batch -> what a pass computes from: the batch itself, or a graph


ALONE = "alone"  # the name of a tensor that is summed by itself


class Part(NamedTuple):
    """A batch that was prepared, and how many terms it has."""

    prepared: Any
    terms: float


class Sums(dict[Any, Tensor]):
    """Tensors by name that are summed together."""

    def __add__(self, other: Sums) -> Sums:
        """The sums of both, in place where there is one already."""
        for name, tensor in other.items():
            self[name] = self[name].add_(tensor) if name in self else tensor
        return self

    def __truediv__(self, number: float) -> Sums:
        return Sums({name: tensor / number for name, tensor in self.items()})


S = TypeVar("S", Tensor, Sums)


class Passes:
    """Passes over the data of an objective, each batch prepared by `prepare` in the state models are called in.

    What the first pass has prepared is kept, and the data not read again, if all of it is expected to fit into `budget`
    bytes: the batches, and `example` bytes for each example; else every pass reads and prepares them anew, one by one.
    """

    def __init__(
        self,
        objective: Objective,
        prepare: Prepare = lambda index, batch: batch,
        *,
        budget: float = 0,
        example: float = 0,
    ) -> None:
        self.objective, self.prepare = objective, prepare
        self.budget, self.example = budget, example
        self.kept: list[Part] | None = None
        self.keeping = budget > 0  # until something does not fit

    def average(self, term: Callable[[Any], S]) -> S:
        """The sum of `term(prepared)` over the batches divided by the number of terms."""
        total, weight = self.total(term)
        return total / weight

    def total(self, term: Callable[[Any], S]) -> tuple[S, float]:
        """The sum of `term(prepared)` over the batches, and the number of terms."""
        total: S | None = None
        weight = 0.0

        def add(value: S, terms: float) -> None:
            nonlocal total, weight
            total, weight = value if total is None else total + value, weight + terms

        self._run(term, add)
        if self.objective.group is not None:
            total, weight = self._joined(total, weight)
        if total is None:
            raise BadObjective(
                "The data has no terms: no batch came, or every target is ignored.",
                "Check the path and the filters.",
            )
        return total, weight

    def _joined(self, total: S | None, weight: float) -> tuple[Any, float]:
        """A total and the number of its terms over all processes."""
        group, device = self.objective.group, self.objective.space.device
        own: dict[Any, Tensor] = {} if total is None else total if isinstance(total, Sums) else {ALONE: total}
        sums = summed(own, device, group)
        terms = summed({ALONE: torch.tensor(weight, dtype=torch.float64, device=device)}, device, group)
        return (sums.get(ALONE, Sums(sums)) if sums else None), float(terms[ALONE])

    def each(self, term: Callable[[Any], T]) -> list[T]:
        """`term(prepared)` for every batch."""
        values: list[T] = []
        self._run(term, lambda value, terms: values.append(value))
        return values

    def _run(self, term: Callable[[Any], T], take: Callable[[T, float], None]) -> None:
        """Hand the value and the number of terms of every batch that has terms to `take`."""
        objective, kept = self.objective, self.kept
        fresh: list[Part] = []
        size = 0.0
        rank, processes = place(objective.group)
        with objective.context():
            for index, item in enumerate(objective.batches if kept is None else kept):
                try:
                    with objective.randomness(index * processes + rank):  # its number among those of all processes
                        part = self._part(index, item) if kept is None else item
                        if part.terms:
                            take(term(part.prepared), part.terms)
                except Exception as error:  # models and losses can raise anything
                    raise explained(error, index + 1) from error
                if kept is None and self.keeping:
                    size += bytes_of(item) + self.example * (leading(item) or 1)
                    self.keeping = size <= self.budget
                    fresh.append(part)
                    if not self.keeping:
                        fresh.clear()
                del part  # its graph, before the next one is built
        if kept is None and self.keeping:
            self.kept = fresh
        objective.meter.passes += 1

    def _part(self, index: int, batch: Any) -> Part:
        objective = self.objective
        batch = moved(batch, objective.space.device, objective.space.dtype)
        terms = objective.function.weight(batch)
        return Part(self.prepare(index, batch) if terms else None, terms)  # a mean over no terms is not a number
