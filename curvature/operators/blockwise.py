"""The diagonal blocks of a matrix: one for each layer, parameter, or group of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from curvature.errors import BadObjective, listing
from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import BlockDiagonal
from curvature.objective.objective import Objective
from curvature.objective.params import Select, predicate
from curvature.operators.engine import need_objective

By = Literal["layer", "parameter"] | Mapping[str, Select]


def blockwise(
    matrix: Callable[[Objective], LinearOperator], objective: Objective, *, by: By = "layer"
) -> BlockDiagonal:
    """The block-diagonal part of `matrix(objective)`, such as `blockwise(cv.hessian, objective)`.

    `.blocks` holds an operator for each layer (module with parameters of its own), each parameter, or each group that
    `by` names, as in {"attention": "*.attn", "mlp": "*.mlp"}: groups that together are all selected parameters, once.
    A block is the matrix of the objective narrowed to its parameters, and can be asked what any operator can. A product
    with the whole takes a pass over the data for each block.
    """
    need_objective("blockwise", objective)
    objective.check()
    space = objective.space
    index = space.named(torch.arange(space.size, device=space.device))
    groups = _groups(objective, by)
    blocks = {group: matrix(objective.narrowed(_among(names))) for group, names in groups.items()}
    places = {group: torch.cat([index[name].reshape(-1) for name in names]) for group, names in groups.items()}
    return BlockDiagonal(blocks, places, space)


def _groups(objective: Objective, by: By) -> dict[str, list[str]]:
    """The names of the parameters of each group."""
    names = objective.space.names
    if isinstance(by, Mapping):
        parameters = dict(objective.function.module.named_parameters())
        choices = {group: predicate(select) for group, select in by.items()}
        groups = {group: [n for n in names if chooses(n, parameters[n])] for group, chooses in choices.items()}
        counts = {name: sum(name in group for group in groups.values()) for name in names}
        if wrong := [f"{name} is in {count}" for name, count in counts.items() if count != 1]:
            raise BadObjective(
                f"Every selected parameter belongs to one group, but {listing(wrong)}.",
                "Select fewer parameters for the objective, or change the groups.",
            )
        return {group: own for group, own in groups.items() if own}
    return objective.space.groups(by, root=type(objective.function.module).__name__)


def _among(names: list[str]) -> Select:
    return lambda name, _: name in names
