"""What losses that are sums over the elements of the outputs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.errors import BadObjective

Over = Literal["elements", "examples"]  # what the mean is over
Uniform = Callable[[tuple[int, ...]], Tensor]  # float64 numbers between 0 and 1 of a shape, on the outputs' device


def check_elements(loss: str, outputs: Tensor, targets: Any, otherwise: str) -> None:
    """Raise BadObjective unless targets are numbers shaped like the outputs: torch would broadcast them silently."""
    if isinstance(targets, Tensor) and targets.shape == outputs.shape:
        return
    if isinstance(targets, Tensor):
        check_rows(outputs, targets)
    came = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
    raise BadObjective(
        f"{loss} takes targets shaped like the outputs {tuple(outputs.shape)}, but {came} came.",
        f"Reshape the targets, or {otherwise}.",
    )


def check_rows(outputs: Tensor, targets: Tensor) -> None:
    """Raise BadObjective where there are other numbers of rows in outputs and targets, which do not fit each other."""
    if outputs.ndim and targets.ndim and len(outputs) != len(targets):
        raise BadObjective(
            f"The outputs {tuple(outputs.shape)} have {len(outputs)} rows, but the targets {tuple(targets.shape)} have "
            f"{len(targets)}.",
            "Give one target for each row of the inputs, or flatten outputs and targets alike.",
        )


def count_of(targets: Tensor, over: Over) -> Tensor:
    """How many elements, or examples, there are."""
    return torch.tensor(targets.numel() if over == "elements" else len(targets), dtype=torch.float64)


def example_axes(outputs: Tensor) -> tuple[int, ...]:
    """All axes of the outputs but the first: those within an example."""
    return tuple(range(1, outputs.ndim))


def standard_normal(shape: tuple[int, ...], uniform: Uniform) -> Tensor:
    """Standard normal numbers from uniform ones, one each, so that they do not depend on how the data is cut."""
    return torch.special.ndtri(uniform(shape).clamp(min=2.0**-54))  # 0 would be minus infinity


def one_by_one(deviations: Tensor) -> Iterator[Tensor]:
    """Each entry that an example has, over all examples, zero elsewhere: a root of the diagonal matrix of squares."""
    flat = deviations.reshape(len(deviations), -1) if deviations.ndim else deviations.reshape(1, 1)
    for column in range(flat.shape[1]):
        alone = torch.zeros_like(flat)
        alone[:, column] = flat[:, column]
        yield alone.view_as(deviations)
