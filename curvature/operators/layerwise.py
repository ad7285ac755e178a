"""One pass over the data that sees what goes into the layers of a model and the gradients that come back.

Parameters of layers that are known go by layer; all others, and layers that are used in ways that cannot be followed,
go one example at a time, which is slow and always right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal, Diagonal
from curvature.objective.batches import examples, leading, moved, shortened
from curvature.objective.layers import Call, layer_tape
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes, Sums
from curvature.operators.engine import need_objective, source_of
from curvature.operators.layers import Inputs, Layer, NotByExample, recognised
from curvature.operators.residuals import Apart, FisherKind, Residuals, Signed, likelihood, residuals_of

AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-8}  # of gradients by layer with those of the parameters
ONCE, EACH, OTHERS = "once", "each", "others"  # kinds of sums, beside the name that they are for
EXAMPLES = 3  # of the first batch, that layers are surveyed with
ALTERED = "it is used outside its layer, or changed by it"
MIXED = "its layer mixes examples"

Once = Callable[[Layer, Inputs], Sequence[Tensor]]
Each = Callable[[Layer, Inputs, Tensor], Sequence[Tensor]]


class Layerwise:
    """The layers of an objective, told by its first batch, and averages over its data for each of them.

    What is averaged is made of the inputs of the layers and of residuals, pulled back to their outputs: see `kfac`.
    Those of the terms of one example are pulled back at once with random signs, or `apart`.
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
        self.residuals: Residuals | None = None
        if fisher is not None:
            self.residuals = residuals_of(objective, name, fisher, samples=samples, seed=seed)
            loss = likelihood(objective, name)
            if fisher != "sampled":  # whose signs are random by themselves
                self.residuals = Apart(self.residuals, loss) if apart else Signed(self.residuals, loss, seed)
        objective.check()
        # batch statistics alone may couple examples in training: what is coupled in evaluation is so by the model
        self.layers, self.others, separable = _survey(objective.in_mode("eval"))
        self.separable = separable and objective.mode == "eval"
        options = {"fisher": fisher, "samples": samples, "seed": seed}
        self.source = {**source_of(name, objective), **options}

    def means(
        self, once: Once, each: Each, *, others: bool = True
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Averages over the terms of the data, from one pass.

        By layer, of what `once(layer, inputs)` returns, and behind that of `each(layer, inputs, cotangents)` summed
        over the residuals. By parameter, of the `others`: of squared gradients of examples, summed likewise.
        """

        def term(part: tuple[int, Any]) -> Sums:
            index, batch = part
            leaves = self.objective.leaves()
            with _tape(self.layers) as calls:
                outputs, targets = self.objective.outputs(leaves, batch)
            layers = [layer for layer in self.layers if calls[layer.name]]  # others were not needed for this batch
            inputs = {layer.name: layer.inputs(calls[layer.name], len(outputs)) for layer in layers}
            sums = Sums()
            for layer in layers:
                sums += _named(layer.name, ONCE, once(layer, inputs[layer.name]))
            if self.residuals is None:
                return sums
            residuals = self.residuals(index, outputs.detach(), targets)
            alone = list(residuals) if others and self.others else []
            for residual in alone or residuals:
                grads = _backward(outputs, calls, residual)
                for layer in layers:
                    cotangents = layer.cotangents(grads[layer.name], len(outputs))
                    sums += _named(layer.name, EACH, each(layer, inputs[layer.name], cotangents))
            return sums + self._squares(leaves, batch, outputs, alone) if alone else sums

        average = Passes(self.objective, lambda index, batch: (index, batch)).average(term)
        by_layer = {layer.name: [s for key, s in average.items() if key[0] == layer.name] for layer in self.layers}
        return by_layer, {name: average[name, OTHERS] for name in self.others if (name, OTHERS) in average}

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

    def _squares(self, leaves: dict[str, Tensor], batch: Any, outputs: Tensor, residuals: Sequence[Tensor]) -> Sums:
        """Squared gradients of examples in the parameters without a layer, summed over examples and residuals."""
        names = list(self.others)
        sums = Sums({(name, OTHERS): torch.zeros_like(leaves[name]) for name in names})
        for own, rows in self._examples(leaves, batch, outputs, residuals):
            for row in rows:
                grads = torch.autograd.grad(
                    own, [leaves[name] for name in names], row, retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(names, grads, strict=True):
                    if gradient is not None:
                        sums[name, OTHERS].addcmul_(gradient, gradient)
        return sums

    def _examples(
        self, leaves: dict[str, Tensor], batch: Any, outputs: Tensor, residuals: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Outputs of one example at a time, and their residuals; of all, where the model does not take it alone."""
        if self.separable:
            for index, example in enumerate(examples(batch)):
                yield self.objective.outputs(leaves, example)[0], [r[index : index + 1] for r in residuals]
            return
        for index in range(len(outputs)):
            alone = torch.zeros_like(outputs)
            alone[index] = 1
            yield outputs, [residual * alone for residual in residuals]


def _survey(objective: Objective) -> tuple[list[Layer], dict[str, str], bool]:
    """The layers whose parameters can be followed, told by running the first examples; why the others cannot; and
    whether the model takes examples one by one."""
    found, others = _candidates(objective)
    batch = moved(objective.batches.of_several(), objective.space.device, objective.space.dtype)
    with objective.context(), objective.randomness():
        leaves = objective.leaves()
        outputs, calls, batch = _run(objective, leaves, found, batch)
        random = torch.Generator().manual_seed(objective.seed)
        cotangent = torch.randn(outputs.shape, generator=random, dtype=torch.float64).to(outputs)
        first = torch.zeros_like(cotangent)
        first[0] = cotangent[0]
        together, alone = (_backward(outputs, calls, u) for u in (cotangent, first))
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        grads = dict(zip(leaves, grads, strict=True))
        layers = []
        for layer in found:
            parts = calls[layer.name], together[layer.name], alone[layer.name]
            reason = _objection(layer, *parts, grads, examples=len(outputs), tolerance=AGREEMENT[objective.space.dtype])
            if reason is None:
                layers.append(layer)
            else:
                others |= dict.fromkeys(layer.params, reason)
        return layers, others, bool(others) and _separable(objective, leaves, batch, outputs)


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


def _objection(
    layer: Layer,
    calls: Sequence[Call],
    together: Sequence[Tensor],
    alone: Sequence[Tensor],
    grads: Mapping[str, Tensor],
    *,
    examples: int,
    tolerance: float,
) -> str | None:
    """Why the parameters of a layer cannot be followed through it; None where they can.

    What the layer records must give the gradient of its parameters, which are used nowhere else then; and when the loss
    is of the first example `alone`, that example and no other must have what comes back.
    """
    if not calls:
        return "its layer is never called"
    try:
        inputs, cotangents = layer.inputs(calls, examples), layer.cotangents(together, examples)
        expected = layer.arranged(grads)
        fits = inputs.values.shape[:2] == cotangents.shape[:2] and inputs.gradient(cotangents).shape == expected.shape
    except NotByExample:
        return "its layer is not called for each example"
    except Exception:  # a layer that is like its kind by name or class alone
        return ALTERED
    if not fits:
        return ALTERED
    error = torch.linalg.vector_norm(inputs.gradient(cotangents) - expected)
    if error > tolerance * torch.linalg.vector_norm(expected):
        return ALTERED
    difference = layer.cotangents(alone, examples)
    own = float(torch.linalg.vector_norm(cotangents[0]))
    difference[0] -= cotangents[0]  # which is what the others send to the first example
    return MIXED if float(difference.flatten(1).norm(dim=1).max()) > tolerance * own else None


def _named(name: str, kind: str, tensors: Sequence[Tensor]) -> Sums:
    return Sums({(name, kind, place): tensor for place, tensor in enumerate(tensors)})


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


def _separable(objective: Objective, leaves: dict[str, Tensor], batch: Any, outputs: Tensor) -> bool:
    """Whether each of these examples alone has the outputs that it has in the batch."""
    if leading(batch) != len(outputs):
        return False
    try:
        alone = torch.cat([objective.outputs(leaves, example)[0] for example in examples(batch)])
    except Exception:  # models can raise anything about a batch they do not expect
        return False
    error = torch.linalg.vector_norm(alone - outputs) if alone.shape == outputs.shape else math.inf
    return bool(error <= AGREEMENT[objective.space.dtype] * torch.linalg.vector_norm(outputs))
