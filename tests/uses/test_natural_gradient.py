"""The natural gradient against dense solves, and the invariance that it is for."""

from __future__ import annotations

import pytest
import torch
from objectives import zoo
from torch import Tensor, nn

import curvature as cv

CASES = [zoo()[place] for place in (0, 1, 5)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("matrix", [cv.ggn, cv.empirical_fisher, cv.ggn_diagonal], ids=lambda matrix: matrix.__name__)
def test_it_is_the_gradient_by_the_inverse_of_the_damped_matrix(case, matrix):
    objective = case.objective((3, len(case.inputs) - 3))
    found = cv.natural_gradient(objective, matrix=matrix, damping=0.01, rtol=1e-12)
    dense = matrix(objective).dense() + 0.01 * torch.eye(objective.space.size, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(case.value, case.flat)
    torch.testing.assert_close(found.x, torch.linalg.solve(dense, gradient), rtol=1e-8, atol=1e-12)
    assert found.converged.all() and found.origin.question == "natural_gradient"


class Curved(nn.Module):
    """A linear model and a nonlinear one of two layers, whose weights are smooth functions of the parameters."""

    def __init__(self, weight: Tensor, mixing: Tensor) -> None:
        super().__init__()
        self.mixing, self.shape = mixing, weight.shape
        self.parameter = nn.Parameter(torch.linalg.solve(mixing, torch.asinh(weight.flatten())))

    def weights(self, parameter: Tensor) -> Tensor:
        return torch.sinh(self.mixing @ parameter)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights(self.parameter).view(self.shape).T)


class Straight(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


def test_it_is_the_same_step_in_any_coordinates_and_the_gradient_is_not():
    """Small steps along it change the weights alike, whether they are the parameters or functions of them."""
    weight, mixing = torch.randn(2, 3).double() / 2, torch.randn(6, 6).double()
    x, y = torch.randn(30, 3).double(), torch.randn(30, 2).double()
    straight, curved = Straight(weight), Curved(weight, mixing)
    objectives = [cv.Objective.of(model, "mse", (x, y)) for model in (straight, curved)]
    jacobian = torch.autograd.functional.jacobian(curved.weights, curved.parameter.detach())
    plain, turned = (cv.natural_gradient(o, damping=1e-14, rtol=1e-12).x for o in objectives)
    torch.testing.assert_close(jacobian @ turned, plain, rtol=1e-7, atol=0)
    gradients = [o.gradient() for o in objectives]
    assert float((jacobian @ gradients[1] - gradients[0]).norm()) > 0.5 * float(gradients[0].norm())


def test_a_step_along_it_solves_least_squares():
    case = zoo()[5]
    x, y = case.inputs, case.inputs @ torch.randn(3, 2).double()
    model = nn.Linear(3, 2).double()
    objective = cv.Objective.of(model, "mse", (x, y))
    step = cv.natural_gradient(objective, damping=0.0, rtol=1e-12).x
    there = objective.at(objective.position - step)
    assert objective.value() > 0.1 and there.value() < 1e-20


def test_a_preconditioner_saves_steps_and_passes_are_counted():
    objective = zoo()[1].objective()
    plain = cv.natural_gradient(objective, damping=1e-4, rtol=1e-9)
    near = cv.inverse(cv.egn(objective), damping=2e-4)
    helped = cv.natural_gradient(objective, damping=1e-4, rtol=1e-9, preconditioner=near)
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-5, atol=1e-6)
    assert int(helped.steps) < int(plain.steps) / 2
    assert plain.cost.passes == plain.cost.products + 1


def test_errors_are_those_of_the_solver():
    objective = zoo()[1].objective()
    with pytest.raises(cv.NotConverged, match="Raise max_steps"):
        cv.natural_gradient(objective, damping=1e-6, max_steps=2)
    with pytest.raises(TypeError, match="natural_gradient takes an Objective"):
        cv.natural_gradient(nn.Linear(1, 1), damping=1.0)  # pyright: ignore[reportArgumentType]
