"""Layers whose parameters act as matrices on what goes in: what K-FAC needs of each kind, one file a kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from curvature.errors import CurvatureError
from curvature.operators.layers import conv
from curvature.operators.layers.embedding import EMBEDDING
from curvature.operators.layers.kind import Kind
from curvature.operators.layers.linear import CONV1D, LINEAR
from curvature.operators.layers.norm import BATCH_NORM, LAYER_NORM
from curvature.operators.layers.positions import Indices, Inputs, Rows
from curvature.operators.layers.positions import gram as gram

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: LAYER_NORM,
    nn.GroupNorm: BATCH_NORM,
    nn.modules.batchnorm._NormBase: BATCH_NORM,
    **conv.KINDS,
}
NAMED: dict[str, Kind] = {"Conv1D": CONV1D, "RMSNorm": LAYER_NORM, "LayerNorm": LAYER_NORM}  # ends of class names


@dataclass(frozen=True)
class Layer:
    """A layer of a kind that is known, and the names of its selected parameters: a weight, a bias, or both."""

    name: str
    module: Any
    kind: Kind
    weight: str | None
    bias: str | None

    @property
    def params(self) -> tuple[str, ...]:
        """The names of its selected parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def inputs(self, captured: Sequence[Tensor | None], examples: int | None = None) -> Inputs:
        """What went in, in all its calls, of each of which this was captured; as many examples as it says, or as the
        first axis has."""
        kept = [input for input in captured if input is not None]
        if len(kept) < len(captured):
            raise Unfollowed({self.name: "its layer is called in another way than others of its kind"})
        parts = [self.kind.inputs(self.module, input) for input in kept]
        values = _joined([self._by_example(part.values, examples) for part in parts])
        if isinstance(parts[0], Indices):
            return Indices(values, parts[0].size)
        if self.weight is None:
            values = values[..., :0]
        return Rows(values, ones=self.bias is not None)

    def cotangents(self, gradients: Sequence[Tensor], examples: int | None = None) -> Float[Tensor, "n r g o"]:
        """The gradients of the outputs of all its calls."""
        parts = [self.kind.outputs(self.module, gradient) for gradient in gradients]
        return _joined([self._by_example(part, examples) for part in parts])

    def arranged(self, tensors: Mapping[str, Tensor]) -> Shaped[Tensor, "g o i"]:
        """Tensors shaped like its parameters as the matrices that act on the inputs, the bias their last column."""
        parts = []
        if self.weight is not None:
            parts.append(self.kind.matrix(self.module, tensors[self.weight]))
        if self.bias is not None:
            bias = tensors[self.bias]
            groups = bias.numel() if self.kind.small else getattr(self.module, "groups", 1)
            parts.append(bias.reshape(groups, -1, 1))
        return torch.cat(parts, dim=-1)

    def _by_example(self, values: Tensor, examples: int | None) -> Tensor:
        """(k examples, positions, ...) -> (examples, k positions, ...): layers may see several entries of each one."""
        if examples is None:
            return values
        if len(values) % examples:
            raise Unfollowed({self.name: "its layer is not called for each example"})
        return values.reshape(examples, -1, *values.shape[2:])


def recognised(module: nn.Module) -> Kind | None:
    """The kind of a layer; None where it is not known."""
    for base in type(module).__mro__:
        if base in KINDS:
            return KINDS[base]
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and not list(module.children()):
        return next((kind for end, kind in NAMED.items() if type(module).__name__.endswith(end)), None)
    return None


class Unfollowed(CurvatureError):
    """A batch uses layers in ways that their parameters cannot be followed through them: for the `reasons`, by name."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"Layers cannot be followed: {dict(reasons)}.")
        self.reasons = reasons


def _joined(parts: list[Tensor]) -> Tensor:
    """The positions of all calls, one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
