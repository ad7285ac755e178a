"""The gradients of mini-batches at one point, as a window whose Fisher matrix has an exact inverse."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.window import GradientWindow
from curvature.objective.batches import leading, mapped
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.objective.products import gradient_of
from curvature.operators.engine import CHUNK, need_objective

Draws = dict[int, list[Tensor]]  # by the number of a batch, the rows of each mini-batch drawn from it


def gradient_window(objective: Objective, size: int, *, batch_size: int = 1, seed: int = 0) -> GradientWindow:
    """The gradients of `size` mini-batches of `batch_size` examples, drawn at random from the data: M-FAC's F.

    Of single examples, the default, `fisher` estimates the second moment C + g g^T of the gradients of examples, for g
    the gradient of the objective and C their covariance: the empirical Fisher matrix where an example is one term. Of B
    at once it estimates C / B + g g^T, which near a minimum is a B-th of that, and wants a B-th of the damping; as many
    gradients have seen B times the data then. A mini-batch is drawn from one batch of the data, and is all of it where
    that is smaller; no example comes again before all data were gone through.

    The regulariser is not in the gradients; mini-batches without terms are left out. Reads the data twice. Raises
    ValueError for more single examples than there are. Frantar, Kurtic & Alistarh 2021 (arXiv:2107.03356).
    """
    need_objective("gradient_window", objective)
    objective.check()
    numbered = Passes(objective, lambda index, batch: (index, batch))
    lengths = dict(numbered.each(lambda pair: (pair[0], leading(pair[1]) or 1)))
    draws = _draws(lengths, size, batch_size, seed)
    window = GradientWindow(size, objective.space)

    def fill(pair: tuple[int, Any]) -> None:
        index, batch = pair
        gradients = _gradients(objective, batch, draws.get(index, []))
        while some := list(islice(gradients, CHUNK)):  # adding one takes about as long as adding several
            window.add(torch.stack(some))

    numbered.each(fill)
    return window


def _draws(lengths: dict[int, int], size: int, batch_size: int, seed: int) -> Draws:
    """`size` mini-batches out of batches of these lengths, without repetition until all of the data was drawn."""
    examples = sum(lengths.values())
    if batch_size < 1:
        raise ValueError(f"A mini-batch has one example at least, but got batch_size={batch_size}.")
    if batch_size == 1 and size > examples:
        raise ValueError(
            f"The data have {examples} examples, but a window of {size} was asked for. Give a smaller one."
        )
    random = torch.Generator().manual_seed(seed)
    draws: Draws = {}
    drawn = 0
    while drawn < size:
        cuts = [
            (index, rows)
            for index, length in lengths.items()
            for rows in torch.randperm(length, generator=random).split(batch_size)[: max(1, length // batch_size)]
        ]
        for place in torch.randperm(len(cuts), generator=random)[: size - drawn].tolist():
            index, rows = cuts[place]
            draws.setdefault(index, []).append(rows)
        drawn += len(cuts)
    return draws


def _gradients(objective: Objective, batch: Any, draws: list[Tensor]) -> Iterator[Float[Tensor, " n"]]:
    """The gradient of the mean over the terms of each mini-batch that has any."""
    length = leading(batch)
    for rows in draws:

        def pick(leaf: Any, rows: Tensor = rows) -> Any:
            own = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == length
            return leaf.index_select(0, rows.to(leaf.device)) if own else leaf

        part = mapped(pick, batch)
        if terms := objective.function.weight(part):
            yield gradient_of(objective, part) / terms
