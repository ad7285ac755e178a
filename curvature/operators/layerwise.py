"""One pass over the data that sees what goes into the layers of a model and the gradients that come back.

Parameters of layers that are known go by layer; all others, and layers that are used in ways that cannot be followed,
go one example at a time, which is slow and always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal, Diagonal
from curvature.objective.batches import moved
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes, Sums
from curvature.operators.alone import Alone
from curvature.operators.engine import CHUNK, need_objective, source_of
from curvature.operators.followed import NEVER, Evidence, Recorded, candidates, collected
from curvature.operators.layers import Inputs, Layer, Unfollowed
from curvature.operators.residuals import FisherKind, Residuals, Signed, likelihood, one_term_each, residuals_of

OTHERS = "others"  # the name of the sums for parameters without a layer
CALLED = "called"  # and of those that count the batches in which a layer was

Each = Callable[[Tensor], Mapping[str, Tensor]]  # the cotangents of a residual -> sums over the batch
Seen = tuple[Mapping[str, Tensor], Each]
See = Callable[[Layer, Inputs], Seen]


class Layerwise:
    """The layers of an objective that can be followed, and averages over its data for each of them.

    What is averaged is made of the inputs of the layers and of residuals, pulled back to their outputs: see `kfac`.
    Those of the terms of one example are pulled back at once with random signs, or, where an `exact` answer is asked
    for, apart. An example is an entry of the outputs, or several of them where the inputs are fewer.

    Every batch shows anew whether its layers can be followed: what they record must give the gradient of their
    parameters, and what comes back to an example must be its own. That batch statistics couple the examples in training
    is overlooked unless the answer is to be `exact`.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        fisher: FisherKind | None,
        *,
        samples: int = 1,
        seed: int = 0,
        exact: bool = False,
    ) -> None:
        need_objective(name, objective)
        self.objective = objective
        self.apart = exact and fisher != "sampled"  # whose signs are random by themselves
        self.residuals: Residuals | None = None
        if fisher is not None:
            self.loss = likelihood(objective, name)
            self.residuals = residuals_of(objective, name, fisher, samples=samples, seed=seed)
            if fisher != "sampled" and not exact:
                self.residuals = Signed(self.residuals, self.loss, seed)
        objective.check()
        self.layers, self.others = candidates(objective)
        self.unmixed = exact or objective.mode == "eval"
        if not self.unmixed:
            self._survey(objective.in_mode("eval"))
        options = {"fisher": fisher, "samples": samples, "seed": seed}
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
                average = Passes(self.objective, _Batch).average(lambda batch: self._sums(see, batch, again))
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
        """Leave the parameters of these layers to the others."""
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

    def _sums(self, see: See, batch: _Batch, again: bool) -> Sums:
        """The sums over a batch, by layer or parameter, and name."""
        recorded = Recorded(self.objective, self.layers, batch.content)
        residuals = self._residuals(batch.index, recorded)
        some = list(islice(residuals, CHUNK))
        evidence = None
        if not again and (some or batch.index == 0):  # without residuals there is little that could change
            evidence = Evidence(recorded, some, self.objective.seed)
        sums, seen, reasons = Sums(), {}, {}
        for layer in self.layers:
            with collected(reasons):
                inputs = recorded.inputs(layer)
                if evidence is not None:
                    evidence.accept(layer, inputs, unmixed=self.unmixed)
                if inputs is not None:  # else it was not needed for this batch
                    once, seen[layer] = see(layer, inputs)
                    sums += _owned(layer.name, {CALLED: torch.ones(()), **once})
        if reasons:
            raise Unfollowed(reasons)
        alone = Alone(self.objective, self.others, evidence) if evidence is not None and self.others else None
        while some:
            for residual in some:
                if evidence is not None and residual is evidence.cotangent:
                    gradients = evidence.together
                else:
                    gradients = recorded.backward(residual)
                for layer, each in seen.items():
                    sums += _owned(layer.name, each(recorded.cotangents(layer, gradients)))
            if alone is not None:
                sums += Sums({(name, OTHERS): square for name, square in alone.squares(some).items()})
            some = list(islice(residuals, CHUNK))
        return sums

    def _residuals(self, index: int, recorded: Recorded) -> Iterator[Tensor]:
        if self.residuals is None:
            return iter(())
        outputs, targets = recorded.outputs.detach(), recorded.targets
        residuals = self.residuals(index, outputs, targets)
        return one_term_each(residuals, self.loss, outputs, targets, recorded.examples) if self.apart else residuals

    @cached_property
    def places(self) -> dict[str, Tensor]:
        """The indices of the matrices of every layer, and of the entries of each of the others, in flat vectors."""
        space = self.objective.space
        index = space.named(torch.arange(space.size, device=space.device))
        places = {layer.name: layer.arranged(index).reshape(-1) for layer in self.layers}
        return places | {name: index[name].reshape(-1) for name in self.others}

    def assembled(
        self, blocks: Mapping[str, LinearOperator], squares: Mapping[str, Tensor], **options: Any
    ) -> BlockDiagonal:
        """The blocks of the layers, and for each other parameter a diagonal: the identity without residuals."""
        params = self.objective.params
        rest = {name: Diagonal(squares.get(name, torch.ones_like(params[name])).reshape(-1)) for name in self.others}
        source = {**self.source, **options, "diagonal": self.others}
        return BlockDiagonal({**blocks, **rest}, self.places, self.objective.space, source=source)


class _Batch(NamedTuple):
    """A batch, and its number in the pass."""

    index: int
    content: Any


def _owned(owner: str, tensors: Mapping[str, Tensor]) -> Sums:
    return Sums({(owner, name): tensor for name, tensor in tensors.items()})
