"""Embeddings: linear layers whose inputs are unit vectors, so that the second moment of the inputs is diagonal."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvature.operators.layers.kind import Kind
from curvature.operators.layers.positions import Indices


def _inputs(module: Any, ids: Tensor) -> Indices:
    ids = ids.reshape(len(ids), -1) if ids.ndim else ids.reshape(1, 1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    return Indices(ids, module.num_embeddings)


def _outputs(module: Any, gradient: Tensor) -> Tensor:
    width = gradient.shape[-1]
    return gradient.reshape(1, 1, 1, width) if gradient.ndim == 1 else gradient.reshape(len(gradient), -1, 1, width)


EMBEDDING = Kind(_inputs, _outputs, lambda module, weight: weight.unsqueeze(0), transposed=True)
