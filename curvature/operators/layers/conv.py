"""Convolutions: at every output location a matrix acts on the patch of the input below it (Grosse & Martens 2016)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvature.operators.layers.kind import Kind, batched
from curvature.operators.layers.positions import Rows


def _inputs(module: Any, input: Tensor) -> Rows:
    """The patches, with as many groups as the convolution has."""
    axes = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(batched(input, axes + 2), _padding(module), mode=mode)
    for axis, (size, step, apart) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        padded = padded.unfold(2 + axis, apart * (size - 1) + 1, step)[..., ::apart]
    patches = padded.unflatten(1, (module.groups, -1))  # (n, groups, channels, *locations, *kernel)
    patches = patches.flatten(3, 2 + axes).movedim(3, 1)  # (n, positions, groups, channels, *kernel)
    return Rows(patches.flatten(3))


def _padding(module: Any) -> list[int]:
    """What F.pad takes: before and after each axis, the last axis first; "same" padding may be uneven."""
    if isinstance(module.padding, str):
        return list(module._reversed_padding_repeated_twice) if module.padding == "same" else [0, 0]
    return [width for width in reversed(module.padding) for _ in range(2)]


def _outputs(module: Any, gradient: Tensor) -> Tensor:
    gradient = batched(gradient, len(module.kernel_size) + 2).flatten(2)
    return gradient.unflatten(1, (module.groups, -1)).movedim(-1, 1)


def _matrix(module: Any, weight: Tensor) -> Tensor:
    return weight.reshape(module.groups, -1, weight[0].numel())


CONV = Kind(_inputs, _outputs, _matrix)
KINDS: dict[type[nn.Module], Kind] = {nn.Conv1d: CONV, nn.Conv2d: CONV, nn.Conv3d: CONV}
