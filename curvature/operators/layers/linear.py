"""Fully connected layers: inputs along the last axis, every axis between it and the first a position."""

from __future__ import annotations

from torch import Tensor, nn

from curvature.operators.layers.kind import Kind, batched
from curvature.operators.layers.positions import Rows


def _vectors(module: nn.Module, tensor: Tensor) -> Tensor:
    tensor = batched(tensor, 2)
    return tensor.reshape(len(tensor), -1, 1, tensor.shape[-1])


def _inputs(module: nn.Module, input: Tensor) -> Rows:
    return Rows(_vectors(module, input))


LINEAR = Kind(_inputs, _vectors, lambda module, weight: weight.unsqueeze(0))
CONV1D = Kind(_inputs, _vectors, lambda module, weight: weight.T.unsqueeze(0))  # Hugging Face's: weight (in, out)
