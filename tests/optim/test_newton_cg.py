"""Newton-CG against dense matrices, and what it does where conjugate gradients stop early."""

from __future__ import annotations

import pytest
import torch
from matrices import free, rotated, tensor
from objectives import Case, zoo
from reference.gauss_newton import DenseNewton, conjugate_gradients, dense_ggn, dense_hessian
from torch import Tensor, nn

import curvature as cv
from curvature.optim.control import Armijo, LevenbergMarquardt
from curvature.optim.rules.newton_cg import NewtonCG, TruncatedInverse


def case_of(name: str) -> Case:
    return next(case for case in zoo() if case.name == name)


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def truncated(A: Tensor, start: Tensor, *, damping: float = 0.0, rtol: float = 1e-12, max_steps: int = 100):
    return TruncatedInverse(free(A), damping, start, rtol, max_steps)


class Counting(cv.MatrixFree):
    """A matrix that counts its products."""

    def __init__(self, A: Tensor) -> None:
        self.products = 0
        super().__init__(lambda rows: rows @ A, cv.Space(len(A), A.dtype), psd=True)

    def apply(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        return super().apply(rows)


@pytest.mark.parametrize("matrix, damping", [("ggn", 0.2), ("hessian", 8.0)])
@pytest.mark.parametrize("name", ["classifier", "regression", "convolution", "tokens", "lstm"])
def test_twenty_steps_are_those_of_the_dense_matrix(name, matrix, damping):
    case = case_of(name)
    optimizer = NewtonCG(case.module.parameters(), 0.3, damping, 0.5, 0.1, matrix=matrix, rtol=1e-12, max_steps=500)
    dense = {"ggn": dense_ggn, "hessian": dense_hessian}[matrix]
    reference, theta = DenseNewton(dense, 0.3, damping, 0.5, 0.1), case.flat
    for step in range(20):
        some = torch.arange(len(case.inputs)).roll(step)[:6]
        inputs, targets = case.inputs[some], case.targets[some]
        batch = Case(name, case.module, case.loss, case.mean_loss, inputs, targets)
        theta = reference.step(theta, batch.outputs, lambda out, y=targets: case.mean_loss(out, y))
        optimizer.zero_grad()
        case.mean_loss(case.module(inputs), targets).backward()
        optimizer.step(objective=batch.objective())
        torch.testing.assert_close(flat(case.module), theta, rtol=1e-9, atol=1e-10)


def test_a_quadratic_is_minimised_in_one_step():
    torch.manual_seed(0)
    net = nn.Linear(5, 2).double()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    NewtonCG(net.parameters(), damping=0.0, rtol=1e-12, max_steps=13).step(
        objective=cv.Objective.of(net, "mse", [(x, y)])
    )
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], 1), y).solution
    torch.testing.assert_close(torch.cat([net.weight.T, net.bias[None]]).detach(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_without_a_start_the_iterates_are_those_of_conjugate_gradients(steps):
    A, b = rotated(tensor(1, 2, 3, 5, 8, 13, 21)), torch.arange(1.0, 8.0).double()
    found = truncated(A, torch.zeros(7).double(), damping=0.5, max_steps=steps) @ b
    expected = conjugate_gradients(A + 0.5 * torch.eye(7).double(), b, steps)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_more_steps_lower_the_quadratic_from_any_start():
    A, b = rotated(tensor(1e-3, 1e-2, 0.1, 1, 10, 100)), torch.ones(6).double()

    def phi(x: Tensor) -> float:
        return float(x @ A @ x / 2 - b @ x)

    for start in (torch.zeros(6).double(), torch.arange(6.0).double(), -b):
        values = [phi(truncated(A, start, max_steps=steps) @ b) for steps in range(1, 7)]
        assert all(later < before for before, later in zip([0.0, *values], values, strict=False))


def test_it_begins_with_the_best_multiple_of_the_start():
    """A tolerance that this meets is met by a multiple of the start, whose residual is at right angles to it."""
    A, b = rotated(tensor(1, 2, 4)), torch.ones(3).double()
    start = -3 * (torch.linalg.solve(A, b) + 0.01 * tensor(1, -1, 0))
    x = truncated(A, start, rtol=0.1) @ b
    torch.testing.assert_close(x / start, (x / start)[0].expand(3), rtol=1e-12, atol=0)
    assert abs(float(start @ (b - A @ x))) < 1e-12 and float((b - A @ x).norm() / b.norm()) < 0.1


def test_the_last_direction_saves_products():
    A, b = Counting(rotated(torch.logspace(-2, 2, 50, dtype=torch.float64))), torch.ones(50).double()
    first = TruncatedInverse(A, 1e-3, torch.zeros(50).double(), 1e-3, 200)
    x, fresh, A.products = first @ b, A.products, 0
    again = TruncatedInverse(A, 1e-3, x, 1e-3, 200) @ b
    assert A.products == 1 and fresh > 15
    torch.testing.assert_close(again, x, rtol=1e-2, atol=0)


def test_its_matrix_is_the_inverse_as_far_as_it_converges():
    case = case_of("classifier")
    optimizer = NewtonCG(case.module.named_parameters(), damping=0.1, rtol=1e-8)
    expected = torch.linalg.inv(case.dense_ggn() + 0.1 * torch.eye(len(case.flat)).double())
    optimizer.step(objective=case.objective())
    P = optimizer.operator()
    assert P.psd and P.symmetric
    torch.testing.assert_close(P.dense(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("b, expected", [((0.0, 1.0), (0.0, 1.0)), ((1.0, 0.0), (0.25, 0.0)), ((0.1, 1.0), (0.1, 1.0))])
def test_negative_curvature_ends_it_with_what_there_is(b, expected):
    """Curvatures 4 and -1: along the second axis, and where the first direction is more of it, the step is b itself."""
    found = truncated(torch.diag(tensor(4, -1)), torch.zeros(2).double()) @ tensor(*b)
    torch.testing.assert_close(found, tensor(*expected), rtol=1e-12, atol=1e-12)


def test_negative_curvature_that_is_met_late_leaves_a_direction_of_descent():
    A, b = rotated(tensor(-1, 1, 2, 3, 4, 5, 6, 7)), torch.ones(8).double()
    for start in (torch.zeros(8).double(), torch.arange(8.0).double(), -b):
        x = truncated(A, start) @ b
        assert x.isfinite().all() and float(b @ x) > 0
    early = truncated(A, torch.zeros(8).double()) @ b
    assert not torch.equal(early, b)  # it had begun


def test_a_saddle_is_left_by_the_hessian_with_a_line_search():
    """The product of two numbers is 1, and they begin near the saddle at (0, 0)."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(tensor(1e-3)), nn.Parameter(tensor(2e-3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a * self.b * x).unsqueeze(1)

    net, x = Product(), torch.ones(1).double()
    objective = cv.Objective.of(net, "mse", [(x, x[:, None])])
    optimizer = NewtonCG(net.parameters(), damping=0.0, matrix="hessian", control=Armijo())
    for _ in range(30):
        optimizer.step(objective=objective)
    assert abs(net.a.item() * net.b.item() - 1) < 1e-6


def test_levenberg_marquardt_lowers_the_damping_on_a_quadratic():
    torch.manual_seed(0)
    net = nn.Linear(5, 2).double()
    objective = cv.Objective.of(net, "mse", [(torch.randn(20, 5).double(), torch.randn(20, 2).double())])
    optimizer = NewtonCG(net.parameters(), control=LevenbergMarquardt(), max_steps=2)
    for step in range(1, 5):
        optimizer.step(objective=objective)
        assert optimizer.param_groups[0]["damping"] == pytest.approx((2 / 3) ** step, rel=1e-12)


def test_the_matrix_may_be_of_other_data_than_the_gradient():
    case = case_of("regression")
    part = Case("", case.module, case.loss, case.mean_loss, case.inputs[:4], case.targets[:4])
    g = torch.autograd.functional.jacobian(case.value, case.flat)
    expected = case.flat - torch.linalg.solve(part.dense_ggn() + torch.eye(len(g)).double(), g)
    case.mean_loss(case.module(case.inputs), case.targets).backward()
    NewtonCG(case.module.parameters(), rtol=1e-12).step(objective=part.objective())
    torch.testing.assert_close(flat(case.module), expected, rtol=1e-9, atol=1e-11)


def test_a_batch_that_is_not_finite_moves_nothing():
    case = case_of("regression")
    optimizer = NewtonCG(case.module.parameters(), momentum=0.9)
    optimizer.step(objective=case.objective())
    before = flat(case.module)
    optimizer.step(objective=case.objective().on([(case.inputs * torch.nan, case.targets)]))
    assert torch.equal(flat(case.module), before)
    optimizer.step(objective=case.objective())
    assert flat(case.module).isfinite().all() and not torch.equal(flat(case.module), before)
