"""Step controls: what they decide, by hand, on functions that are simple enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from objectives import zoo
from reference.gauss_newton import conjugate_gradients
from torch import Tensor, nn

import curvature as cv
from curvature.linalg.structured import Diagonal
from curvature.optim.control import Armijo, Fixed, LevenbergMarquardt, Polyak, QuadraticModel, StepControl
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.rules.gauss_newton import EGN
from curvature.optim.rules.muon import Muon
from curvature.optim.update import Momentum


@dataclass(frozen=True)
class Plain:
    """The identity, with a damping that it does not look at."""

    damping: float = 0.0
    needs: ClassVar[frozenset] = frozenset()
    grain: ClassVar = "model"

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block):
        return None

    def init(self, block):
        return {}

    def update(self, state, block, evidence, due):
        pass

    def operator(self, state, block, evidence, damping):
        return Diagonal(torch.ones_like(evidence.grad), psd=True)


def gradient_descent(params, lr: float, control: StepControl, damping: float = 0.0, **options):
    return PreconditionedOptimizer(params, lr, Plain(damping), momentum=Momentum(0.0), control=control, **options)


class Along:
    """A number x, a function of it, and a closure that counts its calls."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: float) -> None:
        self.x, self.function, self.calls = nn.Parameter(torch.tensor([start], dtype=torch.float64)), function, 0
        self.optimizer: PreconditionedOptimizer

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.function(self.x).sum()
        loss.backward()
        return loss

    def step(self, control: StepControl, lr: float, **options) -> float:
        self.optimizer = gradient_descent([self.x], lr, control, **options)
        self.optimizer.step(self.closure)
        return self.x.item()


def parabola(x: Tensor) -> Tensor:
    return x.square() / 2


def least_squares(count: int = 5, seed: int = 0) -> tuple[nn.Linear, cv.Objective]:
    """A quadratic function of `count` weights, with the matrix 2 X^T X / 9, which is its Gauss-Newton matrix too."""
    torch.manual_seed(seed)
    net = nn.Linear(count, 1, bias=False).double()
    X, y = torch.randn(9, count).double(), torch.randn(9, 1).double()
    return net, cv.Objective.of(net, "mse", [(X, y)])


def test_fixed_takes_the_whole_step_of_the_learning_rate():
    along = Along(parabola, 2.0)
    assert along.step(Fixed(), 0.25) == 1.5 and along.calls == 1


@pytest.mark.parametrize("lr, shrinks", [(1.0, 0), (1.79, 0), (1.81, 1), (5.0, 5)])
def test_armijo_takes_the_first_step_that_lowers_enough(lr, shrinks):
    """Along x(1 - a) the parabola falls by a tenth of its slope as long as a <= 1.8."""
    along = Along(parabola, 2.0)
    scale = 0.8**shrinks
    assert along.step(Armijo(), lr) == pytest.approx(2 * (1 - lr * scale), rel=1e-12)
    assert along.calls == 2 + shrinks
    assert along.optimizer.param_groups[0]["scale"] == pytest.approx(scale, rel=1e-12)


def test_armijo_begins_with_more_than_it_took_last():
    along = Along(parabola, 2.0)
    along.step(Armijo(), 5.0)
    start, along.calls = along.x.item(), 0
    along.optimizer.step(along.closure)
    scale = 1.5 * 0.8**5 * 0.8  # 5 x 0.49 is above 1.8, and 5 x 0.39 too
    scale *= 0.8
    assert along.x.item() == pytest.approx(start * (1 - 5 * scale), rel=1e-12) and along.calls == 4


def test_armijo_goes_back_to_the_last_bit_where_nothing_lowers():
    along = Along(parabola, 1 / 3)
    assert along.step(Armijo(trials=4), 100.0) == 1 / 3 and along.calls == 5
    assert along.optimizer.param_groups[0]["scale"] == pytest.approx(0.8**4)


def test_a_loss_that_is_no_number_is_too_high():
    along = Along(lambda x: torch.where(x > -1, parabola(x), math.nan), 2.0)
    assert along.step(Armijo(), 1.7) == pytest.approx(2 * (1 - 1.7 * 0.8), rel=1e-12)
    net, objective = least_squares()
    before = net.weight.detach().clone()
    optimizer = EGN(net.parameters(), lr=1e200, control=LevenbergMarquardt())
    optimizer.step(objective=objective)
    assert torch.equal(net.weight, before) and optimizer.param_groups[0]["damping"] == 1.5


@pytest.mark.parametrize("control", [Armijo(), Polyak()], ids=["armijo", "polyak"])
def test_gradients_are_those_of_the_point_before(control):
    along = Along(parabola, 2.0)
    along.step(control, 5.0)
    assert along.x.grad is not None and along.x.grad.item() == 2.0


def test_a_closure_that_fails_leaves_gradients():
    along = Along(parabola, 2.0)
    along.optimizer = gradient_descent([along.x], 5.0, Armijo())

    def closure() -> Tensor:
        if along.calls == 2:
            raise RuntimeError("out of data")
        return along.closure()

    with pytest.raises(RuntimeError, match="out of data"):
        along.optimizer.step(closure)
    assert along.x.grad is not None and along.x.grad.item() == 2.0


@pytest.mark.parametrize("lr, target, longest, expected", [(1.0, 0.0, math.inf, 1.0), (0.5, 0.0, math.inf, 1.5), (1.0, 1.0, math.inf, 1.5), (1.0, 3.0, math.inf, 2.0), (1.0, 0.0, 0.25, 1.5)])  # fmt: skip
def test_polyak_goes_to_where_the_tangent_reaches_the_target(lr, target, longest, expected):
    """The loss is 2 at 2, its slope 2: (2 - target) / 4 times the gradient."""
    assert Along(parabola, 2.0).step(Polyak(target, longest), lr) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize(("low", "high", "factor"), [(0.25, 0.75, 2 / 3), (0.25, 1.5, 1.0), (1.1, 1.5, 1.5)])
def test_levenberg_marquardt_predicts_a_quadratic_exactly(lr, low, high, factor):
    """The ratio of the two changes of the loss is 1, whatever the damping and the step."""
    net, objective = least_squares()
    optimizer = EGN(net.parameters(), lr, damping=2.0, control=LevenbergMarquardt(low, high))
    for step in range(1, 4):
        optimizer.step(objective=objective)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(2.0 * factor**step, rel=1e-12)


def test_damping_that_is_adapted_is_that_of_the_next_step():
    net, objective = least_squares()
    optimizer = EGN(net.parameters(), damping=3.0, control=LevenbergMarquardt())
    H, theta = cv.ggn(objective).dense(), net.weight.detach().flatten().clone()
    for step in range(3):
        g = objective.at(theta).gradient()
        theta = theta - torch.linalg.solve(H + 3.0 * (2 / 3) ** step * torch.eye(5).double(), g)
        optimizer.step(objective=objective)
        torch.testing.assert_close(net.weight.detach().flatten(), theta, rtol=1e-10, atol=1e-12)


def test_damping_stays_between_its_bounds():
    net, objective = least_squares()
    optimizer = EGN(net.parameters(), control=LevenbergMarquardt(least=0.5))
    for _ in range(4):
        optimizer.step(objective=objective)
    assert optimizer.param_groups[0]["damping"] == 0.5


@pytest.mark.parametrize("reject", [True, False])
def test_a_step_that_raises_the_loss_is_taken_back_to_the_last_bit(reject):
    case = next(case for case in zoo() if case.name == "classifier")
    before = [p.detach().clone() for p in case.module.parameters()]
    optimizer = EGN(case.module.parameters(), lr=50.0, damping=0.1, control=LevenbergMarquardt(reject=reject))
    optimizer.step(objective=case.objective())
    same = [torch.equal(p, q) for p, q in zip(case.module.parameters(), before, strict=True)]
    assert all(same) if reject else not any(same)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.15)


@pytest.mark.parametrize("control", [LevenbergMarquardt(), Armijo()], ids=["lm", "armijo"])
def test_groups_go_by_their_own_learning_rates(control):
    """The step of each, and what it is expected to change, which for a quadratic is what it does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double().requires_grad_(False)
    net[1].requires_grad_(True)
    objective = cv.Objective.of(net, "mse", [(torch.randn(9, 4).double(), torch.randn(9, 2).double())])
    groups = [{"params": [net[1].weight], "lr": 0.1}, {"params": [net[1].bias], "lr": 0.3}]
    weight, bias = net[1].weight.detach().clone(), net[1].bias.detach().clone()
    optimizer = EGN(groups, damping=1.0, control=control)
    optimizer.step(objective=objective)
    for p, start, lr in ((net[1].weight, weight, 0.1), (net[1].bias, bias, 0.3)):
        name = "1.weight" if p is net[1].weight else "1.bias"
        alone = objective.narrowed(name)
        d = torch.linalg.solve(cv.ggn(alone).dense() + torch.eye(p.numel()).double(), alone.gradient())
        torch.testing.assert_close(p.detach().flatten(), start.flatten() - lr * d, rtol=1e-10, atol=1e-12)
    if isinstance(control, LevenbergMarquardt):
        assert optimizer.param_groups[0]["damping"] == pytest.approx(2 / 3, rel=1e-12)


@pytest.mark.parametrize("control", [Fixed(), LevenbergMarquardt(), QuadraticModel()], ids=["fixed", "lm", "model"])
def test_weights_decay_whatever_becomes_of_the_step(control):
    net, objective = least_squares()
    start = net.weight.detach().clone()
    options = {"control": control, "weight_decay": 0.1}
    EGN(net.parameters(), lr=0.5, **options).step(objective=objective)
    twin, same = least_squares()
    EGN(twin.parameters(), lr=0.5, control=control).step(objective=same)
    torch.testing.assert_close(net.weight, twin.weight - 0.05 * start, rtol=1e-12, atol=1e-14)


def test_a_rejected_step_goes_back_to_where_the_weights_have_decayed_to():
    case = next(case for case in zoo() if case.name == "classifier")
    before = [p.detach().clone() for p in case.module.parameters()]
    control = LevenbergMarquardt()
    EGN(case.module.parameters(), lr=50.0, damping=0.1, weight_decay=1e-3, control=control).step(
        objective=case.objective()
    )
    for p, start in zip(case.module.parameters(), before, strict=True):
        assert torch.equal(p, start * (1 - 50.0 * 1e-3))


def test_losses_before_and_after_are_of_the_same_function():
    """The closure's is another, higher by far, and is not compared with the objective's."""
    case = next(case for case in zoo() if case.name == "classifier")
    before = [p.detach().clone() for p in case.module.parameters()]
    optimizer = EGN(case.module.parameters(), lr=50.0, damping=0.1, control=LevenbergMarquardt())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.mean_loss(case.module(case.inputs), case.targets)
        loss.backward()
        return loss + 1e6

    optimizer.step(closure, objective=case.objective())
    assert all(torch.equal(p, q) for p, q in zip(case.module.parameters(), before, strict=True))


@pytest.mark.parametrize("lr", [1.0, 7.0])
def test_a_quadratic_model_of_a_quadratic_makes_conjugate_gradients(lr):
    net, objective = least_squares(6)
    start, H = net.weight.detach().flatten().clone(), cv.ggn(objective).dense()
    iterates = conjugate_gradients(H, -objective.gradient(), 6)
    optimizer = gradient_descent(net.parameters(), lr, QuadraticModel())
    for x in iterates[1:]:
        net.weight.grad = objective.at(net.weight.detach().flatten()).gradient().view_as(net.weight)
        optimizer.step(objective=objective)
        torch.testing.assert_close(net.weight.detach().flatten(), start + x, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(H @ (start - net.weight.detach().flatten()), objective.gradient(), rtol=1e-6, atol=1e-8)


def test_a_quadratic_model_takes_the_best_of_two_directions_with_the_damping_of_the_rule():
    net, objective = least_squares(4)
    optimizer = gradient_descent(net.parameters(), 0.2, QuadraticModel(), damping=0.7)
    A = cv.ggn(objective).dense() + 0.7 * torch.eye(4).double()
    theta, last = net.weight.detach().flatten().clone(), torch.zeros(4).double()
    for step in range(4):
        g = objective.at(theta).gradient()
        V = torch.stack([-g, last], dim=1) if step else -g[:, None]
        last = V @ torch.linalg.solve(V.T @ A @ V, -V.T @ g)
        theta = theta + last
        net.weight.grad = g.view_as(net.weight)
        optimizer.step(objective=objective)
        torch.testing.assert_close(net.weight.detach().flatten(), theta, rtol=1e-9, atol=1e-11)


def test_a_quadratic_model_moves_nothing_whose_learning_rate_is_zero():
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    objective = cv.Objective.of(net, "mse", [(torch.randn(5, 3).double(), torch.randn(5, 2).double())])
    optimizer = EGN([{"params": [net.weight]}, {"params": [net.bias]}], control=QuadraticModel())
    optimizer.step(objective=objective)
    bias, weight = net.bias.detach().clone(), net.weight.detach().clone()
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step(objective=objective)
    assert torch.equal(net.bias, bias) and not torch.equal(net.weight, weight)


@pytest.mark.parametrize("control", [LevenbergMarquardt(), Armijo(), QuadraticModel()], ids=["lm", "armijo", "model"])
def test_what_controls_remember_is_saved(control):
    (net, objective), (twin, same) = least_squares(), least_squares()
    optimizer, resumed = (EGN(n.parameters(), 2.5, control=control) for n in (net, twin))
    for _ in range(3):
        optimizer.step(objective=objective)
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        optimizer.step(objective=objective)
        resumed.step(objective=same)
        assert torch.equal(net.weight, twin.weight)


def test_controls_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="adapts the damping of a matrix, and this optimizer has none"):
        Muon([nn.Parameter(torch.zeros(2, 2))], control=LevenbergMarquardt())
    with pytest.raises(ValueError, match="Armijo lowers a loss"):
        Muon([nn.Parameter(torch.zeros(2, 2))], control=Armijo(), maximize=True)
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    with pytest.raises(cv.NeedsEvidence, match="Armijo compares the loss before and after a step"):
        Muon([p], control=Armijo()).step()
