"""The scale and shift behind a normalisation: for each channel a matrix (1, 2) that acts on its normalised value and 1.

Its blocks are as small as that, so that they are exact, without factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.objective.guard import frozen_randomness
from curvature.operators.layers.kind import Kind
from curvature.operators.layers.positions import Rows


def _normalised(module: Any, input: Tensor) -> Tensor:
    """What the scale multiplies: the output is linear in it, whether it is written (scale) or (1 + scale)."""
    own = {name: p for name, p in module.named_parameters(recurse=False)}
    buffers = dict(module._buffers)  # running statistics, of which copies are updated here
    outputs = []
    with frozen_randomness(0):  # the model's own numbers go on as if nothing had been computed here
        try:
            module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
            for scale in (1.0, 0.0):
                for name, p in own.items():
                    module._parameters[name] = torch.full_like(p, scale if name == "weight" else 0.0)
                outputs.append(module.forward(input))
        finally:
            module._parameters.update(own)
            module._buffers.update(buffers)
    return outputs[0] - outputs[1]


def _last(module: Any, tensor: Tensor) -> Tensor:
    """Channels along the last axes, as many as the weight has."""
    flat = tensor.flatten(-module.weight.ndim)
    return flat.reshape(len(flat) if flat.ndim > 1 else 1, -1, flat.shape[-1], 1)


def _first(module: Any, tensor: Tensor) -> Tensor:
    """Channels along the second axis."""
    return tensor.reshape(*tensor.shape[:2], -1).mT.unsqueeze(-1)


def _matrix(module: Any, weight: Tensor) -> Tensor:
    return weight.reshape(-1, 1, 1)


LAYER_NORM = Kind(lambda m, x: Rows(_last(m, x)), _last, _matrix, capture=_normalised, small=True)
BATCH_NORM = Kind(lambda m, x: Rows(_first(m, x)), _first, _matrix, capture=_normalised, small=True)
