"""Convolutions: at every output location a matrix acts on the patch of the input below it (Grosse & Martens 2016)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvature.operators.layers.kind import Kind, batched
from curvature.operators.layers.positions import Rows


def _inputs(module: Any, input: Tensor) -> Rows:
    """The patches, a vector for each of the convolution's groups: by place in the kernel, then by channel.

    Channels last: patches are then copied in runs of channels, ten times as fast as number by number.
    """
    axes = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(batched(input, axes + 2), _padding(module), mode=mode).movedim(1, -1).contiguous()
    for axis, (size, step, apart) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        padded = padded.unfold(1 + axis, apart * (size - 1) + 1, step)[..., ::apart]
    places = math.prod(padded.shape[1 : 1 + axes])
    patches = padded.unflatten(1 + axes, (module.groups, -1)).movedim(2 + axes, -1)  # (..., groups, *kernel, channels)
    return Rows(patches.reshape(len(patches), places, module.groups, -1))


def _padding(module: Any) -> list[int]:
    """What F.pad takes: before and after each axis, the last axis first; "same" padding may be uneven."""
    if isinstance(module.padding, str):
        return list(module._reversed_padding_repeated_twice) if module.padding == "same" else [0, 0]
    return [width for width in reversed(module.padding) for _ in range(2)]


def _outputs(module: Any, gradient: Tensor) -> Tensor:
    gradient = batched(gradient, len(module.kernel_size) + 2).flatten(2).mT
    return gradient.unflatten(2, (module.groups, -1))


def _matrix(module: Any, weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).reshape(module.groups, -1, weight[0].numel())


CONV = Kind(_inputs, _outputs, _matrix)
KINDS: dict[type[nn.Module], Kind] = {nn.Conv1d: CONV, nn.Conv2d: CONV, nn.Conv3d: CONV}
