"""Directions in the space of the parameters, as rows: random ones, to scale, and those of a run.

Rows of any origin can be stacked: the eigenvectors of `eigsh`, a gradient, the difference between two checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective

Scale = Literal["filter", "layer", "weight"]


def random_directions(
    objective: Objective, count: int = 2, *, scale: Scale | None = "filter", seed: int = 0
) -> Float[Tensor, "count n"]:
    """Gaussian directions, `to_scale` with the parameters; as drawn for scale=None, of length near the root of n."""
    need_objective("random_directions", objective)
    rows = objective.space.draw(count, seed=seed, kind="normal")
    return rows if scale is None else to_scale(objective, rows, scale)


def to_scale(objective: Objective, rows: Float[Tensor, "k n"], scale: Scale = "filter") -> Float[Tensor, "k n"]:
    """The directions, with the lengths that the parameters have: by filter, so that pictures of networks can be
    compared whose weights are large where the next layer's are small.

    "filter" gives every slice along the first axis of a parameter (what makes one output) the norm of that slice of
    the parameter, "layer" every parameter its norm, and "weight" multiplies each entry with the parameter's. Parameters
    with one axis or none, biases and the weights of normalisations, are not moved.

    Li, Xu, Taylor, Studer & Goldstein 2018 (arXiv:1712.09913).
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {', '.join(map(repr, SCALES))}, but got {scale!r}.")
    scaled = []
    for name, pieces in zip(objective.space.names, _split(objective, rows), strict=True):
        parameter = objective.params[name]
        scaled.append(SCALES[scale](pieces, parameter) if parameter.ndim > 1 else torch.zeros_like(pieces))
    return torch.cat([pieces.flatten(1) for pieces in scaled], dim=1)


def orthogonal(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """The directions, each without what it has of those before it, and as long as it was.

    ValueError where one is a combination of the others.
    """
    made: list[Tensor] = []
    for place, row in enumerate(rows.double()):
        length, rest = float(row.norm()), row
        for _ in range(2):  # "twice is enough" (Giraud et al. 2005)
            for before in made:
                rest = rest - before * (before @ rest)
        left = float(rest.norm())
        if left <= 1e-10 * length:
            raise ValueError(f"Direction {place} is a combination of those before it: it has nothing else to point to.")
        made.append(rest / left)
    lengths = rows.double().norm(dim=1, keepdim=True)
    return (torch.stack(made) * lengths).to(rows.dtype)


def positions(
    objective: Objective, places: Iterable[Objective | Tensor | Mapping[str, Tensor]]
) -> Float[Tensor, "k n"]:
    """Parameters as rows: of the same model's objectives, flat vectors, or state_dicts.

    The way from here to other checkpoints, as directions, is `positions(objective, others) - objective.position`.
    """
    need_objective("positions", objective)
    space, rows = objective.space, []
    for place in places:
        if isinstance(place, Mapping):
            place = objective.with_state(place)
        row = place.position if isinstance(place, Objective) else place
        if not isinstance(row, Tensor) or row.shape != (space.size,):
            found = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(
                f"Expected an objective of {space.size:,} parameters, a flat vector of them or a state_dict, but got "
                f"{found}."
            )
        rows.append(row.detach().to(space.device, space.dtype))
    return torch.stack(rows) if rows else space.empty


def from_optimizer(
    objective: Objective, optimizer: torch.optim.Optimizer, name: str = "exp_avg"
) -> Float[Tensor, " n"]:
    """What an optimizer keeps under that name for each parameter, such as its momentum ("exp_avg", "momentum_buffer"),
    as a direction; zero for parameters without any. ValueError where there is nothing of that name."""
    need_objective("from_optimizer", objective)
    own = dict(objective.function.module.named_parameters())
    states = {id(p): state for p, state in optimizer.state.items() if name in state}
    found = {key: states[id(own[key])][name] for key in objective.space.names if id(own[key]) in states}
    if not found:
        kept = sorted({key for state in optimizer.state.values() for key in state})
        raise ValueError(f"The optimizer keeps no {name!r} for these parameters, but {kept}. Take a step first.")
    pieces = [found.get(key, torch.zeros_like(p)) for key, p in objective.params.items()]
    space = objective.space
    return space.flatten(pieces).to(space.device, space.dtype)


def _split(objective: Objective, rows: Float[Tensor, "k n"]) -> list[Tensor]:
    """The rows by parameter, (k, ...) each."""
    space = objective.space
    if rows.ndim != 2 or rows.shape[1] != space.size:
        raise ValueError(f"Expected directions (k, {space.size}), but got {tuple(rows.shape)}.")
    pieces = rows.split([shape.numel() for shape in space.shapes], dim=1)
    return [piece.view(-1, *shape) for piece, shape in zip(pieces, space.shapes, strict=True)]


def _by_filter(pieces: Float[Tensor, "k f ..."], parameter: Float[Tensor, "f ..."]) -> Tensor:
    lengths = parameter.flatten(1).norm(dim=1) / pieces.flatten(2).norm(dim=2).clamp(min=1e-30)
    return pieces * lengths.view(*lengths.shape, *[1] * (parameter.ndim - 1))


def _by_layer(pieces: Float[Tensor, "k f ..."], parameter: Float[Tensor, "f ..."]) -> Tensor:
    lengths = parameter.norm() / pieces.flatten(1).norm(dim=1).clamp(min=1e-30)
    return pieces * lengths.view(-1, *[1] * parameter.ndim)


SCALES = {"filter": _by_filter, "layer": _by_layer, "weight": lambda pieces, parameter: pieces * parameter}
