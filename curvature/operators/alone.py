"""Gradients of the examples of a batch through the whole model: slow, and right for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from curvature.objective.batches import examples
from curvature.objective.function import OutputLoss
from curvature.objective.objective import Objective
from curvature.objective.operations import Bare, Operations
from curvature.objective.params import ParamSpace
from curvature.objective.products import pulled
from curvature.operators.engine import CHUNK, abreast, at_once, budget_of, vmapped
from curvature.operators.followed import Evidence, agree

T = TypeVar("T")
Gradients = Float[Tensor, "examples cotangents n"]

MANY = 64  # gradients that are worth the time to trace one
TRACED: WeakKeyDictionary[nn.Module, dict[Hashable, dict[Hashable, Operations | None]]] = WeakKeyDictionary()


class Alone:
    """The examples of a batch, and the gradients of some parameters for each.

    Examples go through the model alone, where that has the gradient it has in the batch: what belongs to an example,
    and what to all of them, cannot be told from shapes. Of many examples the operations that one comes to are traced,
    once for each model, and are then done for all at once: so they are where the model differentiates inside, which
    vmap cannot follow. Else each goes with the batch, at the cost of all examples: as they all do where a batch is so
    small that the calls are what takes time.
    """

    def __init__(self, objective: Objective, names: Iterable[str], evidence: Evidence) -> None:
        self.objective, self.evidence, self.recorded = objective, evidence, evidence.recorded
        self.params = {name: self.recorded.leaves[name] for name in names}
        self.space = ParamSpace.of(self.params)
        self.budget = budget_of("auto", self.space.device)
        self.chunk, bulk = at_once(objective.check(), self.recorded.batch, self.budget, objective.space)
        self.sources = [self._traced, self._one_by_one] if bulk > 1 else [self._traced]  # until it turns out otherwise

    def squares(self, residuals: Sequence[Tensor]) -> dict[str, Tensor]:
        """The squared gradients by parameter, summed over examples and residuals."""

        def add(total: Tensor, gradients: Float[Tensor, "k n"]) -> Tensor:
            return total + gradients.square().sum(0)

        return self.space.named(self._folded(residuals, add, self._zeros()))

    def gradients(self, residuals: Sequence[Tensor]) -> Float[Tensor, "k b n"]:
        """The gradients, flat, for each residual and example."""
        none: list[Tensor] = []
        return torch.stack(self._folded(residuals, lambda seen, gradients: [*seen, gradients], none), dim=1)

    def _folded(self, residuals: Sequence[Tensor], add: Callable[[T, Tensor], T], start: T) -> T:
        """What `add` makes of the gradients (residuals, n) of one example after another."""
        many = self.recorded.examples * len(residuals) >= MANY
        for source in [source for source in self.sources if many or source != self._traced]:
            total = self._of_examples(source, residuals, add, start)
            if total is not None:
                return total
            self.sources.remove(source)
        return self._in_batch(residuals, add, start)

    def _of_examples(
        self,
        source: Callable[[Float[Tensor, "cotangents ..."]], Iterator[Gradients]],
        residuals: Sequence[Tensor],
        add: Callable[[T, Tensor], T],
        total: T,
    ) -> T | None:
        """From each example alone; None where that fails, or the gradients are not those of the batch."""
        evidence, sent, size, done = self.evidence, self._zeros(), 0.0, 0
        more = [residual for residual in residuals if residual is not evidence.cotangent]
        try:
            for gradients in source(torch.stack([evidence.cotangent, *more])):
                scaled = evidence.factors[done : done + len(gradients), None] * gradients[:, 0]
                done += len(gradients)
                sent += scaled.sum(0)
                size += float(torch.linalg.vector_norm(scaled, dim=1).sum())
                for own in gradients[:, gradients.shape[1] - len(residuals) :]:
                    total = add(total, own)
        except Exception:  # models can raise anything about a batch they do not expect
            return None
        expected = self.space.flatten([evidence.parameters[name] for name in self.params])
        return total if agree(sent, expected, size=size) else None

    def _one_by_one(self, cotangents: Float[Tensor, "cotangents ..."]) -> Iterator[Gradients]:
        """Each example through the model."""
        recorded = self.recorded
        for rows, example in zip(recorded.rows(), examples(recorded.batch, recorded.examples), strict=True):
            outputs = self.objective.outputs(recorded.leaves, example)[0]
            if outputs.shape != recorded.outputs[rows].shape:
                raise ValueError("An example alone has other outputs.")
            yield abreast(partial(self._gradient, outputs), CHUNK, set())(cotangents[:, rows]).unsqueeze(0)

    def _traced(self, cotangents: Float[Tensor, "cotangents ..."]) -> Iterator[Gradients]:
        """As many examples at once as memory allows, by the operations that the gradient of one comes to."""
        count, batch, function = self.recorded.examples, self.recorded.batch, self.objective.function
        assert isinstance(function, OutputLoss)
        tensors = self.objective.complete(self.objective.params)
        each = cotangents.unflatten(1, (count, -1)).movedim(0, 1)  # (examples, cotangents, outputs of one ...)
        point, first = self.space.flatten(list(self.params.values())).detach(), next(examples(batch, count))
        known = TRACED.setdefault(function.module, {}).setdefault((*self.params, self.objective.mode), {})
        operations = Bare(self._pulled_back, known).of(point, (tensors, first, each[0, 0]))
        if operations is None or operations.random:
            raise TypeError("The gradient of an example cannot be traced.")
        leaves, structure = tree_flatten(batch)
        own = [leaf is not one for leaf, one in zip(leaves, tree_leaves(first), strict=True)]

        def of_one(cotangents: Float[Tensor, "cotangents ..."], *its: Tensor) -> Float[Tensor, "cotangents n"]:
            left = iter(its)
            parts = [next(left) if yes else leaf for yes, leaf in zip(own, leaves, strict=True)]
            given = tensors, tree_unflatten(parts, structure)
            return vmapped(lambda cotangent: operations(point, (*given, cotangent)), [cotangents], strict=True)

        every = [each, *(leaf.unsqueeze(1) for yes, leaf in zip(own, leaves, strict=True) if yes)]
        bytes_of_one = each.shape[1] * (self.objective.check().example_bytes + point.nbytes)
        together = int(min(max(self.budget / bytes_of_one, 1), count))
        for some in zip(*(tensor.split(together) for tensor in every), strict=True):
            try:
                gradients = vmapped(of_one, some, strict=True)
            except Exception:  # what vmap cannot do it will not do the next time
                known.update(dict.fromkeys(known))
                raise
            yield gradients

    def _pulled_back(self, point: Float[Tensor, " n"], given: tuple[dict[str, Tensor], Any, Tensor]) -> Gradients:
        """The gradient for a cotangent of the outputs of one example."""
        tensors, example, cotangent = given
        leaves = {name: part.detach().requires_grad_() for name, part in self.space.named(point).items()}
        function = self.objective.function
        outputs = function.outputs({**tensors, **leaves}, example)[0]
        return pulled(self.space, list(leaves.values()), [outputs], [cotangent])

    def _in_batch(self, residuals: Sequence[Tensor], add: Callable[[T, Tensor], T], total: T) -> T:
        """From the whole batch, with the cotangents of a few examples at a time, each apart."""
        stacked, through = torch.stack(list(residuals)), abreast(self._of_batch, self.chunk, set())
        rows = self.recorded.rows()
        for some in (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)):
            cotangents = stacked.new_zeros(len(some), *stacked.shape)
            for apart, own in zip(cotangents, some, strict=True):
                apart[:, own] = stacked[:, own]
            for gradients in through(cotangents.flatten(0, 1)).view(*cotangents.shape[:2], -1):
                total = add(total, gradients)
        return total

    def _of_batch(self, cotangent: Tensor) -> Float[Tensor, " n"]:
        return self._gradient(self.recorded.outputs, cotangent)

    def _gradient(self, outputs: Tensor, cotangent: Tensor) -> Float[Tensor, " n"]:
        return pulled(self.space, list(self.params.values()), [outputs], [cotangent])

    def _zeros(self) -> Float[Tensor, " n"]:
        return torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
