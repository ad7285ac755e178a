"""Traces of functions and what is made of them: exact where structure tells, else near the truth. Coverage: see there."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, tensor

import curvature as cv

VALUES = torch.cat([tensor(5, 20, 100), linspace(0.5, 3, 197)])
QUESTIONS = {
    "trace_of": (lambda A, **o: cv.trace_of(torch.sqrt, A, **o), lambda t: t.sqrt().sum()),
    "logdet": (cv.logdet, lambda t: t.log().sum()),
    "spectral_moments": (cv.spectral_moments, lambda t: torch.stack([(t**p).mean() for p in range(1, 5)])),
    "frobenius_norm": (cv.frobenius_norm, lambda t: t.norm()),
    "participation_ratio": (cv.participation_ratio, lambda t: t.sum() ** 2 / t.square().sum()),
    "effective_rank": (cv.effective_rank, lambda t: torch.special.entr(t / t.sum()).sum().exp()),
    "effective_dimension": (lambda A, **o: cv.effective_dimension(A, damping=2.0, **o), lambda t: (t / (t + 2)).sum()),
}
ALL = pytest.mark.parametrize("name", QUESTIONS)


@ALL
def test_structure_makes_it_exact_and_free(name):
    ask, truth = QUESTIONS[name]
    for A in (cv.Diagonal(VALUES), cv.Dense(rotated(VALUES)), 2 * cv.Kronecker(VALUES[:5] / 2, VALUES[5:9])):
        values = cv.eigenvalues(A)
        estimate = ask(A)
        torch.testing.assert_close(estimate.value, truth(values), rtol=1e-12, atol=0)
        assert (estimate.cost.products, estimate.dof, float(estimate.stderr.max())) == (0, 0, 0)


@ALL
def test_as_many_products_as_rows_make_it_exact(name):
    ask, truth = QUESTIONS[name]
    estimate = ask(free(rotated(VALUES)), products=200)
    torch.testing.assert_close(estimate.value, truth(VALUES), rtol=1e-12, atol=0)
    assert (estimate.cost.products, estimate.dof) == (200, 0)
    low, high = estimate.interval()
    assert (low <= truth(VALUES)).all() and (truth(VALUES) <= high).all()


@ALL
def test_products_are_those_asked_for_and_the_truth_is_near(name):
    ask, truth = QUESTIONS[name]
    for seed in range(5):
        estimate = ask(free(rotated(VALUES)), products=150, seed=seed)
        assert 120 <= estimate.cost.products <= 150
        low, high = estimate.interval(0.9999)
        assert (low <= truth(VALUES)).all() and (truth(VALUES) <= high).all()
        assert (high - low < truth(VALUES)).all()


@ALL
def test_a_tolerance_is_reached_or_said_not_to_be(name):
    ask = QUESTIONS[name][0]
    A = free(rotated(torch.cat([VALUES] * 5)))
    estimate = ask(A, rtol=0.1)
    low, high = estimate.interval()
    half, least = float((high - low).norm()) / 2, float(estimate.value.norm())
    assert estimate.converged and half <= 0.1 * (least - half) * (1 + 1e-9)
    assert not ask(A, rtol=1e-9, max_products=250).converged


@ALL
def test_a_seed_gives_the_same_bits(name):
    ask, _ = QUESTIONS[name]
    first, second, other = (ask(free(rotated(VALUES)), products=120, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.value, second.value) and torch.equal(first.stderr, second.stderr)
    assert not torch.equal(first.value, other.value)


@ALL
def test_float32_products_agree_to_their_floor(name):
    ask, truth = QUESTIONS[name]
    single = ask(free(rotated(VALUES).float()), products=150)
    double = ask(free(rotated(VALUES)), products=150)
    torch.testing.assert_close(single.value, double.value, rtol=1e-4, atol=0)
    exact = ask(free(rotated(VALUES).float()), products=200)
    assert ((exact.value - truth(VALUES)).abs() <= exact.floor).all()


@ALL
def test_a_matrix_of_low_rank_is_known_whole(name):
    ask, truth = QUESTIONS[name]
    if name == "logdet":
        pytest.skip("a singular matrix has none")
    values = torch.cat([linspace(1, 9, 10), torch.zeros(290, dtype=torch.float64)])
    A = free(rotated(values))
    A.psd = True
    if name == "trace_of":
        A, values = A + cv.identity(A.domain), values + 1
    estimate = ask(A, products=100)
    torch.testing.assert_close(estimate.value, truth(values), rtol=1e-10, atol=0)
    assert float((estimate.interval()[1] - estimate.value).max()) < 1e-9 * float(truth(values).max())


def test_a_function_may_return_several():
    A = free(rotated(VALUES))
    estimate = cv.trace_of(lambda t: torch.stack([t, t.square(), torch.ones_like(t)]).view(3, 1, -1), A, products=150)
    assert estimate.value.shape == estimate.stderr.shape == (3, 1)
    assert float(estimate.value[2]) == pytest.approx(200, rel=1e-12)  # vectors have the length that makes it so
    assert float(estimate.value[0]) == pytest.approx(float(VALUES.sum()), rel=0.1)


def test_a_log_determinant_is_damped():
    matrix = rotated(torch.cat([VALUES, torch.zeros(100, dtype=torch.float64)]))
    exact = torch.logdet(matrix + 0.1 * torch.eye(300))
    estimate = cv.logdet(free(matrix), damping=0.1, rtol=0.02)
    assert estimate.converged and float(estimate.value) == pytest.approx(float(exact), rel=0.03)


def test_a_function_that_is_not_finite_at_an_eigenvalue_is_refused_with_the_fix():
    A = free(rotated(linspace(-1, 2, 100)))
    for make in (
        lambda: cv.logdet(A),
        lambda: cv.trace_of(torch.sqrt, A),
        lambda: cv.logdet(cv.Diagonal(tensor(1, 0))),
    ):
        with pytest.raises(ValueError, match=r"An eigenvalue is (-0\.\d+|-1|0), or nearly so, where .* Add damping"):
            make()


def test_ranks_are_in_their_order_and_those_of_a_multiple_of_the_identity_are_its_size():
    for values in (VALUES, linspace(0, 1, 150), torch.cat([tensor(100), linspace(0, 1, 149)])):
        A = free(rotated(values))
        stable = float(values.sum() / values.max())
        participation, effective = (float(ask(A, products=140)) for ask in (cv.participation_ratio, cv.effective_rank))
        assert stable <= participation < effective <= len(values)
    A = free(3 * torch.eye(60, dtype=torch.float64))
    for ask in (cv.participation_ratio, cv.effective_rank):
        assert float(ask(A, products=40)) == pytest.approx(60, rel=1e-9)


def test_magnitudes_count_where_eigenvalues_are_negative():
    values = torch.cat([tensor(-8, 9), linspace(-1, 1, 198)])
    size = values.abs()
    A = free(rotated(values))
    assert float(cv.participation_ratio(A, products=190)) == pytest.approx(
        float(size.sum() ** 2 / (size**2).sum()), rel=0.1
    )
    entropy = torch.special.entr(size / size.sum()).sum().exp()
    assert float(cv.effective_rank(A, products=190)) == pytest.approx(float(entropy), rel=0.05)


def test_the_effective_dimension_of_a_linear_model_is_the_trace_of_its_hat_matrix():
    """Ridge regression: the sum of the leverages x_i.(X^T X + mu I)^-1 x_i."""
    inputs, mu = torch.randn(40, 6, dtype=torch.float64), 3.0
    matrix = inputs.T @ inputs
    leverages = ((inputs @ torch.linalg.inv(matrix + mu * torch.eye(6, dtype=torch.float64))) * inputs).sum(1)
    assert float(cv.effective_dimension(cv.Dense(matrix), damping=mu)) == pytest.approx(
        float(leverages.sum()), rel=1e-12
    )
    objective = cv.Objective.of(
        torch.nn.Linear(6, 1, bias=False).double(), cv.SquaredError(scale=1), (inputs, inputs[:, :1])
    )
    found = cv.effective_dimension(cv.ggn(objective), damping=mu / 40)
    assert float(found) == pytest.approx(float(leverages.sum()), rel=1e-10)


def test_one_run_gives_the_effective_dimension_at_every_damping():
    A, dampings = free(rotated(VALUES)), 10 ** linspace(-3, 4, 6).reshape(2, 3)
    curve = cv.effective_dimension(A, damping=dampings, products=150)
    exact = (VALUES / (VALUES + dampings.unsqueeze(-1))).sum(-1)
    low, high = curve.interval(0.9999)
    assert curve.value.shape == (2, 3) and curve.cost.products <= 150
    assert (low <= exact).all() and (exact <= high).all() and (high - low < 0.25 * exact).all()
    assert (curve.value.flatten().diff() < 0).all()
    one = cv.effective_dimension(A, damping=float(dampings[0, 1]), products=150)
    torch.testing.assert_close(curve.value[0, 1], one.value, rtol=1e-2, atol=0)


def test_negative_eigenvalues_have_no_effective_dimension():
    values = torch.cat([tensor(-8, -1), linspace(0, 1, 98)])
    found = cv.effective_dimension(free(rotated(values)), damping=0.5, products=100)
    assert float(found) == pytest.approx(float((values[2:] / (values[2:] + 0.5)).sum()), rel=1e-10)


def test_the_zero_matrix_has_no_ranks():
    A = free(torch.zeros(50, 50, dtype=torch.float64))
    assert float(cv.frobenius_norm(A)) == 0
    for ask in (cv.participation_ratio, cv.effective_rank):
        with pytest.raises(ValueError, match="is not a number: it is zero"):
            ask(A, products=30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("products", [24, 30, 100, 256])
def test_projections_of_low_rank_are_no_trouble(products, dtype):
    values = torch.cat([torch.ones(5, dtype=torch.float64), torch.zeros(295, dtype=torch.float64)])
    A = free(rotated(values).to(dtype))
    for seed in range(10):
        estimate = cv.trace_of(torch.exp, A, products=products, seed=seed)
        low, high = estimate.interval(0.9999)
        assert low <= 295 + 5 * math.e <= high and (products < 100 or float(high - low) < 50)
        assert products < 100 or 4 < float(cv.effective_rank(A, products=products, seed=seed)) < 6


@pytest.mark.parametrize("products", [60, 150])
def test_a_slow_logarithm_says_how_wrong_it_may_be(products):
    """Few steps see little of six decades: what they leave out is in the interval."""
    values = 10 ** linspace(-6, 0, 300)
    held = 0
    for seed in range(20):
        low, high = cv.logdet(free(rotated(values)), products=products, seed=seed).interval()
        held += low <= values.log().sum() <= high
    assert held >= 18


@pytest.mark.parametrize("n", [1, 2, 5, 20])
@ALL
def test_small_matrices_are_exact_or_refused(name, n):
    ask, truth = QUESTIONS[name]
    for products in (2, 3, n, n + 1):
        try:
            estimate = ask(free(rotated(VALUES[:n])), products=max(2, products))
        except ValueError as error:
            assert products < n and "products at least" in str(error)
        else:
            if products >= n:
                torch.testing.assert_close(estimate.value, truth(VALUES[:n]), rtol=1e-10, atol=0)


def test_moments_are_named():
    estimate = cv.spectral_moments(free(rotated(VALUES)), 3)
    assert estimate.names == ("moment 1", "moment 2", "moment 3") and "moment 2" in str(estimate)


def test_interrupts_return_what_there_is():
    A = free(rotated(VALUES))
    with pytest.raises(cv.Interrupted) as stop:
        cv.frobenius_norm(A, products=150, run=cv.Run(progress=Stopping(45)))
    assert not stop.value.result.complete and float(stop.value.result) == pytest.approx(float(VALUES.norm()), rel=0.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cv.spectral_moments(cv.Diagonal(VALUES), 0), "highest is a power, 1 or more, but got 0"),
        (lambda: cv.logdet(cv.Dense(torch.randn(3, 3))), r"logdet needs a symmetric operator, .* A\.adjoint\(\) @ A"),
        (lambda: cv.effective_dimension(cv.Diagonal(VALUES), damping=0.0), "positive and finite, but got 0.0"),
        (lambda: cv.effective_dimension(cv.Diagonal(VALUES), damping=tensor(1, -1)), "damping is positive"),
        (lambda: cv.frobenius_norm(free(rotated(VALUES)), products=1), "at least 2 products"),
        (lambda: cv.frobenius_norm(free(rotated(VALUES)), rtol=-1.0), "rtol is a positive number"),
    ],
)
def test_arguments_without_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_square_of_the_norm_of_another_matrix_is_a_trace():
    matrix = torch.randn(80, 80, dtype=torch.float64)
    A = cv.Dense(matrix)
    estimate = cv.trace(A.adjoint() @ A, products=60)
    assert math.isclose(float(estimate) ** 0.5, float(matrix.norm()), rel_tol=0.1)
