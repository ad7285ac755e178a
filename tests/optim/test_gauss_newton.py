"""EGN against the dense matrix, and what the formulas say of single steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from objectives import Case, zoo
from reference.gauss_newton import DenseNewton, dense_ggn
from torch import Tensor, nn

import curvature as cv
from curvature.linalg.window import GradientWindow
from curvature.optim.control import LevenbergMarquardt
from curvature.optim.rules.gauss_newton import EGN
from curvature.optim.rules.kfac import KFAC

NAMES = ("classifier", "regression", "convolution", "tokens", "tied-head", "binary", "counts")


def case_of(name: str) -> Case:
    return next(case for case in zoo() if case.name == name)


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_those_of_the_dense_matrix(name):
    case = case_of(name)
    optimizer = EGN(case.module.parameters(), 0.3, damping=0.2, momentum=0.5, weight_decay=0.1)
    reference, theta = DenseNewton(dense_ggn, 0.3, 0.2, 0.5, 0.1), case.flat
    for step in range(20):
        some = torch.arange(len(case.inputs)).roll(step)[:6]
        inputs, targets = case.inputs[some], case.targets[some]
        batch = Case(name, case.module, case.loss, case.mean_loss, inputs, targets)
        theta = reference.step(theta, batch.outputs, lambda out, y=targets: case.mean_loss(out, y))
        optimizer.zero_grad()
        case.mean_loss(case.module(inputs), targets).backward()
        optimizer.step(objective=batch.objective())
        torch.testing.assert_close(flat(case.module), theta, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["classifier", "regression"])
def test_without_a_backward_pass_the_gradient_is_that_of_the_objective(name):
    case, twin = case_of(name), case_of(name)
    EGN(case.module.parameters()).step(objective=case.objective())
    optimizer = EGN(twin.module.parameters())
    twin.mean_loss(twin.module(twin.inputs), twin.targets).backward()
    optimizer.step(objective=twin.objective())
    torch.testing.assert_close(flat(case.module), flat(twin.module), rtol=1e-12, atol=0)


def test_one_step_of_a_linear_model_is_the_least_squares_solution():
    x, y, net = normal(9, 4), normal(9, 2, seed=1), nn.Linear(4, 2, bias=False).double()
    EGN(net.parameters(), damping=1e-10).step(objective=cv.Objective.of(net, "mse", [(x, y)]))
    torch.testing.assert_close(net.weight.detach().T, torch.linalg.lstsq(x, y).solution, rtol=1e-7, atol=1e-8)


def test_a_step_of_logistic_regression_is_a_damped_newton_step():
    case = case_of("softmax-regression")
    theta = case.flat
    g = torch.autograd.functional.jacobian(case.value, theta)
    expected = theta - torch.linalg.solve(case.dense_hessian() + 1e-2 * torch.eye(len(theta)).double(), g)
    EGN(case.module.parameters(), damping=1e-2).step(objective=case.objective())
    torch.testing.assert_close(flat(case.module), expected, rtol=1e-10, atol=1e-12)


def test_it_is_mfac_with_the_rows_of_the_matrix_for_gradients():
    """Squared errors of one output each: G = (1/b) sum g g^T for rows g = sqrt(2) J."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = normal(7, 3), normal(7, 1, seed=1)
    objective = cv.Objective.of(net, "mse", [(x, y)])
    window = GradientWindow(7, objective.space)
    for row in x:
        rows = torch.autograd.grad(net(row[None]).sum(), list(net.parameters()))
        window.add(math.sqrt(2) * torch.cat([r.flatten() for r in rows]))
    expected = flat(net) - cv.inverse(window.fisher, damping=0.1) @ objective.gradient()
    EGN(net.parameters(), damping=0.1).step(objective=objective)
    torch.testing.assert_close(flat(net), expected, rtol=1e-10, atol=1e-12)


def test_large_damping_makes_it_gradient_descent():
    case = case_of("classifier")
    theta, g = case.flat, torch.autograd.functional.jacobian(case.value, case.flat)
    EGN(case.module.parameters(), lr=1e6, damping=1e6).step(objective=case.objective())
    torch.testing.assert_close(flat(case.module), theta - g, rtol=1e-5, atol=1e-6)


def test_a_shift_of_all_logits_changes_nothing():
    case, twin = case_of("classifier"), case_of("classifier")

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = twin.module

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + 5.0

    EGN(case.module.parameters(), damping=1e-3).step(objective=case.objective())
    shifted = cv.Objective.of(Shifted(), twin.loss, [(twin.inputs, twin.targets)])
    EGN(twin.module.parameters(), damping=1e-3).step(objective=shifted)
    torch.testing.assert_close(flat(twin.module), flat(case.module), rtol=1e-9, atol=1e-12)


def test_a_batch_that_is_not_finite_moves_nothing_and_does_not_stay_in_the_momentum():
    case = case_of("regression")
    optimizer = EGN(case.module.parameters(), momentum=0.9)
    optimizer.step(objective=case.objective())
    before = flat(case.module)
    optimizer.step(objective=case.objective().on([(case.inputs * math.nan, case.targets)]))
    assert torch.equal(flat(case.module), before)
    optimizer.step(objective=case.objective())
    assert flat(case.module).isfinite().all() and not torch.equal(flat(case.module), before)


@pytest.mark.parametrize("kind", [EGN, KFAC])
def test_layers_that_are_called_inside_a_transform_are_followed_another_way(kind):
    """As derivatives in the inputs are, of solutions of differential equations: tensors there mean nothing outside."""

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.vmap(torch.func.grad(lambda x: self.net(x).sum()))(x)

    torch.manual_seed(0)
    net, batch = Slope().double(), (torch.linspace(0, 1, 6).double()[:, None], torch.ones(6, 1).double())
    objective = cv.Objective.of(net, "mse", [batch])
    G = cv.ggn(objective).dense()
    expected = torch.linalg.inv((G if kind is EGN else G.diagonal().diag()) + 0.1 * torch.eye(len(G)).double())
    optimizer = kind(net.parameters(), 0.0, damping=0.1, **({} if kind is EGN else {"fisher": "type-2"}))
    optimizer.step(objective=objective)
    torch.testing.assert_close(optimizer.operator().dense(), expected, rtol=1e-8, atol=1e-9)


def test_its_matrix_stays_that_of_the_last_step():
    case = case_of("classifier")
    optimizer = EGN(case.module.named_parameters(), damping=0.1)
    expected = torch.linalg.inv(case.dense_ggn() + 0.1 * torch.eye(len(case.flat)).double())
    optimizer.step(objective=case.objective())
    torch.testing.assert_close(optimizer.operator().dense(), expected, rtol=1e-9, atol=1e-10)


class Poisson(nn.Module):
    """What is left of -u'' = f and of u = 0 at the ends, for the network u: the solution is sin(pi x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        inside = -bend - math.pi**2 * torch.sin(math.pi * x)
        return torch.where((x == 0) | (x == 1), 10 * u, inside)


def test_a_differential_equation_is_solved():
    """As 3000 steps of Adam, of any learning rate, do not: they come to an error of 1e-4 and a loss of 1e-3."""
    torch.manual_seed(0)
    model, x = Poisson(16), torch.linspace(0, 1, 26).double().unsqueeze(1)
    optimizer = EGN(model.parameters(), control=LevenbergMarquardt())
    objective = cv.Objective.of(model, "mse", [(x, torch.zeros_like(x))])
    for _ in range(80):
        optimizer.step(objective=objective)
    everywhere = torch.linspace(0, 1, 201).double().unsqueeze(1)
    solution = torch.sin(math.pi * everywhere)
    with torch.no_grad():
        error = torch.linalg.norm(model.net(everywhere) - solution) / torch.linalg.norm(solution)
    assert error < 3e-5 and F.mse_loss(model(x), torch.zeros_like(x)) < 1e-5
