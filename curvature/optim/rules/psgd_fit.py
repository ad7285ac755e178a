"""What the rules of PSGD have in common: when Q is fitted, to what, and by how long a step."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.operators.hessian import hessian
from curvature.optim.evidence import Evidence
from curvature.optim.preconditioner import Need

Fit = Literal["gradient", "momentum", "hessian"]

FLAT, FADING = 500, 1000  # steps that all fit Q, and those after which e times fewer do
KEPT = 0.9  # of the bound on the slope, from one fit to the next
LARGEST = 1e8  # entry of what has been whitened
PROBES = 32  # vectors by which spectral norms are measured


def check(fit: Fit, rate: float, eps: float, every: int) -> None:
    """ValueError for what fits nothing."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit is gradient, momentum or hessian, but got {fit}.")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is more than 0 and at most 1, but got {rate}.")
    if not eps > 0:
        raise ValueError(f"eps is more than 0, but got {eps}: P has no bound without it where gradients are zero.")
    if not every >= 1:
        raise ValueError(f"every is 1 or more, but got {every}.")


def fits(evidence: Evidence, due: bool, needs: frozenset[Need]) -> bool:
    """Whether a step fits Q: one that is due, or scheduled and with what is needed."""
    return due or (scheduled(evidence.taken) and (evidence.objective is not None or "objective" not in needs))


def scheduled(taken: int) -> bool:
    """Whether the sum of the shares of steps that fit Q, 1 and from the 500th on exp(-(taken - 500) / 1000), passes a
    whole number in this step."""

    def total(steps: int) -> float:
        return min(steps, FLAT) - FADING * math.expm1(-max(steps - FLAT, 0) / FADING)

    return math.floor(total(taken + 1)) > math.floor(total(taken))


def pair(fit: Fit, evidence: Evidence, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """What is to be whitened (n,), and the noise (n,) that it comes of where it is a product with the Hessian;
    zero where that is not finite."""
    if evidence.objective is None:
        return (evidence.momentum if fit == "momentum" else evidence.grad), None
    v = noise_like(evidence.grad, generator)
    h = (hessian(evidence.objective) @ v).to(v.dtype)
    return torch.where(h.isfinite().all(), h, 0.0), v


def noise_like(vector: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(vector.shape, dtype=vector.dtype, device=vector.device, generator=generator)


def first_scale(h: Float[Tensor, "*b n"], eps: float) -> Float[Tensor, "*b"]:
    """(mean h^4 + eps^4)^(-1/8): the multiple of the identity that Q is before its first fit."""
    return (h.double().pow(4).mean(-1) + eps**4).pow(-1 / 8).to(h.dtype)


def tracked(bound: Tensor, slope: Tensor) -> Tensor:
    """A bound on slopes that goes up with them at once, and down by and by."""
    return torch.maximum(slope, KEPT * bound + (1 - KEPT) * slope)


def capped(white: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """What brings entries down to 1e8 at most: steps by squares of such are the same, and do not overflow."""
    return (LARGEST / white.abs().amax(-1)).clamp(max=1)


def spectral_norm(A: Float[Tensor, "b d d"], generator: torch.Generator) -> Float[Tensor, " b"]:
    """|A| of symmetric matrices, from below, most often within a few per cent: of random vectors near the
    longest row, each multiplied by A four times, the one that A makes longest."""
    tiny = torch.finfo(A.dtype).tiny
    scale = A.abs().amax((1, 2), keepdim=True) + tiny
    A = A / scale
    longest = A.take_along_dim(A.norm(dim=2).argmax(1).view(-1, 1, 1), 1)
    X = torch.randn(PROBES, A.shape[2], dtype=A.dtype, device=A.device, generator=generator)
    X = longest + X * torch.sign(X @ longest.mT)  # in the half of the space where the longest row is
    for _ in range(2):
        X = X @ A
        X = X / (X.norm(dim=2, keepdim=True) + tiny) @ A
    return X.norm(dim=2).amax(1) * scale.flatten()
