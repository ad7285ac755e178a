"""One pass over the data that sees what goes into the layers of a model and the gradients that come back.

Parameters of layers that are known go by layer; all others, and layers that are used in ways that cannot be followed,
go one example at a time, which is slow and always right.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal, Diagonal
from curvature.objective.batches import moved
from curvature.objective.losses import Likelihood
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes, Sums
from curvature.operators.alone import Alone
from curvature.operators.engine import CHUNK, source_of
from curvature.operators.followed import ALTERED, NEVER, Evidence, Recorded, candidates, collected
from curvature.operators.layers import Inputs, Layer, Unfollowed
from curvature.operators.residuals import Residuals, one_term_each

OTHERS = "others"  # the name of the sums for parameters without a layer
CALLED = "called"  # and of those that count the batches in which a layer was

Each = Callable[[Tensor], Mapping[str, Tensor]]  # the cotangents of a residual -> sums over the batch
Seen = tuple[Mapping[str, Tensor], Each]
See = Callable[[Layer, Inputs], Seen]


class _All(Container[str]):
    def __contains__(self, name: object) -> bool:
        return True


ALL = _All()  # names


class Visitor(Protocol):
    """What sees batches: `layer` a layer and its inputs, and by the function it returns the cotangents of residuals;
    `others` the parameters without a layer, and some residuals."""

    def layer(self, layer: Layer, inputs: Inputs) -> Callable[[Tensor], object]: ...
    def others(self, alone: Alone, residuals: list[Tensor]) -> None: ...


V = TypeVar("V", bound=Visitor)


class Layerwise:
    """The layers of an objective that can be followed, and averages over its data for each of them.

    What is averaged is made of the inputs of the layers and of residuals, pulled back to their outputs: see `kfac`.
    Those of the terms of one example are pulled back at once, or, where the loss is given that they are terms of,
    `apart`. An example is an entry of the outputs, or several of them where the inputs are fewer.

    Every batch shows anew whether its layers can be followed: what they record must give the gradient of their
    parameters, and what comes back to an example must be its own. That batch statistics couple the examples in training
    is overlooked unless the answer is to be `exact`.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        residuals: Residuals | None,
        *,
        apart: Likelihood | None = None,
        exact: bool = False,
        **options: Any,
    ) -> None:
        self.objective, self.residuals, self.apart = objective, residuals, apart
        self.altered = objective.check().altered
        self.layers, self.others = candidates(objective.function.module, objective.params)
        self.drop(self.altered)
        self.unmixed = exact or objective.mode == "eval"
        if not self.unmixed:
            self._survey(objective.in_mode("eval"))
        self.source = {**source_of(name, objective), **options}

    def means(self, see: See, *, again: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Averages over the terms of the data, from one pass.

        By layer and name, of the sums over a batch that `see(layer, inputs)` returns, and of those that the function it
        returns beside them makes of the cotangents of each residual. By parameter, of the `others`: of squared
        gradients of examples, summed over the residuals. Where a batch has a layer that cannot be followed, that goes
        to the others, and the pass begins again. When data are seen `again`, all that is known, and the others are left
        out.
        """
        while True:
            try:
                average = Passes(self.objective, Batch).average(lambda batch: self._sums(see, batch, again))
                by_layer: dict[str, dict[str, Tensor]] = {}
                by_parameter: dict[str, Tensor] = {}
                for (owner, name), mean in average.items():
                    if name == OTHERS:
                        by_parameter[owner] = mean
                    elif name != CALLED:
                        by_layer.setdefault(owner, {})[name] = mean
                if idle := [layer.name for layer in self.layers if (layer.name, CALLED) not in average]:
                    raise Unfollowed(dict.fromkeys(idle, NEVER))
                return {layer.name: by_layer.get(layer.name, {}) for layer in self.layers}, by_parameter
            except Unfollowed as error:
                self.drop(error.reasons)

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Leave the parameters of these layers to the others; those of altered layers from now on."""
        self.altered |= {name: reason for name, reason in reasons.items() if reason == ALTERED}
        for layer in self.layers:
            if layer.name in reasons:
                self.others |= dict.fromkeys(layer.params, reasons[layer.name])
        self.layers = [layer for layer in self.layers if layer.name not in reasons]
        vars(self).pop("places", None)

    def _survey(self, objective: Objective) -> None:
        """Drop the layers that cannot be followed in the first batch: what is coupled in evaluation is by the model."""
        batch = moved(objective.batches.of_several(), objective.space.device, objective.space.dtype)
        reasons: dict[str, str] = {}
        with objective.context(), objective.randomness():
            recorded = Recorded(objective, self.layers, batch)
            evidence = Evidence(recorded, [], objective.seed)
            for layer in self.layers:
                with collected(reasons):
                    evidence.accept(layer, recorded.inputs(layer), unmixed=True)
        self.drop(reasons)

    def shown(self, batch: Batch, start: Callable[[], V], only: Container[str] = ALL) -> tuple[V, int, int]:
        """A visitor that has seen the batch, made again where a layer turned out to belong to the others; the numbers
        of residuals and examples."""
        while True:
            visitor = start()
            try:
                return visitor, *self.visit(batch, visitor.layer, visitor.others, only=only)
            except Unfollowed as error:
                self.drop(error.reasons)

    def visit(
        self,
        batch: Batch,
        layers: Callable[[Layer, Inputs], Callable[[Tensor], object]],
        others: Callable[[Alone, list[Tensor]], object],
        *,
        only: Container[str] = ALL,
        again: bool = False,
    ) -> tuple[int, int]:
        """Show a batch: every layer and its inputs to `layers`, and to the function it returns the cotangents of each
        residual; the other parameters, in chunks of residuals, to `others`. Of `only` the layers and parameters of
        these names.

        Returns the numbers of residuals and examples. Unfollowed where a layer cannot be.
        """
        wanted = [layer for layer in self.layers if layer.name in only]
        rest = [name for name in self.others if name in only]
        recorded = Recorded(self.objective, wanted, batch.content)
        residuals = self._residuals(batch.index, recorded)
        some = list(islice(residuals, CHUNK))
        evidence = None
        if not again and (some or batch.index == 0):  # without residuals there is little that could change
            evidence = Evidence(recorded, some, self.objective.seed)
        seen, reasons = {}, {}
        for layer in wanted:
            with collected(reasons):
                inputs = recorded.inputs(layer)
                if evidence is not None:
                    evidence.accept(layer, inputs, unmixed=self.unmixed)
                if inputs is not None:  # else it was not needed for this batch
                    seen[layer] = layers(layer, inputs)
        if reasons:
            raise Unfollowed(reasons)
        alone = Alone(self.objective, rest, evidence) if evidence is not None and rest else None
        known = evidence.together if evidence is not None and some and some[0] is evidence.cotangent else None
        del evidence  # gradients of all that layers returned
        count = 0
        while some:
            count += len(some)
            for residual in some:
                gradients, known = known or recorded.backward(residual), None
                for layer, each in seen.items():
                    each(recorded.cotangents(layer, gradients))
            if alone is not None:
                others(alone, some)
            some = list(islice(residuals, CHUNK))
        return count, recorded.examples

    def _sums(self, see: See, batch: Batch, again: bool) -> Sums:
        """The sums over a batch, by layer or parameter, and name."""
        sums = Sums()

        def add(owner: str, tensors: Mapping[str, Tensor]) -> None:
            nonlocal sums
            sums += Sums({(owner, name): tensor for name, tensor in tensors.items()})

        def of_layer(layer: Layer, inputs: Inputs) -> Callable[[Tensor], None]:
            once, each = see(layer, inputs)
            add(layer.name, {CALLED: torch.ones(()), **once})
            return lambda cotangents: add(layer.name, each(cotangents))

        def of_others(alone: Alone, residuals: list[Tensor]) -> None:
            for name, square in alone.squares(residuals).items():
                add(name, {OTHERS: square})

        self.visit(batch, of_layer, of_others, again=again)
        return sums

    def _residuals(self, index: int, recorded: Recorded) -> Iterator[Tensor]:
        if self.residuals is None:
            return iter(())
        outputs, targets = recorded.outputs.detach(), recorded.targets
        residuals = self.residuals(index, outputs, targets)
        if self.apart is None:
            return residuals
        return one_term_each(residuals, self.apart, outputs, targets, recorded.examples)

    @cached_property
    def places(self) -> dict[str, Tensor]:
        """The indices of the matrices of every layer, and of the entries of each of the others, in flat vectors."""
        space = self.objective.space
        index = space.named(torch.arange(space.size, device=space.device))
        places = {layer.name: layer.arranged(index).reshape(-1) for layer in self.layers}
        return places | {name: index[name].reshape(-1) for name in self.others}

    def places_of(self, alone: Alone) -> Tensor:
        """The indices in flat vectors of the parameters that have no layer, in the order in which `alone` has them."""
        return torch.cat([self.places[name] for name in alone.params])

    def assembled(
        self, blocks: Mapping[str, LinearOperator], squares: Mapping[str, Tensor], **options: Any
    ) -> BlockDiagonal:
        """The blocks of the layers, and for each other parameter a diagonal: the identity without residuals."""
        params = self.objective.params
        rest = {name: Diagonal(squares.get(name, torch.ones_like(params[name])).reshape(-1)) for name in self.others}
        source = {**self.source, **options, "diagonal": self.others}
        return BlockDiagonal({**blocks, **rest}, self.places, self.objective.space, source=source)


class Batch(NamedTuple):
    """A batch, and its number in the pass."""

    index: int
    content: Any
