"""How much of the spectrum is negative: criteria that tell a minimum from a point that is none."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.spectrum import SpectralDensity
from curvature.result import Estimate, Origin

NAMES = ("r_e", "K_H", "K_1")


def spectral_criteria(density: SpectralDensity, *, n: float = 0.5) -> Estimate:
    """r_e = |least / largest|, K_H = sum_neg (|t| w)^n / sum_pos (t w)^n and K_1, the same for n = 1, of the nodes t
    and weights w of a density: (3,), all 0 where there are no negative eigenvalues.

    K_1 is the trace of the negative part over that of the positive one. K_H depends on the number of nodes as well:
    compare densities of as many probes and steps. ValueError where the largest eigenvalue is less than the least is
    below zero: the criteria mean something for spectra that are mainly positive. Nodes within the noise floor are zero.
    The standard error is the jackknife over probes; that of r_e is not statistical, and its `floor` is what the
    residuals of the two nodes leave.

    Gabdullin 2024 (arXiv:2412.10146), who takes one probe and 100 steps.

    >>> from curvature import Diagonal, spectral_density
    >>> H = Diagonal(torch.tensor([-1.0, 4.0], dtype=torch.float64))
    >>> spectral_criteria(spectral_density(H, probes=2, steps=2)).value
    tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64)
    """
    if not 0 < n < 1:
        raise ValueError(f"n is a power between 0 and 1, but got {n}.")
    nodes = density.nodes.where(density.nodes.abs() > density.floor, 0.0)
    least, largest = float(nodes[0].clamp(max=0)), float(nodes[-1])
    if largest <= 0 or largest < -least:
        raise ValueError(
            f"The spectrum, from {least:.4g} to {largest:.4g}, is mainly negative, for which the criteria say nothing. "
            "Train further, or look at density.negative."
        )
    weights, probes = density.weights, len(density.weights)
    value = _criteria(nodes, weights.mean(0), n)
    others = torch.stack([_criteria(nodes, w, n) for w in (weights.sum(0) - weights) / (probes - 1)])
    exact = bool(density.single.all())
    stderr = ((others - others.mean(0)).square().sum(0) * (probes - 1) / probes).sqrt()
    stderr[slice(None) if exact else 0] = 0.0  # of what probes do not decide about only rounding
    low, high = float(density.residuals[0]), float(density.residuals[-1])
    ends = (low + float(value[0]) * high) / largest if least < 0 else 0.0
    return Estimate(
        value=value,
        stderr=stderr,
        samples=0 if exact else probes,
        dof=0 if exact else probes - 1,
        floor=torch.tensor([ends, 0.0, 0.0], dtype=torch.float64),
        names=NAMES,
        cost=density.cost,
        origin=Origin(
            question="spectral_criteria",
            options={**density.origin.options, "n": n},
            seed=density.origin.seed,
            operator=density.origin.operator,
        ),
    )


def _criteria(nodes: Float[Tensor, " d"], weights: Float[Tensor, " d"], n: float) -> Float[Tensor, 3]:
    """Those of one measure."""
    mass = nodes.abs() * weights
    negative, positive = mass[nodes < 0], mass[nodes > 0]
    ends = (nodes[0].clamp(max=0) / nodes[-1]).abs()
    return torch.stack([ends, negative.pow(n).sum() / positive.pow(n).sum(), negative.sum() / positive.sum()])
