"""One pass over the data that sees what goes into the layers of a model and the gradients that come back.

Parameters of layers that are known go by layer; all others, and layers that are used in ways that cannot be followed,
go one example at a time, which is slow and always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal, Diagonal
from curvature.objective.batches import examples, leading, moved, shortened
from curvature.objective.layers import Call, layer_tape
from curvature.objective.objective import Objective
from curvature.objective.params import ParamSpace
from curvature.objective.passes import Passes, Sums
from curvature.objective.products import pulled
from curvature.operators.engine import CHUNK, abreast, need_objective, source_of
from curvature.operators.layers import Inputs, Layer, Unfollowed, recognised
from curvature.operators.residuals import FisherKind, Residuals, Signed, likelihood, one_term_each, residuals_of

AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-5}  # many models compute their norms in float32, whatever they get
ROUNDING = 100  # units by which what is equal may differ
OTHERS = "others"  # the name of the sums for parameters without a layer
EXAMPLES = 3  # of the first batch, that layers are surveyed with
ALTERED = "it is used outside its layer, or changed by it"
MIXED = "its layer mixes examples"

Each = Callable[[Tensor], Mapping[str, Tensor]]  # the cotangents of a residual -> sums over the batch
Seen = tuple[Mapping[str, Tensor], Each]
See = Callable[[Layer, Inputs], Seen]


class Layerwise:
    """The layers of an objective, told by its first batch, and averages over its data for each of them.

    What is averaged is made of the inputs of the layers and of residuals, pulled back to their outputs: see `kfac`.
    Those of the terms of one example are pulled back at once with random signs, or `apart`. An example is an entry of
    the batch, or of the outputs where these do not have as many for each.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        fisher: FisherKind | None,
        *,
        samples: int = 1,
        seed: int = 0,
        apart: bool = False,
    ) -> None:
        need_objective(name, objective)
        self.objective = objective
        self.apart = apart and fisher != "sampled"  # whose signs are random by themselves
        self.residuals: Residuals | None = None
        if fisher is not None:
            self.loss = likelihood(objective, name)
            self.residuals = residuals_of(objective, name, fisher, samples=samples, seed=seed)
            if fisher != "sampled" and not apart:
                self.residuals = Signed(self.residuals, self.loss, seed)
        objective.check()
        # batch statistics alone may couple examples in training: what is coupled in evaluation is so by the model
        self.layers, self.others = _survey(objective.in_mode("eval"))
        options = {"fisher": fisher, "samples": samples, "seed": seed}
        self.source = {**source_of(name, objective), **options}

    def means(self, see: See, *, others: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Averages over the terms of the data, from one pass.

        By layer and name, of the sums over a batch that `see(layer, inputs)` returns, and of those that the function it
        returns beside them makes of the cotangents of each residual. By parameter, of the `others`: of squared
        gradients of examples, summed over the residuals. A layer that a batch uses otherwise than the first examples
        did goes to the others, and the pass begins again.
        """
        while True:
            try:
                return self._means(see, others)
            except Unfollowed as error:
                lost = next(layer for layer in self.layers if layer.name == error.layer)
                self.layers.remove(lost)
                self.others |= dict.fromkeys(lost.params, error.reason)
                vars(self).pop("places", None)

    def _means(self, see: See, others: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        average = Passes(self.objective, _Batch).average(lambda batch: self._sums(see, batch, others))
        by_layer: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in self.layers}
        by_parameter: dict[str, Tensor] = {}
        for (owner, name), mean in average.items():
            if name == OTHERS:
                by_parameter[owner] = mean
            else:
                by_layer[owner][name] = mean
        return by_layer, by_parameter

    def _sums(self, see: See, batch: _Batch, others: bool) -> Sums:
        """The sums over a batch, by layer or parameter, and name."""
        leaves = self.objective.leaves()
        with _tape(self.layers) as calls:
            outputs, targets = self.objective.outputs(leaves, batch.content)
        number = _examples_of(batch.content, outputs)
        sums, seen = Sums(), {}
        for layer in self.layers:
            if calls[layer.name]:  # else it was not needed for this batch
                sums_once, seen[layer.name] = see(layer, layer.inputs(calls[layer.name], number))
                sums += _owned(layer.name, sums_once)
        if self.residuals is None:
            return sums
        residuals = self.residuals(batch.index, outputs.detach(), targets)
        if self.apart:
            residuals = one_term_each(residuals, self.loss, outputs, targets, number)
        kept = list(residuals) if others and self.others else []
        for residual in kept or residuals:
            grads = _backward(outputs, calls, residual)
            for layer in self.layers:
                if layer.name in seen:
                    cotangents = layer.cotangents(grads[layer.name], number)
                    sums += _owned(layer.name, seen[layer.name](cotangents))
        return sums + self._squares(leaves, batch.content, outputs, kept, number) if kept else sums

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

    def _squares(
        self, leaves: dict[str, Tensor], batch: Any, outputs: Tensor, residuals: Sequence[Tensor], number: int
    ) -> Sums:
        """Squared gradients of examples in the parameters without a layer, summed over examples and residuals."""
        params = {name: leaves[name] for name in self.others}
        space = ParamSpace.of(params)
        total = torch.zeros(space.size, dtype=space.dtype, device=space.device)
        for output, cotangents in self._examples(leaves, batch, outputs, residuals, number):

            def gradient(cotangent: Tensor, output: Tensor = output) -> Tensor:
                return pulled(space, list(params.values()), [output], [cotangent])

            chunk = CHUNK if len(output) < len(outputs) else 1  # of one example: calls are what takes time
            total += abreast(gradient, chunk, set())(torch.stack(cotangents)).square().sum(0)
        return Sums({(name, OTHERS): square for name, square in space.named(total).items()})

    def _examples(
        self, leaves: dict[str, Tensor], batch: Any, outputs: Tensor, residuals: Sequence[Tensor], number: int
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each example outputs with a graph, and the cotangents that pull its share of the residuals back.

        The outputs are its own where it has the same alone as in the batch: what belongs to an example, and what to
        all of them, cannot be told from shapes. Else they are those of the batch, at the cost of all examples.
        """
        tolerance = AGREEMENT[self.objective.space.dtype]
        alone = examples(batch) if leading(batch) == number else iter(())
        for rows in torch.arange(len(outputs)).split(len(outputs) // number):
            own = self._outputs(leaves, next(alone, None))
            if own is not None and _agree(own, outputs[rows], tolerance):
                yield own, [residual[rows] for residual in residuals]
            else:
                alone = iter(())  # the others will not agree either
                yield outputs, [_within(rows, residual) for residual in residuals]

    def _outputs(self, leaves: dict[str, Tensor], example: Any) -> Tensor | None:
        """Those of an example alone; None where there is none, or the model does not take it."""
        if example is None:
            return None
        try:
            return self.objective.outputs(leaves, example)[0]
        except Exception:  # models can raise anything about a batch they do not expect
            return None


class _Batch(NamedTuple):
    """A batch, and its number in the pass."""

    index: int
    content: Any


def _survey(objective: Objective) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose parameters can be followed, told by running the first examples; and why the others cannot."""
    found, others = _candidates(objective)
    batch = moved(objective.batches.of_several(), objective.space.device, objective.space.dtype)
    with objective.context(), objective.randomness():
        leaves = objective.leaves()
        outputs, calls, batch = _run(objective, leaves, found, batch)
        number = _examples_of(batch, outputs)
        random = torch.Generator().manual_seed(objective.seed)
        cotangent = torch.randn(outputs.shape, generator=random, dtype=torch.float64).to(outputs)
        first = _within(torch.arange(len(outputs) // number), cotangent)
        together, alone = (_backward(outputs, calls, u) for u in (cotangent, first))
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        grads = dict(zip(leaves, grads, strict=True))
        layers = []
        for layer in found:
            evidence = _Evidence(calls[layer.name], together[layer.name], alone[layer.name], number)
            if reason := _objection(layer, evidence, grads):
                others |= dict.fromkeys(layer.params, reason)
            else:
                layers.append(layer)
        return layers, others


class _Evidence(NamedTuple):
    """The calls of a layer by so many examples, and the gradients of what they returned: for a loss of all examples
    together, and of the first alone."""

    calls: Sequence[Call]
    together: Sequence[Tensor]
    alone: Sequence[Tensor]
    examples: int


def _run(
    objective: Objective, leaves: dict[str, Tensor], layers: Sequence[Layer], batch: Any
) -> tuple[Tensor, dict[str, list[Call]], Any]:
    """Outputs and calls of a few examples, where the model takes them without the rest of the batch; and them."""
    few = shortened(batch, EXAMPLES)
    try:
        with _tape(layers) as calls:
            return objective.outputs(leaves, few)[0], calls, few
    except Exception:  # models can raise anything about shapes they do not expect
        if few is batch:
            raise
        with _tape(layers) as calls:
            return objective.outputs(leaves, batch)[0], calls, batch


def _candidates(objective: Objective) -> tuple[list[Layer], dict[str, str]]:
    """The layers of known kinds that own selected parameters alone; the other selected parameters, with the reason."""
    module, selected = objective.function.module, set(objective.space.names)
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    layers, others = [], {}
    for path, part in module.named_modules():
        own, kind = {}, recognised(part)
        for name, p in part.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if full not in selected:
                continue
            if len(names[id(p)]) > 1:
                others[full] = f"shared with {', '.join(name for name in names[id(p)] if name != full)}"
            elif kind is None or name not in ("weight", "bias"):
                others[full] = f"{type(part).__name__} has no factors"
            else:
                own[name] = full
        if own and kind is not None:
            layers.append(Layer(path or type(part).__name__, part, kind, own.get("weight"), own.get("bias")))
    return layers, others


def _objection(layer: Layer, evidence: _Evidence, grads: Mapping[str, Tensor]) -> str | None:
    """Why the parameters of a layer cannot be followed through it; None where they can.

    What the layer records must give their gradients, so that they are used nowhere else; and when the loss is of the
    first example alone, that example and no other must have what comes back.
    """
    calls, together, alone, examples = evidence
    if not calls:
        return "its layer is never called"
    try:
        inputs, cotangents = layer.inputs(calls, examples), layer.cotangents(together, examples)
        expected = layer.arranged(grads)
        if inputs.values.shape[:2] != cotangents.shape[:2]:
            return ALTERED
        recorded = inputs.gradient(cotangents)
        rounding = inputs.magnitudes().gradient(cotangents.abs())
        first = layer.cotangents(alone, examples)
    except Unfollowed as error:
        return error.reason
    except Exception:  # a layer that is like its kind by name or class alone
        return ALTERED
    if not _agree(recorded, expected, AGREEMENT[expected.dtype], size=rounding):
        return ALTERED
    kept = torch.zeros_like(cotangents)
    kept[0] = cotangents[0]
    return None if _agree(first, kept, AGREEMENT[expected.dtype], size=cotangents) else MIXED


def _agree(found: Tensor, expected: Tensor, tolerance: float, *, size: Tensor | None = None) -> bool:
    """Whether two tensors are equal but for an error relative to them, or the rounding of numbers of that `size`."""
    if found.shape != expected.shape:
        return False
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * _norm(expected if size is None else size)
    return _norm(found - expected) <= tolerance * _norm(expected) + rounding


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach()))


def _within(rows: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent, and zero in all rows but these."""
    kept = torch.zeros_like(cotangent)
    kept[rows] = cotangent[rows]
    return kept


def _examples_of(batch: Any, outputs: Tensor) -> int:
    """The number of examples of a batch: its own length where the outputs have as many rows for each."""
    length = leading(batch)
    return length if length and len(outputs) % length == 0 else len(outputs)


def _owned(owner: str, tensors: Mapping[str, Tensor]) -> Sums:
    return Sums({(owner, name): tensor for name, tensor in tensors.items()})


def _tape(layers: Sequence[Layer]) -> AbstractContextManager[dict[str, list[Call]]]:
    return layer_tape({layer.name: (layer.module, layer.kind.capture) for layer in layers})


def _backward(outputs: Tensor, calls: Mapping[str, Sequence[Call]], cotangent: Tensor) -> dict[str, list[Tensor]]:
    """The gradients of what each call returned, from one backward pass."""
    edges = [call.output for own in calls.values() for call in own]
    if not edges:
        return {name: [] for name in calls}
    grads = iter(torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True))

    def of(call: Call) -> Tensor:
        gradient = next(grads)
        return cotangent.new_zeros(call.shape) if gradient is None else gradient

    return {name: [of(call) for call in own] for name, own in calls.items()}
