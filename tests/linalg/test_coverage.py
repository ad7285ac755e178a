"""Every estimator on spectra of every kind: intervals hold the truth as often as they say, and are not absurdly wide."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from matrices import free, linspace, rotated
from torch import Tensor

import curvature as cv

FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "coverage.json"
LEVEL = 0.95
WIDTH = 2.5  # times the interval of a normal estimate with the error that is seen


def marchenko_pastur(n: int) -> Tensor:
    """Eigenvalues of the covariance of 800 samples in 400 dimensions, spread over n, and eight spikes."""
    samples = torch.randn(400, 800, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    bulk = torch.linalg.eigvalsh(samples @ samples.T / 800)
    return torch.cat([torch.quantile(bulk, linspace(0, 1, n - 8)), linspace(20, 100, 8)])


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda n: linspace(1, 3, n),
    "power law": lambda n: 1 / linspace(1, n, n),
    "exponential": lambda n: 10 ** linspace(0, -8, n),
    "spikes": marchenko_pastur,
    "indefinite": lambda n: torch.cat([linspace(-2, -1, n // 2), linspace(1, 2.2, n - n // 2)]),
    "clustered": lambda n: torch.cat([1 + 1e-5 * linspace(0, 1, n // 2), 5 + 1e-5 * linspace(0, 1, n - n // 2)]),
    "low rank": lambda n: torch.cat([linspace(1, 9, 20), torch.zeros(n - 20, dtype=torch.float64)]),
    "repeated": lambda n: torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64).repeat(n // 4),
}


class Estimator(NamedTuple):
    """`ask(A, seed, budget)` for `truth(values, diagonal)`, from `products` or to a share of `size(values)`."""

    ask: Callable[..., cv.Estimate]
    truth: Callable[[Tensor, Tensor], Tensor]
    products: int | None
    size: Callable[[Tensor], Tensor] = lambda values: values.abs().sum()
    share: float | None = 0.05
    psd: bool = False


def trace_of_values(values: Tensor, diagonal: Tensor) -> Tensor:
    return values.sum()


def entropy(values: Tensor, diagonal: Tensor) -> Tensor:
    share = values.abs() / values.abs().sum()
    return torch.special.entr(share).sum().exp()


def blocks(n: int) -> dict[str, slice]:
    return {"a": slice(0, n // 10), "b": slice(n // 10, n // 2), "c": slice(n // 2, n)}


def block_traces(A: cv.LinearOperator, **options: Any) -> cv.Estimate:
    return cv.block_traces(A, blocks(A.shape[0]), **options)


def block_sums(values: Tensor, diagonal: Tensor) -> Tensor:
    return torch.stack([diagonal[place].sum() for place in blocks(len(diagonal)).values()])


def density_mean(A: cv.LinearOperator, *, products: int, seed: int) -> cv.Estimate:
    return cv.spectral_density(A, probes=8, steps=products // 8, seed=seed).mean(torch.abs)


ESTIMATORS = {
    **{
        f"trace, {method}": Estimator(partial(cv.trace, method=method), trace_of_values, 32, psd=method == "xnystrace")
        for method in ("krylov", "hutchinson", "hutch++", "xtrace", "xnystrace")
    },
    "diagonal, hutchinson": Estimator(
        partial(cv.diagonal, method="hutchinson"), lambda values, diagonal: diagonal, 32, torch.norm, 0.5
    ),
    "diagonal, xdiag": Estimator(cv.diagonal, lambda values, diagonal: diagonal, 32, torch.norm, 0.5),
    "block traces": Estimator(block_traces, block_sums, 32),
    "frobenius norm": Estimator(cv.frobenius_norm, lambda values, diagonal: values.norm(), 32, torch.norm),
    "moments": Estimator(
        cv.spectral_moments,
        lambda values, diagonal: torch.stack([(values**p).mean() for p in range(1, 5)]),
        64,
        lambda values: values.abs().pow(4).mean(),
    ),
    "log-determinant": Estimator(
        partial(cv.logdet, damping=1e-3),
        lambda values, diagonal: (values + 1e-3).log().sum(),
        200,
        lambda values: (values + 1e-3).log().abs().sum(),
        psd=True,
    ),
    "trace of exp": Estimator(
        partial(cv.trace_of, lambda t: (t / 10).exp()),
        lambda values, diagonal: (values / 10).exp().sum(),
        200,
        lambda values: (values / 10).exp().sum(),
    ),
    "participation ratio": Estimator(
        cv.participation_ratio,
        lambda values, diagonal: values.abs().sum().square() / values.square().sum(),
        200,
        lambda values: values.abs().sum().square() / values.square().sum(),
    ),
    "effective rank": Estimator(cv.effective_rank, entropy, 200, lambda values: entropy(values, values)),
    "density": Estimator(density_mean, lambda values, diagonal: values.abs().mean(), 96, share=None),
}


def case(spectrum: str, n: int, psd: bool) -> tuple[cv.LinearOperator, Tensor, Tensor]:
    """The operator, its eigenvalues and its diagonal."""
    values = SPECTRA[spectrum](n)
    if n > 2000:
        return mixed(values)
    matrix = rotated(values)
    A = free(matrix)
    A.psd = psd
    return A, values, matrix.diagonal()


def mixed(values: Tensor) -> tuple[cv.LinearOperator, Tensor, Tensor]:
    """The matrix F D V D F^T of a random permutation V of the values, signs D and the orthogonal F of the real Fourier
    transform, twice: without structure that vectors of signs could see, and fast."""
    n, generator = len(values), torch.Generator().manual_seed(5)
    signs = [torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1 for _ in range(2)]
    shuffled = values[torch.randperm(n, generator=generator)]

    def hartley(rows: Tensor) -> Tensor:  # symmetric and orthogonal
        spectrum = torch.fft.fft(rows, norm="ortho")
        return spectrum.real - spectrum.imag

    def turn(rows: Tensor) -> Tensor:
        return hartley(hartley(rows * signs[0]) * signs[1])

    def back(rows: Tensor) -> Tensor:
        return hartley(hartley(rows) * signs[1]) * signs[0]

    A = cv.MatrixFree(lambda rows: back(turn(rows) * shuffled), cv.Space(n, torch.float64), symmetric=True)
    A.psd = bool((values >= 0).all())
    return A, values, torch.full((n,), float("nan"), dtype=torch.float64)


def cell(spectrum: str, name: str, n: int, adaptive: bool, seeds: int) -> dict[str, float] | None:
    """The share of intervals that hold the truth, their median width beside the ideal one, and the products."""
    torch.set_num_threads(1)
    estimator = ESTIMATORS[name]
    psd = bool((SPECTRA[spectrum](100) >= 0).all())
    if (estimator.psd and not psd) or (estimator.share is None if adaptive else estimator.products is None):
        return None
    A, values, diagonal = case(spectrum, n, psd)
    truth = estimator.truth(values, diagonal)
    if torch.isnan(truth).any():
        return None
    budget: dict[str, Any] = {"products": estimator.products}
    if adaptive:
        assert estimator.share is not None
        budget = {"atol": estimator.share * float(estimator.size(values)), "max_products": 3000}
    estimates = [estimator.ask(A, seed=1000 + seed, **budget) for seed in range(seeds)]
    bounds = [torch.stack(side) for side in zip(*(e.interval(LEVEL) for e in estimates), strict=True)]
    errors = torch.stack([e.value for e in estimates]) - truth
    rounding = 1e-12 * estimator.size(values)  # of the matrix that was made of the values, too
    inside = ((bounds[0] <= truth) & (truth <= bounds[1])) | (errors.abs() <= rounding)
    error = errors.square().mean(0).sqrt()
    half = (bounds[1] - bounds[0]).median(0).values / 2
    ideal = 1.96 * error + 1e-9 * truth.abs() + 1e-12
    return {
        "coverage": float(
            inside.double().mean(0).mean() if truth.ndim and len(truth) > 9 else inside.double().mean(0).min()
        ),
        "width": float((half / ideal).median() if truth.ndim and len(truth) > 9 else (half / ideal).max()),
        "relative error": float(error.norm() / truth.norm().clamp(min=1e-300)),
        "products": sum(e.cost.products for e in estimates) / seeds,
        "converged": sum(e.converged is not False for e in estimates) / seeds,
    }


def holds(figures: dict[str, float], seeds: int) -> bool:
    least = LEVEL - 3 * (LEVEL * (1 - LEVEL) / seeds) ** 0.5
    return figures["coverage"] >= least and figures["width"] <= WIDTH


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("spectrum", ["power law", "spikes", "indefinite"])
def test_intervals_hold_the_truth(spectrum, name, adaptive):
    figures = cell(spectrum, name, 300, adaptive, 100)
    assert figures is None or holds(figures, 100), figures


@pytest.mark.slow
def test_coverage_table():
    """Every spectrum, estimator and size: coverage within three standard errors of 95 %, widths within 2.5 times."""
    seeds = {100: 400, 1000: 400, 100_000: 40}
    cells = [
        (s, name, n, how, seeds[n]) for n in seeds for s in SPECTRA for name in ESTIMATORS for how in (False, True)
    ]
    with get_context("spawn").Pool() as pool:
        figures = pool.starmap(cell, cells, chunksize=1)
    table = [
        {"spectrum": s, "estimator": name, "size": n, "stop": "adaptive" if how else "fixed", "seeds": count, **found}
        for (s, name, n, how, count), found in zip(cells, figures, strict=True)
        if found is not None
    ]
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    short = [{key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()} for row in table]
    rows = ",\n".join(json.dumps(row) for row in short)
    FIGURES.write_text(f'{{"level": {LEVEL}, "cells": [\n{rows}\n]}}\n')
    wrong = [row for row in table if not holds(row, row["seeds"])]
    assert not wrong, json.dumps(wrong, indent=1)
