"""What is known of eigenpairs: Ritz values with their residuals, and how far from an eigenvalue they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.linalg.measurement import Measurement
from curvature.linalg.space import Space
from curvature.result import Quantity, Result

Which = Literal["largest", "smallest", "both", "magnitude"]


ENDS = {"largest": ("lambda_max",), "smallest": ("lambda_min",), "both": ("lambda_max", "lambda_min"), "magnitude": ()}


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues in the order asked for, with unit eigenvectors as rows.

    `residuals` are the norms of A v - value v, recomputed with fresh products. Guaranteed, but for rounding: an
    eigenvalue of A lies within one residual of each value, and the i-th largest (smallest) of A is no less (no more)
    than the i-th largest (smallest) value (Courant & Fischer). `converged`: which residuals are below the tolerance.

    `bounds` are sharper, and conditional: |eigenvalue - value| <= residual**2 / gap (Temple 1928, Kato 1949; Parlett
    1998, The Symmetric Eigenvalue Problem, chapter 10) if no other eigenvalue is nearer than the gap. That is taken
    from the other Ritz values, each widened by its residual; where they leave none, the bound is the residual. An
    eigenvalue that was missed may lie in the gap, or further out than all values: improbable for a random start
    (Kuczynski & Wozniakowski 1992), and not excluded. No bound is below the rounding of the products.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k n"]
    residuals: Float[Tensor, " k"]
    bounds: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]

    def summary(self) -> dict[str, str]:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), self.converged.tolist(), strict=True)
        ends = ("of the largest", "of the smallest") if self.origin.options["which"] == "both" else ("",)
        told = (f"{value:.8g}  residual {r:.1e}{'' if fine else '  not converged'}" for value, r, fine in pairs)
        return {f"eigenvalue {i + 1}": f"{line}  {ends[i % len(ends)]}".rstrip() for i, line in enumerate(told)}

    def quantities(self) -> dict[str, Quantity]:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), self.converged.tolist(), strict=True)
        found = [Quantity(value, bound=residual, converged=fine) for value, residual, fine in pairs]
        first = dict(zip(ENDS[self.origin.options["which"]], found, strict=False))
        return first | {f"eigenvalue_{i}": quantity for i, quantity in enumerate(found, 1)}

    __repr__ = Result.__str__


class Ritz(NamedTuple):
    """All Ritz values known, the wanted ones first and in order, with their residuals; unit vectors of the first k, and
    their fresh products."""

    values: Float[Tensor, " d"]
    residuals: Float[Tensor, " d"]
    rows: Float[Tensor, "k n"]
    products: Float[Tensor, "k n"] | None = None


class Solver(Protocol):
    """What looks for eigenpairs: Krylov or Lobpcg."""

    measurement: Measurement
    noise: float  # the largest |u.Av - v.Au| seen

    @property
    def rounding(self) -> float:
        """Norms up to this are rounding."""
        ...


def wanted(values: Float[Tensor, " d"], which: Which) -> Tensor:
    """Indices of `values` in the order of interest; "both" alternates between the two ends, largest first."""
    match which:
        case "largest":
            return values.argsort(descending=True)
        case "smallest":
            return values.argsort()
        case "magnitude":
            return values.abs().argsort(descending=True)
        case "both":
            down, up = values.argsort(descending=True), values.argsort()
            return torch.stack([down, up], dim=1).flatten()[: len(values)]
        case _:
            raise ValueError(f"which is 'largest', 'smallest', 'both' or 'magnitude', but got {which!r}.")


def tolerance(solver: Solver, values: Tensor, rtol: float) -> Tensor:
    """What a residual must be below: relative to its value, but not below what the dtype can show."""
    return (rtol * values.abs()).clamp(min=solver.rounding)


def eigenpairs(solver: Solver, ritz: Ritz, which: Which, rtol: float) -> Eigenpairs:
    """The pairs as a result: values and residuals by the products, where there are some."""
    k, measurement = len(ritz.rows), solver.measurement
    values, residuals = ritz.values[:k], ritz.residuals[:k]
    if ritz.products is not None:
        values, residuals = quotients(measurement.operator.domain, ritz.rows, ritz.products)
    others = ritz._replace(
        values=torch.cat([values, ritz.values[k:]]), residuals=torch.cat([residuals, ritz.residuals[k:]])
    )
    return Eigenpairs(
        values=values,
        vectors=ritz.rows,
        residuals=residuals,
        bounds=temple(others, which).clamp(min=max(solver.rounding, solver.noise)),
        converged=residuals <= tolerance(solver, values, rtol),
        complete=ritz.products is not None,
        cost=measurement.cost,
        origin=measurement.origin,
    )


def temple(ritz: Ritz, which: Which) -> Float[Tensor, " k"]:
    """residual**2 / gap where the other Ritz values leave a gap around a value, else its residual."""
    k, n = ritz.rows.shape
    residuals, others, radii = ritz.residuals[:k], ritz.values, ritz.residuals
    if len(others) == k < n:  # nothing is known of the rest
        return residuals
    if which == "magnitude":  # the rest may also lie across zero from the last
        others, radii = torch.cat([others, -others[-1:]]), torch.cat([radii, radii[-1:]])
    distance = (ritz.values[:k].unsqueeze(1) - others).abs() - radii
    distance.fill_diagonal_(torch.inf)
    gap = distance.amin(1)
    return torch.where(gap > residuals, residuals.square() / gap, residuals)


def quotients(space: Space, rows: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """u.Au / u.u and |Au - value u| / |u| for each row u, in float64: in its own dtype no row has length 1."""
    pairs = []
    for u, v in zip(rows.split(1), products.split(1), strict=True):
        value = (space.inner(u, v) / space.inner(u, u))[0, 0]
        pairs.append(torch.stack([value, (space.norms(v.double() - value * u.double()) / space.norms(u))[0]]))
    values, residuals = torch.stack(pairs).T
    return values, residuals
