"""Maxima over balls: what is known of them in closed form, and that every value is of a point in the ball."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from functions import made
from matrices import Stopping, rotated, tensor
from objectives import zoo
from scipy.optimize import brentq
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes.worst_case import adaptive_sharpness, keskar_sharpness, sam_sharpness

CASES = [case for case in zoo() if case.name in ("classifier", "regression", "convolution", "attention", "lstm")]
VALUES = tensor(7, 4, 1, -2, 0.5)
WHERE = tensor(0.3, -0.5, 0.2, 1.1, 0)


def quadratic(values: Tensor, theta: Tensor) -> tuple[cv.Objective, Tensor]:
    matrix = rotated(values)
    return made(lambda t: t @ (matrix @ t) / 2, theta), matrix


def largest_in_a_ball(matrix: Tensor, gradient: Tensor, rho: float) -> float:
    """max g.u + u.A u / 2 over |u| <= rho: on the boundary (mu - A) u = g with mu above all eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    along = vectors.T @ gradient
    top = float(values[-1])
    mu = brentq(lambda m: float((along / (m - values)).norm()) - rho, top + 1e-9, top + 1e9, xtol=1e-14)
    u = vectors @ (along / (mu - values))
    return float(gradient @ u + u @ (matrix @ u) / 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_is_the_formula(case):
    objective = case.objective(l2=0.1)
    theta, g = objective.position, objective.gradient()
    found = sam_sharpness(objective, rho=0.2)
    assert float(found.value) == pytest.approx(objective.at(theta + 0.2 * g / g.norm()).value() - objective.value())
    assert found.first_order == pytest.approx(0.2 * float(g.norm())) and found.on_boundary
    d = theta.abs()
    u = 0.2 * d * d * g / (d * g).norm()
    found = adaptive_sharpness(objective, rho=0.2)
    assert float(found.value) == pytest.approx(objective.at(theta + u).value() - objective.value())
    assert found.first_order == pytest.approx(0.2 * float((d * g).norm()))
    torch.testing.assert_close(found.perturbation, u)


def test_at_the_minimum_of_a_quadratic_it_is_half_the_largest_eigenvalue():
    objective, _ = quadratic(tensor(7, 4, 1, 0.5), torch.zeros(4).double())
    assert float(sam_sharpness(objective, rho=0.3, steps=9).value) == 0.0  # the gradient tells nothing
    found = sam_sharpness(objective, rho=0.3, steps=40, restarts=1)
    assert float(found.value) == pytest.approx(0.3**2 * 7 / 2, rel=1e-9) and found.on_boundary


@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_away_from_it_it_is_the_largest_value_in_the_ball(rho):
    objective, matrix = quadratic(VALUES, WHERE)
    found = sam_sharpness(objective, rho=rho, steps=60, restarts=2)
    assert float(found.value) == pytest.approx(largest_in_a_ball(matrix, matrix @ WHERE, rho), rel=1e-8)
    d = WHERE.abs()
    found = adaptive_sharpness(objective, rho=rho, steps=60, restarts=2)
    expected = largest_in_a_ball(d * matrix * d[:, None], d * (matrix @ WHERE), rho)
    assert float(found.value) == pytest.approx(expected, rel=1e-8)
    assert found.perturbation[4] == 0  # a weight that is zero stays
    assert float((found.perturbation[:4] / d[:4]).norm()) == pytest.approx(rho)


def test_a_maximum_inside_is_found_and_said_to_be_inside():
    top = tensor(0.2, -0.1, 0.3)
    objective = made(lambda t: -(t - top).square().sum(), torch.zeros(3).double())
    found = sam_sharpness(objective, rho=1.0, steps=60)
    assert float(found.value) == pytest.approx(float(top.square().sum()), rel=1e-6)
    assert not found.on_boundary and found.extent == pytest.approx(float(top.norm()), rel=1e-2)
    assert float(sam_sharpness(objective, rho=1.0).value) < 0  # one step goes too far


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_value_is_that_at_the_perturbation_and_more_steps_find_more(case):
    objective = case.objective()
    one = sam_sharpness(objective, rho=0.3)
    found = sam_sharpness(objective, rho=0.3, steps=15, restarts=1, seed=3)
    at = objective.at(objective.position + found.perturbation)
    assert float(found.value) == pytest.approx(at.value() - objective.value(), rel=1e-9)
    assert float(found.perturbation.norm()) == pytest.approx(0.3 * found.extent) and found.extent <= 1 + 1e-12
    assert found.value >= one.value and found.rises.shape == (2, 16) and found.rises[0, 0] == 0
    assert float(found.rises.max()) == float(found.value)


def test_in_a_box_a_linear_loss_is_largest_at_a_corner():
    slope, theta = tensor(1, -2, 0.5, 0), tensor(0.3, -3, 0, 2)
    objective = made(lambda t: t @ slope + 10, theta)
    rise = 1e-2 * float((slope.abs() * (theta.abs() + 1)).sum())
    found = keskar_sharpness(objective, eps=1e-2)
    assert float(found.value) == pytest.approx(100 * rise / (1 + objective.value()), rel=1e-9)
    assert found.first_order == pytest.approx(rise) and found.on_boundary
    subspace = torch.linalg.qr(objective.space.draw(2, seed=5, kind="normal").T).Q  # any signs will do
    rise = 1e-2 * float(((slope @ subspace).abs() * ((theta @ subspace).abs() + 1)).sum())
    found = keskar_sharpness(objective, eps=1e-2, dimensions=2, seed=5)
    assert float(found.value) == pytest.approx(100 * rise / (1 + objective.value()), rel=1e-9)


def test_in_a_box_a_quadratic_is_largest_at_a_corner():
    objective, matrix = quadratic(tensor(7, 4, 1, 0.5), tensor(0.3, -0.5, 0.2, 1.1))
    theta = objective.position
    box = 0.05 * (theta.abs() + 1)
    corners = [theta + box * tensor(*signs) for signs in itertools.product((-1, 1), repeat=4)]
    largest = max(float(c @ (matrix @ c) / 2) for c in corners)
    found = keskar_sharpness(objective, eps=0.05)
    assert float(found.value) == pytest.approx(100 * (largest / objective.value() - 1) / (1 + 1 / objective.value()))
    flat = keskar_sharpness(objective.at(torch.zeros(4).double()))  # the gradient tells nothing
    assert float(flat.value) == 0.0 and flat.extent == 0.0


def test_what_is_not_finite_is_the_worst():
    objective = made(lambda t: (300 * t.sum()).exp() - (300 * t.sum()).exp().square(), tensor(0))
    found = sam_sharpness(objective, rho=5.0, steps=3, restarts=2)
    assert not math.isfinite(float(found.value))


@pytest.mark.parametrize("ask", [sam_sharpness, adaptive_sharpness, keskar_sharpness])
def test_single_precision_and_the_model_that_never_notices(ask):
    case = CASES[2]
    objective = case.objective((3, 5))
    with untouched(objective.function.module):
        fine, coarse = ask(objective), ask(case.objective((3, 5), dtype=torch.float32))
    assert float(coarse.value) == pytest.approx(float(fine.value), rel=1e-2)


@pytest.mark.parametrize(
    "ask, options",
    [
        (sam_sharpness, {"steps": 6, "restarts": 1}),
        (adaptive_sharpness, {"steps": 6, "restarts": 1}),
        (keskar_sharpness, {"eps": 0.1}),
    ],
)
def test_it_goes_on_where_it_was_and_returns_what_it_has(ask, options, tmp_path):
    objective = CASES[0].objective()
    whole, path = ask(objective, **options), tmp_path / "ascent.ckpt"
    calls = [0]
    gradient = cv.Objective.gradient

    def stopping(self):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return gradient(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv.Objective, "gradient", stopping)
        with pytest.raises(cv.Interrupted) as caught:
            ask(objective, **options, run=cv.Run(checkpoint=path))
        calls[0] = 3
        with pytest.raises(KeyboardInterrupt) as nothing:
            ask(objective, **options)
    part = caught.value.result
    assert (
        not part.complete and float(part.value) <= float(whole.value) and not isinstance(nothing.value, cv.Interrupted)
    )
    resumed = ask(objective, **options, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.rises, whole.rises) and torch.equal(resumed.perturbation, whole.perturbation)
    assert resumed.complete and resumed.value == whole.value and resumed.cost.passes == whole.cost.passes


def test_it_tells_how_far_it_is():
    with pytest.raises(cv.Interrupted) as caught:
        sam_sharpness(CASES[0].objective(), steps=5, run=cv.Run(progress=Stopping(2)))
    assert int(caught.value.result.rises.isfinite().sum()) == 4
    assert "on the boundary" in str(caught.value.result)


def test_bad_input_is_refused():
    objective = CASES[0].objective()
    for rho in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rho is the radius"):
            sam_sharpness(objective, rho=rho)
    with pytest.raises(ValueError, match="steps >= 1"):
        adaptive_sharpness(objective, steps=0)
    with pytest.raises(ValueError, match="restarts >= 0"):
        sam_sharpness(objective, restarts=-1)
    with pytest.raises(ValueError, match="positive eps"):
        keskar_sharpness(objective, eps=0)
    with pytest.raises(ValueError, match="iterations >= 1"):
        keskar_sharpness(objective, iterations=0)
    with pytest.raises(ValueError, match="dimensions is a number from 1"):
        keskar_sharpness(objective, dimensions=objective.space.size + 1)
    for ask in (sam_sharpness, adaptive_sharpness, keskar_sharpness):
        with pytest.raises(TypeError, match="takes an Objective"):
            ask(nn.Linear(2, 1))
