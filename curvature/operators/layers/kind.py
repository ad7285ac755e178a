"""What has to be known of a kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from curvature.operators.layers.positions import Inputs


def _as_given(module: nn.Module, input: Tensor) -> Tensor:
    return input


@dataclass(frozen=True)
class Kind:
    """How layers of a kind are a matrix at every position, told by functions of the module.

    `capture` says what to keep of an input, when the layer is called; `inputs` makes of that what goes in, (n, ...)
    -> n examples, and `outputs` does it for the gradient of the output: (n, positions, groups, out). `matrix` reads
    the weight as (groups, out, in), or for `transposed` kinds (1, in, out). The blocks of `small` groups are exact;
    others have Kronecker factors.
    """

    inputs: Callable[[nn.Module, Tensor], Inputs]
    outputs: Callable[[nn.Module, Tensor], Tensor]
    matrix: Callable[[nn.Module, Tensor], Tensor]
    capture: Callable[[nn.Module, Tensor], Tensor] = _as_given
    transposed: bool = False
    small: bool = False


def batched(tensor: Tensor, axes: int) -> Tensor:
    """The tensor with a first axis for examples, should it come without: it has `axes` with one."""
    return tensor if tensor.ndim >= axes else tensor.unsqueeze(0)
