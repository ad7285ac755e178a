"""The gradients of single examples, as rows: one backward pass for a batch of them where layers can be followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.memory import need_basis
from curvature.linalg.space import Space
from curvature.objective.batches import leading
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.operators.alone import Alone
from curvature.operators.engine import need_objective
from curvature.operators.layers import Inputs, Layer
from curvature.operators.layerwise import Batch, Layerwise
from curvature.operators.residuals import Slope


def example_gradients(objective: Objective) -> Float[Tensor, "N n"]:
    """The gradient of every example of the data, a row each, in one pass: that of the sum of the loss over its terms.

    The gradient of the objective is their sum over the number of terms, plus that of the regulariser. An example is a
    row of the outputs, or of the inputs where the outputs have several for each; in training mode, that row of the
    outputs as it depends on all of the batch. They are in the order of the data; a batch without any term is left out.
    TooLarge where they do not fit: take fewer at a time, by `objective.split()`.

    >>> line = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(line.weight, 1.0)
    >>> example_gradients(Objective.of(line, "mse", (torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))))
    tensor([[2.],
            [8.]])
    """
    gradients = ExampleGradients(objective)
    count, _ = Passes(objective).total(lambda batch: torch.tensor(leading(batch) or 1))
    need_basis(2 * int(count), objective.space)  # batch by batch, and together
    return torch.cat(Passes(objective, Batch).each(gradients.rows))


class ExampleGradients:
    """The gradients of the examples of an objective, batch by batch."""

    def __init__(self, objective: Objective) -> None:
        need_objective("example_gradients", objective)
        self.seen = Layerwise("example_gradients", objective, Slope(objective.loss), exact=True)

    def rows(self, batch: Batch) -> Float[Tensor, "b n"]:
        """Those of a batch, flat."""
        whole, _, examples = self.seen.shown(batch, lambda: Whole(self.seen))
        return whole.rows(examples)

    def along(self, directions: Float[Tensor, "k n"], batch: Batch) -> Float[Tensor, "b k"]:
        """Their inner products with some directions, in float64, without holding more than those of a layer."""
        along, _, examples = self.seen.shown(batch, lambda: Along(self.seen, directions))
        zeros = torch.zeros(examples, len(directions), dtype=torch.float64, device=directions.device)
        return sum(along.products, zeros)


class Whole:
    """Keeps the gradients of the examples, of one residual."""

    def __init__(self, seen: Layerwise) -> None:
        self.seen = seen
        self.pieces: list[tuple[Tensor, Float[Tensor, "b p"]]] = []  # where, and what

    def layer(self, layer: Layer, inputs: Inputs) -> Callable[[Tensor], None]:
        place = self.seen.places[layer.name]
        return lambda cotangents: self.pieces.append((place, inputs.gradients(cotangents)))

    def others(self, alone: Alone, residuals: list[Tensor]) -> None:
        self.pieces.append((self.seen.places_of(alone), alone.gradients(residuals)[0]))

    def rows(self, examples: int) -> Float[Tensor, "b n"]:
        """All of them, flat."""
        space = self.seen.objective.space
        rows = torch.zeros(examples, space.size, dtype=space.dtype, device=space.device)
        for place, piece in self.pieces:
            rows[:, place] = piece
        return rows


class Along:
    """Multiplies the gradients with directions, layer by layer and a few examples at a time."""

    def __init__(self, seen: Layerwise, directions: Float[Tensor, "k n"]) -> None:
        self.seen, self.directions = seen, directions
        self.products: list[Float[Tensor, "b k"]] = []

    def layer(self, layer: Layer, inputs: Inputs) -> Callable[[Tensor], None]:
        directions = self.directions[:, self.seen.places[layer.name]]
        return lambda cotangents: self._multiply(inputs.each(cotangents), directions)

    def others(self, alone: Alone, residuals: list[Tensor]) -> None:
        self._multiply(iter(alone.gradients(residuals)), self.directions[:, self.seen.places_of(alone)])

    def _multiply(self, gradients: Iterator[Float[Tensor, "e p"]], directions: Float[Tensor, "k p"]) -> None:
        space = Space(directions.shape[1], directions.dtype, directions.device)
        self.products.append(torch.cat([space.inner(some, directions) for some in gradients]))
