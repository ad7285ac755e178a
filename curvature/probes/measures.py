"""What the table of sharpness asks, measure by measure: how each is taken, and what is read from its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature.errors import NotConverged
from curvature.linalg.congruence import congruence
from curvature.linalg.eigen import eigsh
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.functional import frobenius_norm
from curvature.linalg.operator import LinearOperator
from curvature.linalg.spectrum import spectral_density
from curvature.linalg.structured import Diagonal
from curvature.linalg.trace import trace
from curvature.objective.objective import Objective
from curvature.operators.hessian import hessian
from curvature.probes.critical import CriticalSharpness, critical_sharpness
from curvature.probes.flatness import PacBayes, average_sharpness, pac_bayes_flatness
from curvature.probes.invariants import filter_sharpness, fisher_rao_norm
from curvature.probes.spectral_criteria import NAMES, spectral_criteria
from curvature.probes.worst_case import WorstCase, adaptive_sharpness, keskar_sharpness, sam_sharpness
from curvature.progress import Run
from curvature.result import Estimate

STEPS = 20  # of ascents, and as many of the density
PROBES = 5


@dataclass(frozen=True)
class Setting:
    """A point at which measures are taken, and how."""

    objective: Objective
    rho: float
    sigma: float
    samples: int
    products: int
    seed: int
    run: Run

    @cached_property
    def hessian(self) -> LinearOperator:
        """That of the loss."""
        return hessian(self.objective)

    @cached_property
    def relative(self) -> LinearOperator:
        """That of the loss in relative changes of the weights."""
        space = self.objective.space
        return congruence(Diagonal(self.objective.position.abs(), space=space), self.hessian)


class Numbers(NamedTuple):
    """(r,) values, their standard errors, NaN where nothing is random, with their degrees of freedom, and bounds of
    what no repetition shows."""

    values: Tensor
    stderrs: Tensor
    dofs: Tensor
    bounds: Tensor


def _certain(result: WorstCase | CriticalSharpness | Estimate) -> Numbers:
    value = result.value.reshape(-1).double()
    return Numbers(value, value * torch.nan, torch.full_like(value, torch.inf), torch.zeros_like(value))


def _sampled(result: Estimate) -> Numbers:
    value, stderr = result.value.reshape(-1).double(), result.stderr.reshape(-1).double()
    floor = torch.as_tensor(result.floor).double().expand_as(value).clone()
    return Numbers(value, stderr.where(stderr > 0, torch.nan), torch.full_like(value, result.dof), floor)


def _largest(result: Eigenpairs) -> Numbers:
    if not result.converged.all():
        raise NotConverged(
            f"after {result.cost.products} products the residual of {float(result.values[0]):.5g} is still "
            f"{float(result.residuals[0]):.2g}"
        )
    value, residual = result.values[:1].double(), result.residuals[:1].double()
    return Numbers(value, value * torch.nan, torch.full_like(value, torch.inf), residual)


def _flat(result: PacBayes) -> Numbers:
    return _sampled(result.sharpness)


class Measure(NamedTuple):
    """A measure by what asks for it and what reads its `rows` of the table from the answer; `invariant` where scaling
    the weights of ReLU networks without changing the function does not change it."""

    invariant: bool
    ask: Callable[[Setting], Any]
    read: Callable[[Any], Numbers]
    rows: tuple[str, ...] = ()


MEASURES: dict[str, Measure] = {
    "lambda_max": Measure(False, lambda s: eigsh(s.hessian, seed=s.seed, run=s.run), _largest),
    "trace": Measure(False, lambda s: trace(s.hessian, products=s.products, seed=s.seed, run=s.run), _sampled),
    "frobenius": Measure(
        False, lambda s: frobenius_norm(s.hessian, products=s.products, seed=s.seed, run=s.run), _sampled
    ),
    "criteria": Measure(
        False,
        lambda s: spectral_criteria(spectral_density(s.hessian, probes=PROBES, steps=STEPS, seed=s.seed, run=s.run)),
        _sampled,
        NAMES,
    ),
    "sam": Measure(False, lambda s: sam_sharpness(s.objective, rho=s.rho, run=s.run), _certain),
    "worst": Measure(
        False,
        lambda s: sam_sharpness(s.objective, rho=s.rho, steps=STEPS, restarts=1, seed=s.seed, run=s.run),
        _certain,
    ),
    "keskar": Measure(False, lambda s: keskar_sharpness(s.objective, run=s.run), _certain),
    "average": Measure(
        False,
        lambda s: average_sharpness(s.objective, s.sigma, samples=s.samples, seed=s.seed, run=s.run),
        _sampled,
    ),
    "pac_bayes": Measure(
        False, lambda s: pac_bayes_flatness(s.objective, samples=s.samples, seed=s.seed, run=s.run), _flat
    ),
    "critical": Measure(False, lambda s: critical_sharpness(s.objective, run=s.run), _certain),
    "adaptive_lambda_max": Measure(True, lambda s: eigsh(s.relative, seed=s.seed, run=s.run), _largest),
    "adaptive_sam": Measure(True, lambda s: adaptive_sharpness(s.objective, rho=s.rho, run=s.run), _certain),
    "adaptive_worst": Measure(
        True,
        lambda s: adaptive_sharpness(s.objective, rho=s.rho, steps=STEPS, restarts=1, seed=s.seed, run=s.run),
        _certain,
    ),
    "adaptive_average": Measure(
        True,
        lambda s: average_sharpness(s.objective, s.sigma, relative=True, samples=s.samples, seed=s.seed, run=s.run),
        _sampled,
    ),
    "adaptive_pac_bayes": Measure(
        True,
        lambda s: pac_bayes_flatness(s.objective, relative=True, samples=s.samples, seed=s.seed, run=s.run),
        _flat,
    ),
    "filter": Measure(
        True, lambda s: filter_sharpness(s.objective, products=s.products, seed=s.seed, run=s.run), _sampled
    ),
    "fisher_rao": Measure(True, lambda s: fisher_rao_norm(s.objective), _sampled),
}
