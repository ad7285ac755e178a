"""The gradients of examples or mini-batches at one point, as a window whose Fisher matrix has an exact inverse."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from curvature.linalg.window import GradientWindow
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.operators.engine import need_objective
from curvature.operators.followed import number_of
from curvature.operators.layerwise import Batch
from curvature.operators.per_example import ExampleGradients


def gradient_window(objective: Objective, size: int, *, batch_size: int = 1, seed: int = 0) -> GradientWindow:
    """The gradients of `size` mini-batches of `batch_size` examples, drawn at random from the data: M-FAC's F.

    Of N examples with T terms, the gradient of one is N/T times that of the sum of its terms, so that their mean is
    that of the objective, g, without its regulariser. Of single examples, the default, `fisher` estimates their second
    moment C + g g^T, with C their covariance: the empirical Fisher matrix where an example is one term. Of the means
    over B at once it estimates C / B + g g^T, which near a minimum is a B-th of that, and wants a B-th of the damping;
    as many gradients have seen B times the data then. No example is drawn twice before all others were.

    Reads the data twice. Raises ValueError for more single examples than there are. Examples are those of
    `example_gradients`. Frantar, Kurtic & Alistarh 2021 (arXiv:2107.03356).
    """
    need_objective("gradient_window", objective)
    gradients = ExampleGradients(objective)

    def count(batch: Batch) -> Tensor:
        return torch.tensor(number_of(batch, objective.outputs(objective.params, batch)[0]))

    number, terms = Passes(objective).total(count)
    owners = _owners(int(number), size, batch_size, seed)
    space, start = objective.space, 0
    window = GradientWindow(size, space)
    means = torch.zeros(size, space.size, dtype=space.dtype, device=space.device)

    def add(batch: Batch) -> None:
        nonlocal start
        rows = gradients.rows(batch)
        for owner in owners[:, start : start + len(rows)]:
            drawn = owner >= 0
            means.index_add_(0, owner[drawn].to(space.device), rows[drawn.to(space.device)])
        start += len(rows)

    Passes(objective, Batch).each(add)
    window.add(means.mul_(float(number) / terms / batch_size))
    return window


def _owners(examples: int, size: int, batch_size: int, seed: int) -> Int[Tensor, "e N"]:
    """The number of the mini-batch that each example is drawn for, or -1, in each of as many rounds as it takes."""
    if size < 1 or not 1 <= batch_size <= examples:
        raise ValueError(
            f"A window holds one gradient at least, of 1 to {examples} examples, but got size={size} and "
            f"batch_size={batch_size}."
        )
    if batch_size == 1 and size > examples:
        raise ValueError(
            f"The data have {examples} examples, but a window of {size} was asked for. Give a smaller one."
        )
    each = examples // batch_size  # mini-batches of a round
    random = torch.Generator().manual_seed(seed)
    owners = torch.full((-(-size // each), examples), -1)
    for done, owner in enumerate(owners):
        drawn = torch.randperm(examples, generator=random)[: each * batch_size]
        owner[drawn] = done * each + torch.arange(each).repeat_interleave(batch_size)
    return owners.where(owners < size, -1)
