"""The exact inverse of the GGN of few data, and the gradients of single examples that its Gram matrix is made like."""

from __future__ import annotations

import pytest
import torch
from objectives import Case, zoo
from torch import Tensor, nn

import curvature as cv

CASES = [
    case
    for case in zoo()
    if "ggn" in cv.Objective.of(case.module, case.loss, [(case.inputs, case.targets)]).loss.offers
]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def sizes(case: Case) -> tuple[int, ...]:
    return 2, len(case.inputs) - 5, 3


def residual_net(channels: int = 4) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            self.scale = nn.Parameter(torch.ones(channels, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.tanh(self.norm(self.conv(x)))

    torch.manual_seed(3)
    head = [nn.Flatten(), nn.Linear(channels * 16, 3)]
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), Block(), Block(), *head).double()


def images(mode: str = "eval") -> cv.Objective:
    torch.manual_seed(4)
    x, y = torch.randn(8, 1, 4, 4).double(), torch.randint(0, 3, (8,))
    return cv.Objective.of(residual_net(), "cross-entropy", [(x[:5], y[:5]), (x[5:], y[5:])], mode=mode)


@EVERY
@pytest.mark.parametrize("memory", ["auto", 1.0])
def test_it_is_the_ggn_with_its_inverse(case, memory):
    objective = case.objective(sizes(case), l2=0.01)
    dense = case.dense_ggn() + 0.01 * torch.eye(objective.space.size).double()
    A = cv.egn(objective, memory=memory)
    torch.testing.assert_close(A.dense(), dense, rtol=1e-10, atol=1e-12)
    inverse = torch.linalg.inv(dense + 1e-3 * torch.eye(len(dense)).double())
    torch.testing.assert_close(cv.inverse(A, damping=1e-3).dense(), inverse, rtol=1e-10, atol=1e-10)
    assert isinstance(A, cv.Outer) == (A.shape[0] > case.outputs(case.flat).numel())
    assert float(cv.trace(A)) == pytest.approx(float(dense.trace()), rel=1e-10)
    expected = float(torch.linalg.slogdet(dense + 1e-3 * torch.eye(len(dense)).double()).logabsdet)
    assert float(cv.logdet(A, damping=1e-3)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_convolutions_norms_and_parameters_without_a_layer(mode):
    """Layers whose gradients are kept, whose cotangents are, that batch statistics couple, and that are none; in as
    many passes as memory asks for."""
    objective = images(mode)
    A = cv.egn(objective)
    assert isinstance(A, cv.Outer)
    torch.testing.assert_close(A.dense(), cv.ggn(objective).dense(), rtol=1e-10, atol=1e-12)
    for memory in (20e3, 1.0):
        again = cv.egn(objective, memory=memory)
        assert isinstance(again, cv.Outer)
        torch.testing.assert_close(again.gram, A.gram, rtol=1e-10, atol=1e-12)


@EVERY
def test_the_direction_is_that_of_the_dense_damped_system(case):
    objective = case.objective()
    exact = torch.linalg.solve(case.dense_ggn() + 1e-2 * torch.eye(objective.space.size).double(), objective.gradient())
    direction = cv.inverse(cv.egn(objective), damping=1e-2) @ objective.gradient()
    torch.testing.assert_close(direction, exact, rtol=1e-10, atol=1e-10)


def test_large_damping_is_gradient_descent():
    objective = images()
    step = cv.inverse(cv.egn(objective), damping=1e8) @ objective.gradient()
    torch.testing.assert_close(step * 1e8, objective.gradient(), rtol=1e-6, atol=1e-8)


def test_small_damping_interpolates_with_the_least_change():
    """A linear model with fewer examples than weights: the step is the pseudo-inverse of the inputs."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 8).double(), torch.randn(5, 1).double()
    objective = cv.Objective.of(nn.Linear(8, 1, bias=False).double(), "mse", [(x, y)])
    step = cv.inverse(cv.egn(objective), damping=1e-7) @ objective.gradient()
    weights = objective.params["weight"].reshape(-1) - step
    nearest = objective.params["weight"].reshape(-1) + torch.linalg.pinv(x) @ (
        y[:, 0] - x @ objective.params["weight"][0]
    )
    torch.testing.assert_close(weights, nearest, rtol=1e-5, atol=1e-6)


def test_a_shift_of_all_logits_changes_nothing():
    case = next(case for case in CASES if case.name == "classifier")
    direction = cv.inverse(cv.egn(case.objective()), damping=1e-3) @ case.objective().gradient()

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = case.module

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + 5.0

    objective = cv.Objective.of(Shifted(), case.loss, [(case.inputs, case.targets)])
    shifted = cv.inverse(cv.egn(objective), damping=1e-3) @ objective.gradient()
    torch.testing.assert_close(shifted, direction, rtol=1e-9, atol=1e-12)


def test_float32_solves_the_system_of_its_own_products():
    objective = images().to(dtype=torch.float32)
    A = cv.egn(objective)
    b = objective.gradient()
    x = cv.inverse(A, damping=1e-2) @ b
    assert float((A @ x + 1e-2 * x - b).norm() / b.norm()) < 1e-4


def test_the_source_says_what_it_is():
    A = cv.egn(images())
    assert A.source["operator"] == "egn" and A.source["parameters"] == A.shape[0]
    assert set(A.source) >= {"fingerprint", "loss"}


def test_what_has_no_rows_is_refused(monkeypatch):
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    with pytest.raises(TypeError, match="takes an Objective"):
        cv.egn(nn.Linear(3, 1))  # pyright: ignore[reportArgumentType]
    scalar = cv.Objective.from_loss(nn.Linear(3, 1), lambda m, b: m(b[0]).square().mean(), [(x, y)])
    with pytest.raises(cv.BadObjective, match=r"Objective\.of"):
        cv.egn(scalar)
    monkeypatch.setattr("curvature.linalg.memory.free_bytes", lambda device: 100)
    with pytest.raises(cv.TooLarge, match="matrix-free ggn"):
        cv.egn(images())


def test_long_work_is_announced_with_its_numbers(monkeypatch):
    net, x = nn.Linear(3, 2), torch.randn(2, 3)
    objective = cv.Objective.of(net, "mse", [(x, torch.zeros(2, 2))])
    cv.egn(objective)
    monkeypatch.setattr("curvature.operators.egn.LONG", 191)  # 4^2 (8 + 4) = 192
    with pytest.warns(UserWarning, match="of 4 outputs and 8 parameters takes about 2e[+]02 multiplications"):
        cv.egn(objective)


@EVERY
def test_example_gradients_are_those_of_each_example_alone(case):
    objective = case.objective(sizes(case))
    rows = cv.example_gradients(objective)
    for i, row in enumerate(rows):
        alone = objective.on([(case.inputs[i : i + 1], case.targets[i : i + 1])])
        terms = float(objective.function.weight((case.inputs[i : i + 1], case.targets[i : i + 1])))
        expected = alone.gradient() * terms if terms else torch.zeros_like(row)
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_example_gradients_sum_to_that_of_the_objective(mode):
    objective = images(mode)
    torch.testing.assert_close(cv.example_gradients(objective).sum(0) / 8, objective.gradient(), rtol=1e-9, atol=1e-12)


def test_example_gradients_of_any_loss_of_outputs():
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    objective = cv.Objective.of(nn.Linear(3, 2).double(), nn.SmoothL1Loss(), [(x, y)])
    rows = cv.example_gradients(objective)
    torch.testing.assert_close(rows.sum(0) / 6, objective.gradient(), rtol=1e-9, atol=1e-12)


def test_outputs_of_another_dtype_than_the_parameters():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).float()

    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    objective = cv.Objective.of(Single(), "cross-entropy", [(x, y)], dtype=torch.float64)
    A = cv.egn(objective)
    torch.testing.assert_close(A.dense(), cv.ggn(objective).dense(), rtol=1e-5, atol=1e-6)


def test_a_large_parameter_without_a_layer_is_refused_where_it_does_not_fit(monkeypatch):
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.layer = nn.Parameter(torch.zeros(50)), nn.Linear(50, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.place)

    objective = cv.Objective.of(Placed(), "mse", [(torch.randn(5, 50), torch.randn(5, 2))])
    monkeypatch.setattr("curvature.linalg.memory.free_bytes", lambda device: 4 * 8 * 10**2 / 0.8)
    cv.egn(objective)
    monkeypatch.setattr("curvature.operators.egn._need_square", lambda size, space: None)
    monkeypatch.setattr("curvature.linalg.memory.free_bytes", lambda device: 4 * 10 * 50)
    with pytest.raises(cv.TooLarge, match="without a layer"):
        cv.egn(objective)


def test_data_without_terms_are_refused():
    x, y = torch.randn(4, 3), torch.full((4,), -100)
    objective = cv.Objective.of(nn.Linear(3, 3), "cross-entropy", [(x, y)])
    for question in (cv.example_gradients, lambda o: cv.gradient_window(o, 2)):
        with pytest.raises(cv.BadObjective, match="no terms"):
            question(objective)
