"""Losses whose derivatives autograd takes from their closed forms, not from the code of their value.

For a softmax over a vocabulary that is less work and memory: torch's own second derivative of log_softmax and
nll_loss holds several tensors as large as the outputs, and goes over each of them several times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK = 1 << 24  # entries of the outputs that closed forms are computed on at a time: 64 MiB in float32


class Closed(Protocol):
    """A loss with closed forms."""

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        """The sum of the loss over weighted terms."""
        ...

    def residual(self, outputs: Tensor, targets: Any) -> Tensor: ...

    def hessian_product(self, outputs: Tensor, targets: Any, tangent: Tensor) -> Tensor: ...


def total(loss: Closed, outputs: Tensor, targets: Any) -> Tensor:
    """The value of the loss, whose gradient is its `residual`, whose derivative in turn is its `hessian_product`."""
    return _Total.apply(outputs, loss, targets)  # pyright: ignore[reportReturnType]


def chunked(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)` of pieces along their first axis, so small that its intermediate results take little."""
    pieces = [function(*piece) for piece in chunks(*tensors)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors, cut alike along their first axis."""
    count = -(-tensors[0].numel() // CHUNK)
    if count < 2:
        return [tensors]
    return list(zip(*(tensor.tensor_split(min(count, len(tensor))) for tensor in tensors), strict=True))


class _Total(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, loss: Closed, targets: Any) -> Tensor:
        return loss.value(outputs, targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Closed, Any], output: Tensor) -> None:
        outputs, ctx.loss, ctx.targets = inputs
        ctx.save_for_backward(outputs)
        ctx.save_for_forward(outputs)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (outputs,) = ctx.saved_tensors
        return _Residual.apply(outputs, scale, ctx.loss, ctx.targets), None, None  # pyright: ignore[reportReturnType]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: None) -> Tensor:
        (outputs,) = ctx.saved_tensors
        return (ctx.loss.residual(outputs, ctx.targets) * tangent).sum()


class _Residual(Function):
    """scale times the residual."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor, scale: Tensor, loss: Closed, targets: Any) -> Tensor:
        return loss.residual(outputs, targets) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Closed, Any], output: Tensor) -> None:
        outputs, scale, ctx.loss, ctx.targets = inputs
        ctx.save_for_backward(outputs, scale)
        ctx.save_for_forward(outputs, scale)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        outputs, scale = ctx.saved_tensors
        along = ctx.loss.hessian_product(outputs, ctx.targets, tangent) * scale
        if not ctx.needs_input_grad[1]:
            return along, None, None, None
        return along, (ctx.loss.residual(outputs, ctx.targets) * tangent).sum(), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, change: Tensor | None, *rest: None) -> Tensor:
        outputs, scale = ctx.saved_tensors
        along = ctx.loss.hessian_product(outputs, ctx.targets, tangent) * scale
        return along if change is None else along + ctx.loss.residual(outputs, ctx.targets) * change
