"""What theory says of directions, of one optimizer after another: how they scale, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvature as cv
from curvature.optim import (
    EFCP,
    EGN,
    EKFAC,
    KFAC,
    MFAC,
    PSGD,
    SOAP,
    Armijo,
    KLShampoo,
    Muon,
    NewtonCG,
    Polyak,
    PreconditionedOptimizer,
    Shampoo,
)

Make = Callable[..., PreconditionedOptimizer]
PLAIN = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
NEWTON = {**PLAIN, "damping": 1e-12}
UNSCALED = {"lr": 1.0, "betas": (0.0, 0.9), "weight_decay": 0.0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "options", "degree"),
    [
        (MFAC, {**PLAIN, "window": 3, "graft": None}, -1),
        (EFCP, {**PLAIN, "window": 3, "graft": None, "density": 0.5}, -1),
        (Muon, {**PLAIN, "nesterov": False}, 0),
        (PSGD, PLAIN, 0),
        (Shampoo, {**UNSCALED, "graft": None, "eps": 1e-9}, 0),
        (Shampoo, {**UNSCALED, "graft": None, "eps": 1e-9, "exponent": 0.5}, 0),
        (SOAP, UNSCALED, 0),
        (KLShampoo, UNSCALED, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_by_what_degree_steps_scale_with_gradients(make: Make, options, degree):
    """The degree of a step by gradients is 1, by their root mean squares 0, and by a Fisher matrix -1: damping of that
    has the units of squares."""
    steps = []
    for scale in (1.0, 100.0):
        p = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
        optimizer = make([("w", p)], **options, **({"damping": 0.1 * scale**2} if degree == -1 else {}))
        for t in range(4):
            p.grad = scale * noise(5, 5, seed=t)
            optimizer.step()
        steps.append(p.detach().clone())
    torch.testing.assert_close(steps[1], steps[0] * 100.0**degree, rtol=1e-4, atol=1e-6)  # eps is no gradient


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (EGN, NEWTON),
        (NewtonCG, {**PLAIN, "damping": 0.0, "rtol": 1e-12}),
        (NewtonCG, {**PLAIN, "damping": 0.0, "rtol": 1e-12, "matrix": "hessian"}),
        (KFAC, {**NEWTON, "match": "none", "fisher": "type-2"}),
        (EKFAC, {**NEWTON, "match": "none", "fisher": "type-2"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("copies", [1, 50])
def test_newton_steps_do_not_depend_on_the_scale_of_the_loss(make: Make, options, copies):
    """The same data many times over have the same mean loss; the step is the least-squares solution."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3, bias=False).double(), noise(16, 4), noise(16, 3, seed=1)
    make(net.parameters(), **options).step(
        objective=cv.Objective.of(net, "mse", [(x.repeat(copies, 1), y.repeat(copies, 1))])
    )
    torch.testing.assert_close(net.weight.detach().T, torch.linalg.lstsq(x, y).solution, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Muon, {}),
        (Shampoo, {}),
        (SOAP, {}),
        (KLShampoo, {}),
        (MFAC, {"window": 3}),
        (EFCP, {"window": 3, "density": 0.5}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_units_may_come_in_any_order(make: Make, options):
    """Rows and columns of a matrix that change places take their updates along."""
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 4, 3, 1])
    p, q = (nn.Parameter(torch.zeros(5, 5, dtype=torch.float64)) for _ in range(2))
    one, other = (make([("w", w)], lr=1e-2, **options) for w in (p, q))
    for t in range(4):
        p.grad = noise(5, 5, seed=t)
        q.grad = p.grad[rows][:, columns]
        one.step()
        other.step()
    torch.testing.assert_close(q.detach(), p.detach()[rows][:, columns], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make, options", [(Shampoo, {"betas": (0.0, 0.9)}), (Muon, {"momentum": 0.0}), (SOAP, {"betas": (0.0, 0.9)})]
)
def test_a_polyak_step_meets_the_target_in_any_metric(make: Make, options):
    """f + g . (w+ - w) = target, whatever the matrix; and on a quadratic with one weight the step halves it."""
    p = nn.Parameter(noise(3, 2))
    A = noise(6, 6, seed=3)

    def loss() -> Tensor:
        return (A @ p.flatten()).square().sum() + 1

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer = make([("w", p)], lr=1.0, weight_decay=0.0, control=Polyak(target=0.5), **options)
    before, value = p.detach().clone(), loss().item()
    optimizer.step(closure)
    assert p.grad is not None
    reached = value + float((p.grad * (p.detach() - before)).sum())
    assert reached == pytest.approx(0.5, abs=1e-9)
    w = nn.Parameter(torch.full((1, 1), 3.0, dtype=torch.float64))
    halved = make([("w", w)], lr=1.0, weight_decay=0.0, control=Polyak(), **options)
    for _ in range(3):
        halved.zero_grad()
        w.square().sum().backward()
        halved.step(lambda: w.detach().square().sum())
    assert w.item() == pytest.approx(3 / 8, rel=1e-6)


@pytest.mark.parametrize("decrease", [0.1, 0.45])
def test_the_step_that_a_line_search_takes_lowers_the_loss_enough(decrease):
    """Armijo's condition, at the step that is kept, of a network whose whole Gauss-Newton step goes too far."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    objective = cv.Objective.of(net, "mse", [(noise(20, 3), noise(20, 1, seed=1).sign() * 3)])
    optimizer = EGN(net.parameters(), damping=1e-4, control=Armijo(decrease=decrease))
    shares = []
    for _ in range(6):
        before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        here = objective.with_state(net.state_dict())
        optimizer.step(objective=objective)
        step = nn.utils.parameters_to_vector(net.parameters()).detach() - before
        after = objective.with_state(net.state_dict()).value()
        assert after <= here.value() + decrease * float(here.gradient() @ step) + 1e-12
        shares.append(optimizer.param_groups[0]["scale"])
    assert min(shares) < 1
