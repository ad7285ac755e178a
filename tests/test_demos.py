"""The estimates on the embedded networks against their dense float64 matrices."""

from __future__ import annotations

import demo_accuracy
import numpy as np
import pytest
import torch
from demo_accuracy import kolmogorov, wasserstein
from objectives import zoo

import curvature as cv

CASES = {  # of the convolutional network a part small enough for a dense matrix; benchmarks/demo_accuracy.py does all
    "digits": None,
    "digits-cnn": ["1.*", "8.*"],
}


SLOW = {"digits-cnn": pytest.mark.slow}
PARAMS = [
    pytest.param((name, matrix), id=f"{name}-{matrix}", marks=SLOW.get(name, ()))
    for name in CASES
    for matrix in ("hessian", "ggn")
]


@pytest.fixture(scope="module", params=PARAMS)
def case(request) -> tuple[cv.LinearOperator, torch.Tensor, torch.Tensor]:
    """(operator, its dense matrix, all eigenvalues ascending)."""
    name, matrix = request.param
    objective = cv.demo(name, dtype=torch.float64)
    if CASES[name] is not None:
        objective = objective.first(100).narrowed(CASES[name])
    A = getattr(cv, matrix)(objective)
    dense = A.dense()
    return A, dense, torch.linalg.eigvalsh(dense)


def test_ten_largest_eigenvalues_agree_to_a_millionth(case):
    A, _, exact = case
    found = cv.eigsh(A, 10)
    assert found.converged.all()
    torch.testing.assert_close(found.values, exact.flip(0)[:10], rtol=1e-6, atol=0)


def test_the_trace_lies_within_its_error_bar(case):
    A, _, exact = case
    estimate = cv.trace(A, products=48)
    low, high = estimate.interval(0.999)
    assert low <= exact.sum() <= high
    assert estimate.stderr < 0.05 * exact.sum().abs()


def test_the_density_is_close_to_the_exact_spectrum(case):
    """Eigenvalues below 1e-5 of the largest count as zero: a hundred Krylov steps do not tell them apart."""
    A, _, exact = case
    density = cv.spectral_density(A, probes=8, steps=100)
    assert density.cost.passes == density.steps <= 100
    assert kolmogorov(density, exact, merged=1e-5) < 0.02
    distance, best_point_mass = wasserstein(density, exact)
    assert distance < best_point_mass / 5


@pytest.mark.parametrize("matrix", [cv.hessian, cv.ggn])
@pytest.mark.parametrize("network", zoo(), ids=str)
def test_the_density_of_every_network_of_the_zoo_is_close_to_its_spectrum(network, matrix):
    try:
        A = matrix(network.objective())
        exact = torch.linalg.eigvalsh(A.dense())
    except cv.BadObjective:
        pytest.skip("has no such matrix")
    density = cv.spectral_density(A)
    gaps = exact.diff() > 1e-9 * float(exact.abs().max())  # where no rounding moves an eigenvalue across
    points = ((exact[1:] + exact[:-1]) / 2)[gaps]
    shares = torch.searchsorted(exact, points) / len(exact)
    assert float((density.cdf(points).value - shares).abs().max()) < 0.02
    distance, best_point_mass = wasserstein(density, exact)
    assert distance < best_point_mass / 5


def test_ten_probes_and_eighty_steps_take_eighty_passes():
    density = cv.spectral_density(cv.hessian(cv.demo("digits")), probes=10, steps=80)
    assert (density.cost.passes, density.cost.products, density.steps) == (80, 800, 80)


@pytest.mark.slow
def test_a_complete_basis_gives_the_exact_staircase(case):
    _, dense, exact = case
    density = cv.spectral_density(cv.Dense(dense), probes=16, steps=len(dense) // 16 + 1)
    assert kolmogorov(density, exact, merged=1e-12) < 0.02


@pytest.mark.slow
def test_the_whole_convolutional_network():
    """Against the eigenvalues of its dense Hessian, an hour's work of benchmarks/demo_accuracy.py, which are kept."""
    exact = torch.from_numpy(np.load(demo_accuracy.RESULTS / "digits-cnn_hessian_100.npy"))
    H = cv.hessian(cv.demo("digits-cnn", dtype=torch.float64).first(100))
    assert H.shape == (len(exact), len(exact))
    torch.testing.assert_close(cv.eigsh(H, 10).values, exact.flip(0)[:10], rtol=1e-6, atol=0)
    low, high = cv.trace(H, products=99).interval(0.999)
    assert low <= exact.sum() <= high
    density = cv.spectral_density(H, probes=8, steps=160)
    assert kolmogorov(density, exact, merged=1e-5) < 0.02
    distance, best_point_mass = wasserstein(density, exact)
    assert distance < best_point_mass / 5


@pytest.mark.slow
def test_double_and_single_precision_agree():
    single, double = (cv.eigsh(cv.hessian(cv.demo("hamlet", dtype=d).first(8)), 3) for d in (None, torch.float64))
    torch.testing.assert_close(single.values.double(), double.values, rtol=1e-5, atol=0)
    assert (single.residuals < 1e-4 * single.values).all()
