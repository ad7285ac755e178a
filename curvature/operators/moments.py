"""Diagonals, from the squared gradients of examples."""

from __future__ import annotations

import torch

from curvature.linalg.structured import Diagonal
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.operators.layers import Inputs, Layer
from curvature.operators.layerwise import Layerwise, Seen
from curvature.operators.residuals import FisherKind, likelihood, residuals_of


def ggn_diagonal(objective: Objective, *, fisher: FisherKind = "type-2", samples: int = 1, seed: int = 0) -> Diagonal:
    """The diagonal of the GGN as an operator, from one pass over the data: exact, in every mode of the model.

    "type-2" takes one backward pass for each output of an example. "sampled" is an unbiased estimate from `samples`
    targets drawn from the model, and takes one for each: the diagonal of `fisher` where an example is one term.
    "empirical" is that of `empirical_fisher`, exact, with one for each term of an example. The regulariser is not in
    it.

    Dangel, Kunstner & Hennig 2020 (arXiv:1912.10985), diagonals from per-example gradients.
    """
    name = "ggn_diagonal"
    need_objective(name, objective)
    residuals = residuals_of(objective, name, fisher, samples=samples, seed=seed)
    apart = None if fisher == "sampled" else likelihood(objective, name)  # samples have random signs by themselves
    options = {"fisher": fisher, "samples": samples, "seed": seed}
    seen = Layerwise(name, objective, residuals, apart=apart, exact=True, **options)

    def see(layer: Layer, inputs: Inputs) -> Seen:
        return {}, lambda cotangents: {"squares": inputs.squares(cotangents)}

    moments, others = seen.means(see)
    space = objective.space
    entries = torch.empty(space.size, dtype=space.dtype, device=space.device)
    for layer in seen.layers:
        entries[seen.places[layer.name]] = moments[layer.name]["squares"].reshape(-1)
    for name, square in others.items():
        entries[seen.places[name]] = square.reshape(-1)
    return Diagonal(entries, space=space, source=seen.source)
