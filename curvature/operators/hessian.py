"""The Hessian of the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.objective.products import gradient_graph, hessian_product
from curvature.operators.engine import Engine, Linear, Memory, ObjectiveOperator, Recipe


def hessian(objective: Objective, *, engine: Engine = "auto", memory: Memory = "auto") -> LinearOperator:
    """The Hessian of the mean loss over all terms of the data and its regulariser, (n, n) for n selected parameters.

    A product with a block of vectors is one pass over the data: per batch one graph of the gradient, kept within
    `memory` bytes (a quarter of what is free), and one backward through it for each vector (1.5 to 2 gradients). With
    ReLU it is the Hessian almost everywhere.

    Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """
    recipe = Recipe(_reverse, _forward)
    return ObjectiveOperator("hessian", objective, recipe, regularised=True, engine=engine, memory=memory)


def gradient_and_products(
    objective: Objective, rows: Float[Tensor, "k n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "k n"]]:
    """The gradient, and the products of the Hessian with `rows`, from one graph for each batch: a forward and a
    backward pass less than each alone."""
    objective.check()
    space = objective.space

    def term(batch: Any) -> Tensor:
        leaves, grads = gradient_graph(objective, batch)
        gradient = [
            torch.zeros_like(p) if g is None else g.detach() for p, g in zip(leaves.values(), grads, strict=True)
        ]
        products = [hessian_product(space, leaves, grads, row) for row in rows]
        return torch.cat([piece.reshape(-1) for piece in (*gradient, *products)]).view(-1, space.size)

    found, terms = Passes(objective).total(term)
    found /= terms
    if objective.l2:
        found.add_(torch.cat([objective.position[None], rows]), alpha=objective.l2)
    return found[0], found[1:]


def _reverse(objective: Objective, index: int, batch: Any) -> Linear:
    return partial(hessian_product, objective.space, *gradient_graph(objective, batch))


def _forward(objective: Objective, index: int, batch: Any) -> Linear:
    space = objective.space
    flat = objective.position
    gradient = torch.func.grad(lambda vector: objective.total(space.named(vector), batch))

    def product(row: Tensor) -> Tensor:
        return torch.func.jvp(gradient, (flat,), (row,))[1]

    return product
