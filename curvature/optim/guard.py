"""Gradients and directions that are not finite: which they are, and when that is the end of training."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.optim.block import Block

FAILURES = 3  # steps in a row with a gradient that is not finite, after which training has come to an end


def guarded(
    vector: Float[Tensor, " n"],
    failures: Float[Tensor, " b"],
    block: Block,
    look: bool,
    before: Float[Tensor, " b"] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A gradient, zero for each parameter where it is not finite, and which are finite (b, 1): None if that is known of
    all. Counts failures; NonFinite after three in a row, on a device whose values cost time only where to `look`.

    With the number of failures `before` this step it is a direction, of which the gradients have been counted."""
    near = vector.device.type == "cpu"
    if near and math.isfinite(vector.sum().item()):
        if before is None:
            failures.zero_()
        return vector, None
    fine = vector.view(len(failures), -1).sum(1, keepdim=True).abs() < math.inf
    if before is None:
        failures.add_(1).mul_(~fine.view(-1))
    else:
        failures.copy_(torch.where(fine.view(-1), failures, before + 1))
    if near or look:
        _check_failures(failures, block, "gradients" if before is None else "directions")
    return where(fine, vector), fine


def where(fine: Bool[Tensor, "b 1"] | None, vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Zero for each parameter that is not fine."""
    return vector if fine is None else torch.where(fine, vector.view(len(fine), -1), 0).view(-1)


def dense(grad: Tensor) -> Tensor:
    """A gradient; ValueError where it is sparse."""
    if grad.is_sparse:
        raise ValueError("A gradient is sparse, but expected a dense one. Use Embedding(..., sparse=False).")
    return grad


def _check_failures(failures: Float[Tensor, " b"], block: Block, what: str) -> None:
    worst = int(failures.argmax())
    if float(failures[worst]) >= FAILURES:
        name = block.names[worst if block.grain == "shape" else 0]
        raise NonFinite(
            f"The {what} of {name} were not finite in {int(failures[worst])} steps in a row.",
            "Lower the learning rate, or clip gradients; the parameters are those before these steps.",
        )
