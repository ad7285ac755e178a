"""Which layers of a model can be followed, from their inputs to the gradients of their parameters: told by numbers.

Names and classes only propose layers. Whether a layer is all that uses its parameters, and whether examples keep to
themselves in it, is seen in what comes back through every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.batches import arrays, split
from curvature.objective.layers import layer_tape
from curvature.objective.objective import Objective
from curvature.operators.layers import Inputs, Layer, Unfollowed, recognised

AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-5}  # many models compute their norms in float32, whatever they get
ROUNDING = 100  # units by which what is equal may differ
ALTERED = "it is used outside its layer, or changed by it"
MIXED = "its layer mixes examples"
NEVER = "its layer is never called"

Gradients = dict[str, list[Tensor]]  # of what each layer returned, call by call


class Recorded:
    """A batch that went through the model: its outputs and targets, what its layers were given, and the graph."""

    def __init__(self, objective: Objective, layers: Sequence[Layer], batch: Any) -> None:
        self.batch, self.leaves = batch, objective.leaves()
        with layer_tape({layer.name: (layer.module, layer.kind.capture) for layer in layers}) as self.calls:
            self.outputs, self.targets = objective.outputs(self.leaves, batch)
        self.examples = number_of(batch, self.outputs)

    def inputs(self, layer: Layer) -> Inputs | None:
        """What went into a layer; None where it was not called."""
        calls = self.calls[layer.name]
        return layer.inputs([call.input for call in calls], self.examples) if calls else None

    def cotangents(self, layer: Layer, gradients: Gradients) -> Float[Tensor, "n r g o"]:
        """The gradients of what a layer returned."""
        return layer.cotangents(gradients[layer.name], self.examples)

    def backward(self, cotangent: Tensor) -> Gradients:
        """The gradients of what all layers returned, from one backward pass."""
        return self._pulled(cotangent, {})[0]

    def with_parameters(self, cotangent: Tensor) -> tuple[Gradients, dict[str, Tensor]]:
        """The same, and those of the parameters."""
        return self._pulled(cotangent, self.leaves)

    def rows(self) -> tuple[Tensor, ...]:
        """Which rows of the outputs each example has."""
        return torch.arange(len(self.outputs)).split(len(self.outputs) // self.examples)

    def _pulled(self, cotangent: Tensor, leaves: Mapping[str, Tensor]) -> tuple[Gradients, dict[str, Tensor]]:
        inputs: list[Any] = [call.output for calls in self.calls.values() for call in calls] + list(leaves.values())
        found = (
            torch.autograd.grad(self.outputs, inputs, cotangent, retain_graph=True, allow_unused=True) if inputs else ()
        )
        gradients = iter(found)

        def following(shape: torch.Size) -> Tensor:
            gradient = next(gradients)
            return cotangent.new_zeros(shape) if gradient is None else gradient

        of_calls = {name: [following(call.shape) for call in calls] for name, calls in self.calls.items()}
        return of_calls, {name: following(leaf.shape) for name, leaf in leaves.items()}


class Evidence:
    """What cotangents of the outputs of a batch send back, to what layers returned and to all parameters.

    They are pulled back twice: as they are, and each example's times a random factor of its own, which must come out
    again in all that belongs to the example. A residual that is the only one can be that cotangent; of several each
    may be zero where others are not, and random numbers stand for them.
    """

    def __init__(self, recorded: Recorded, residuals: Sequence[Tensor], seed: int) -> None:
        self.recorded, outputs = recorded, recorded.outputs
        random = torch.Generator().manual_seed(seed)
        self.factors = torch.randn(recorded.examples, generator=random, dtype=torch.float64).to(outputs)
        if len(residuals) == 1:
            self.cotangent = residuals[0]
        else:
            self.cotangent = torch.randn(outputs.shape, generator=random, dtype=torch.float64).to(outputs)
        factors = self.factors.repeat_interleave(len(outputs) // recorded.examples)
        self.together = recorded.backward(self.cotangent)
        self.scaled, self.parameters = recorded.with_parameters(
            factors.view(-1, *[1] * (outputs.ndim - 1)) * self.cotangent
        )

    def accept(self, layer: Layer, inputs: Inputs | None, *, unmixed: bool) -> None:
        """Raise Unfollowed where the parameters of a layer cannot be followed through what it records.

        That is where its records do not give their gradient, as they are used elsewhere too; and, if examples are to be
        `unmixed`, where what comes back to one of them depends on others.
        """
        try:
            reason = self._objection(layer, inputs, unmixed)
        except Unfollowed:
            raise
        except Exception:  # a layer that is like its kind by name or class alone
            reason = ALTERED
        if reason is not None:
            raise Unfollowed({layer.name: reason})

    def _objection(self, layer: Layer, inputs: Inputs | None, unmixed: bool) -> str | None:
        expected = layer.arranged(self.parameters)
        if inputs is None:
            return NEVER if expected.any() else None
        if not math.isfinite(norm(expected)):  # which tells nothing of the layer
            return None
        together, scaled = (self.recorded.cotangents(layer, found) for found in (self.together, self.scaled))
        del self.scaled[layer.name]  # as large as what the layer returned
        if inputs.values.shape[:2] != scaled.shape[:2]:
            return ALTERED
        if not agree(inputs.gradient(scaled), expected, size=norm(scaled) * inputs.norm()):
            return ALTERED
        own = together * self.factors.view(-1, 1, 1, 1)
        return MIXED if unmixed and not agree(scaled, own, size=norm(together)) else None


def candidates(module: nn.Module, params: Mapping[str, Tensor]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of known kinds that own some of these parameters alone; the others of them, with the reason."""
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    layers, others = [], {}
    for path, part in module.named_modules():
        own, kind = {}, recognised(part)
        empty = any(not p.numel() for p in part.parameters(recurse=False))
        for name, p in part.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if full not in params:
                continue
            if len(names[id(p)]) > 1:
                others[full] = f"shared with {', '.join(name for name in names[id(p)] if name != full)}"
            elif empty:
                others[full] = f"{type(part).__name__} has parameters without entries"
            elif kind is None or name not in ("weight", "bias"):
                others[full] = f"{type(part).__name__} has no factors"
            else:
                own[name] = full
        if own and kind is not None:
            layer = Layer(path or type(part).__name__, part, kind, own.get("weight"), own.get("bias"))
            try:
                layer.arranged(params)
            except Exception:  # a layer that is like its kind by name or class alone
                others |= dict.fromkeys(layer.params, ALTERED)
            else:
                layers.append(layer)
    return layers, others


@contextmanager
def collected(reasons: dict[str, str]) -> Iterator[None]:
    """Context in which what cannot be followed is noted, and no error."""
    try:
        yield
    except Unfollowed as error:
        reasons |= error.reasons


def agree(found: Tensor, expected: Tensor, *, size: float) -> bool:
    """Whether two tensors are equal but for an error relative to them, or the rounding of numbers of that `size`."""
    if found.shape != expected.shape:
        return False
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * size
    return norm(found - expected) <= AGREEMENT[expected.dtype] * norm(expected) + rounding


def norm(tensor: Tensor) -> float:
    """The norm of all entries."""
    return float(torch.linalg.vector_norm(tensor.detach()))


def number_of(batch: Any, outputs: Tensor) -> int:
    """How many examples a batch has: as many as outputs, or as inputs where there are several outputs for each."""
    if outputs.ndim == 0:
        raise BadObjective(
            "The model returned a single number, of which no axis counts examples.",
            "Keep that axis: squeeze(-1) instead of squeeze().",
        )
    lengths = [len(leaf) for leaf in arrays(split(batch)[0]) if leaf.ndim]
    if len(outputs) in lengths:
        return len(outputs)
    return next((n for n in lengths if n > 1 and len(outputs) % n == 0), len(outputs))
