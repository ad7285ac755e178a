"""One pass over the data that sees what goes into the layers of a model and the gradients that come back.

Parameters of layers that are known go by layer; all others, and layers that are used in ways that cannot be followed,
go one example at a time, which is slow and always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.errors import BadObjective
from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal, Diagonal
from curvature.objective.batches import arrays, examples, moved, split
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
CALLED = "called"  # and of those that count the batches in which a layer was
ALTERED = "it is used outside its layer, or changed by it"
MIXED = "its layer mixes examples"
NEVER = "its layer is never called"

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
        self.layers, self.others = _candidates(objective)
        self.unmixed = exact or objective.mode == "eval"
        if not self.unmixed:  # what is coupled in evaluation is so by the model
            self.layers, self.others = _followed_in_evaluation(self)
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

    def _sums(self, see: See, batch: _Batch, again: bool) -> Sums:
        """The sums over a batch, by layer or parameter, and name."""
        leaves = self.objective.leaves()
        with _tape(self.layers) as calls:
            outputs, targets = self.objective.outputs(leaves, batch.content)
        number = _examples_of(batch.content, outputs)
        residuals: Iterator[Tensor] = iter(())
        if self.residuals is not None:
            residuals = self.residuals(batch.index, outputs.detach(), targets)
            if self.apart:
                residuals = one_term_each(residuals, self.loss, outputs, targets, number)
        some = list(islice(residuals, CHUNK))
        evidence = None
        if not again and (some or batch.index == 0):  # without residuals there is little that could change
            evidence = _Evidence(outputs, calls, leaves, number, some, self.objective.seed)
        sums, seen, reasons = Sums(), {}, {}
        for layer in self.layers:
            with _collected(reasons):
                inputs = layer.inputs(calls[layer.name], number) if calls[layer.name] else None
                if evidence is not None:
                    evidence.accept(layer, inputs, unmixed=self.unmixed)
                if inputs is not None:  # else it was not needed for this batch
                    once, seen[layer.name] = see(layer, inputs)
                    sums += _owned(layer.name, {CALLED: torch.ones(()), **once})
        if reasons:
            raise Unfollowed(reasons)
        rest = _Others(self, leaves, batch.content, outputs, evidence) if evidence is not None and self.others else None
        while some:
            for residual in some:
                if evidence is not None and residual is evidence.cotangent:
                    grads = evidence.together
                else:
                    grads, _ = _backward(outputs, calls, residual)
                for layer in self.layers:
                    if layer.name in seen:
                        sums += _owned(layer.name, seen[layer.name](layer.cotangents(grads[layer.name], number)))
            if rest is not None:
                sums += rest.squares(some)
            some = list(islice(residuals, CHUNK))
        return sums

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


class _Evidence:
    """What cotangents of the outputs of a batch send back: to what layers returned, and to all parameters.

    They are pulled back twice: as they are, and each example's times a random factor of its own, which must come out
    again in all that belongs to the example. A residual that is the only one is told apart by nothing else; of several
    each may be zero where others are not, and random cotangents stand for them.
    """

    def __init__(
        self,
        outputs: Tensor,
        calls: Mapping[str, list[Call]],
        leaves: Mapping[str, Tensor],
        number: int,
        residuals: Sequence[Tensor],
        seed: int,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.factors = torch.randn(number, generator=random, dtype=torch.float64).to(outputs)
        factors = self.factors.repeat_interleave(len(outputs) // number).view(-1, *[1] * (outputs.ndim - 1))
        if len(residuals) == 1:
            self.cotangent = residuals[0]
        else:
            self.cotangent = torch.randn(outputs.shape, generator=random, dtype=torch.float64).to(outputs)
        self.tolerance = AGREEMENT[outputs.dtype]
        self.together, _ = _backward(outputs, calls, self.cotangent)
        self.scaled, self.grads = _backward(outputs, calls, factors * self.cotangent, leaves)

    def accept(self, layer: Layer, inputs: Inputs | None, *, unmixed: bool) -> None:
        """Raise Unfollowed where the parameters of a layer cannot be followed through what it records: where that does
        not give their gradient, as they are used elsewhere too, or, if examples are to be `unmixed`, where what comes
        back to one of them depends on others."""
        examples = len(self.factors)
        try:
            expected = layer.arranged(self.grads)
            if inputs is None:
                reason = NEVER if expected.any() else None
            else:
                together, scaled = (
                    layer.cotangents(found[layer.name], examples) for found in (self.together, self.scaled)
                )
                reason = self._objection(inputs, together, scaled, expected, unmixed)
        except Unfollowed:
            raise
        except Exception:  # a layer that is like its kind by name or class alone
            reason = ALTERED
        if reason is not None:
            raise Unfollowed({layer.name: reason})

    def _objection(
        self, inputs: Inputs, together: Tensor, scaled: Tensor, expected: Tensor, unmixed: bool
    ) -> str | None:
        if inputs.values.shape[:2] != scaled.shape[:2]:
            return ALTERED
        if not _agree(inputs.gradient(scaled), expected, self.tolerance, size=_norm(scaled) * inputs.norm()):
            return ALTERED
        own = together * self.factors.view(-1, 1, 1, 1)
        if unmixed and not _agree(scaled, own, self.tolerance, size=_norm(together)):
            return MIXED
        return None


class _Others:
    """Squared gradients of the examples of a batch, in the parameters without a layer.

    Examples go through the model alone, where that has the gradient it has in the batch: what belongs to an example,
    and what to all of them, cannot be told from shapes. Else each goes with the batch, at the cost of all examples.
    """

    def __init__(
        self, layerwise: Layerwise, leaves: dict[str, Tensor], batch: Any, outputs: Tensor, evidence: _Evidence
    ) -> None:
        self.objective, self.leaves, self.batch, self.outputs = layerwise.objective, leaves, batch, outputs
        self.params = {name: leaves[name] for name in layerwise.others}
        self.space = ParamSpace.of(self.params)
        self.evidence, self.alone = evidence, True
        self.rows = torch.arange(len(outputs)).split(len(outputs) // len(evidence.factors))

    def squares(self, residuals: Sequence[Tensor]) -> Sums:
        """Summed over examples and residuals."""
        total = self._from_alone(residuals) if self.alone else None
        if total is None:
            self.alone = False
            total = self._nothing()
            for rows in self.rows:
                for residual in residuals:
                    total += self._pulled(self.outputs, _within(rows, residual)).square()
        return Sums({(name, OTHERS): square for name, square in self.space.named(total).items()})

    def _from_alone(self, residuals: Sequence[Tensor]) -> Tensor | None:
        """The same from each example alone; None where the gradients of these are not those of the batch."""
        evidence, total, sent, size = self.evidence, self._nothing(), self._nothing(), 0.0
        cut = zip(self.rows, evidence.factors, examples(self.batch, len(self.rows)), strict=True)
        for rows, factor, example in cut:
            try:
                output = self.objective.outputs(self.leaves, example)[0]
            except Exception:  # models can raise anything about a batch they do not expect
                return None
            if output.shape != self.outputs[rows].shape:
                return None
            others = [residual for residual in residuals if residual is not evidence.cotangent]
            cotangents = torch.stack([cotangent[rows] for cotangent in (evidence.cotangent, *others)])
            first, *rest = abreast(partial(self._pulled, output), CHUNK, set())(cotangents)
            sent += factor * first
            size += _norm(factor * first)
            for gradient in rest if len(others) == len(residuals) else (first, *rest):
                total += gradient.square()
        expected = self.space.flatten([evidence.grads[name] for name in self.params])
        return total if _agree(sent, expected, evidence.tolerance, size=size) else None

    def _pulled(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        return pulled(self.space, list(self.params.values()), [outputs], [cotangent])

    def _nothing(self) -> Tensor:
        return torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)


def _followed_in_evaluation(layerwise: Layerwise) -> tuple[list[Layer], dict[str, str]]:
    """The layers whose parameters can be followed when the model is in evaluation mode, and the other parameters."""
    objective = layerwise.objective.in_mode("eval")
    batch = moved(objective.batches.of_several(), objective.space.device, objective.space.dtype)
    with objective.context(), objective.randomness():
        leaves = objective.leaves()
        with _tape(layerwise.layers) as calls:
            outputs, _ = objective.outputs(leaves, batch)
        number = _examples_of(batch, outputs)
        evidence = _Evidence(outputs, calls, leaves, number, [], objective.seed)
        reasons = {}
        for layer in layerwise.layers:
            with _collected(reasons):
                inputs = layer.inputs(calls[layer.name], number) if calls[layer.name] else None
                evidence.accept(layer, inputs, unmixed=True)
    layerwise.drop(reasons)
    return layerwise.layers, layerwise.others


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
            layer = Layer(path or type(part).__name__, part, kind, own.get("weight"), own.get("bias"))
            try:
                layer.arranged(objective.params)
            except Exception:  # a layer that is like its kind by name or class alone
                others |= dict.fromkeys(layer.params, ALTERED)
            else:
                layers.append(layer)
    return layers, others


def _agree(found: Tensor, expected: Tensor, tolerance: float, *, size: float) -> bool:
    """Whether two tensors are equal but for an error relative to them, or the rounding of numbers of that `size`."""
    if found.shape != expected.shape:
        return False
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * size
    return _norm(found - expected) <= tolerance * _norm(expected) + rounding


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach()))


def _within(rows: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent, and zero in all rows but these."""
    kept = torch.zeros_like(cotangent)
    kept[rows] = cotangent[rows]
    return kept


def _examples_of(batch: Any, outputs: Tensor) -> int:
    """The number of examples of a batch: as many as its outputs, or as its inputs where outputs have more for each."""
    if outputs.ndim == 0:
        raise BadObjective(
            "The model returned a single number, of which no axis counts examples.",
            "Keep that axis: squeeze(-1) instead of squeeze().",
        )
    lengths = [len(leaf) for leaf in arrays(split(batch)[0]) if leaf.ndim]
    if len(outputs) in lengths:
        return len(outputs)
    return next((n for n in lengths if n > 1 and len(outputs) % n == 0), len(outputs))


@contextmanager
def _collected(reasons: dict[str, str]) -> Iterator[None]:
    """Context in which what cannot be followed is noted, and no error."""
    try:
        yield
    except Unfollowed as error:
        reasons |= error.reasons


def _owned(owner: str, tensors: Mapping[str, Tensor]) -> Sums:
    return Sums({(owner, name): tensor for name, tensor in tensors.items()})


def _tape(layers: Sequence[Layer]) -> AbstractContextManager[dict[str, list[Call]]]:
    return layer_tape({layer.name: (layer.module, layer.kind.capture) for layer in layers})


def _backward(
    outputs: Tensor, calls: Mapping[str, Sequence[Call]], cotangent: Tensor, leaves: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The gradients of what each call returned, and of the leaves, from one backward pass."""
    leaves = leaves or {}
    inputs: list[Any] = [call.output for own in calls.values() for call in own] + list(leaves.values())
    if not inputs:
        return {name: [] for name in calls}, {}
    grads = iter(torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True, allow_unused=True))

    def following(shape: torch.Size) -> Tensor:
        gradient = next(grads)
        return cotangent.new_zeros(shape) if gradient is None else gradient

    of_calls = {name: [following(call.shape) for call in own] for name, own in calls.items()}
    return of_calls, {name: following(leaf.shape) for name, leaf in leaves.items()}
