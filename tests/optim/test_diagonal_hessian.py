"""Sophia and AdaHessian against dense Hessians, what the formulas say of single steps, and where others went wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import diagonal_hessian as reference
from torch import Tensor, nn

import curvature as cv
from curvature.operators.hessian import gradient_and_products, hessian
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.rules.diagonal_hessian import AdaHessian, SophiaG, SophiaH, gauss_newton_bartlett, hutchinson

SHAPES = [(2, 1, 3), (2,), (3, 8), (3,)]
KINDS = [SophiaG, SophiaH, AdaHessian]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Sequential:
    """A convolution with a kernel of three axes, and a matrix."""
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))
    return 2 * normal(size, 1, 6, seed=seed), targets


class Point(nn.Module):
    """Parameters without a model: `theta` is all there is."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def stepped(optimizer: PreconditionedOptimizer, point: Point, loss, **options: Any) -> None:
    """One step on a loss of `theta`."""
    optimizer.zero_grad()
    loss(point.theta).backward()
    objective = cv.Objective.from_loss(point, lambda module, _: loss(module.theta), [torch.zeros(1)], **options)
    optimizer.step(objective=objective)


CASES = {
    "sophia-g": (SophiaG, {"betas": (0.9, 0.5), "rho": 0.5, "every": 3}),
    "sophia-h": (SophiaH, {"betas": (0.9, 0.5), "rho": 0.5, "every": 3}),
    "adahessian": (AdaHessian, {}),
    "adahessian, paper": (AdaHessian, {"averaging": "paper", "every": 2}),
    "adahessian, runs": (AdaHessian, {"run": 5, "power": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_the_dense_hessian(name):
    kind, options = CASES[name]
    net = network()
    nn.utils.vector_to_parameters(theta := normal(35, seed=3) / 2, net.parameters())
    optimizer = kind(net.parameters(), lr=0.02, weight_decay=0.1, **options)
    if kind is AdaHessian:
        of_reference = {"betas": (0.9, 0.999), "eps": 1e-4, "power": 1.0, "every": 1} | options
        run, averaging = of_reference.pop("run", None), of_reference.pop("averaging", "released")
        twin = reference.AdaHessian(0.02, decay=0.1, **of_reference)
    else:
        twin = reference.Sophia(0.02, eps=1e-12, decay=0.1, **options)

    def logits(flat: Tensor) -> Tensor:
        kernel, shift, matrix, bias = (
            t.view(shape) for t, shape in zip(flat.split([6, 2, 24, 3]), SHAPES, strict=True)
        )
        return nn.functional.conv1d(x, kernel, shift).tanh().flatten(1) @ matrix.T + bias

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(flat), y)

    def estimate(seed: int) -> Tensor:
        if kind is SophiaG:
            return reference.bartlett(logits, theta, seed)
        diagonal = reference.hutchinson(loss, theta, seed)
        return reference.smoothed(diagonal, SHAPES, run, averaging == "released") if kind is AdaHessian else diagonal

    for step in range(20):
        x, y = batch(100 + step)
        theta = twin.step(theta, torch.func.grad(loss)(theta), estimate)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]))
        torch.testing.assert_close(
            nn.utils.parameters_to_vector(net.parameters()).detach(), theta, rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("curvature", [0.0, -2.0])
def test_without_positive_curvature_sophia_goes_by_signs(curvature):
    slope, point = normal(9), Point(normal(9, seed=1))
    start = point.theta.detach().clone()
    optimizer = SophiaH([point.theta], lr=0.1, weight_decay=0.0)
    stepped(optimizer, point, lambda t: slope @ t + curvature / 2 * t.square().sum())
    torch.testing.assert_close(start - point.theta.detach(), 0.1 * (slope + curvature * start).sign())


def test_sophia_with_the_curvature_as_it_is_takes_a_newton_step():
    h, point = torch.logspace(0, 4, 9, dtype=torch.float64), Point(normal(9).clamp(-0.9, 0.9))
    optimizer = SophiaH([point.theta], lr=1.0, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0)
    stepped(optimizer, point, lambda t: (h * t.square()).sum() / 2)
    torch.testing.assert_close(point.theta.detach(), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-14)


def test_sophia_leaves_a_maximum_that_newton_goes_to():
    def loss(t: Tensor) -> Tensor:
        a, b = t
        return 8 * (a - 1) ** 2 * (1.3 * a**2 + 2 * a + 1) + (b - 4) ** 2 / 2

    ends = []
    for clipped in (True, False):
        point = Point(torch.tensor([0.2, 0.0], dtype=torch.float64))
        optimizer = SophiaH([point.theta], lr=0.8, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0, every=1)
        for _ in range(50):
            if clipped:
                stepped(optimizer, point, loss)
            else:
                g, H = (
                    f(loss, point.theta.detach())
                    for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
                )
                point.theta.data -= g / H.diagonal()
        ends.append(point.theta.detach())
    torch.testing.assert_close(ends[0], torch.tensor([1.0, 4.0], dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(ends[1], torch.tensor([0.0, 4.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_no_entry_moves_by_more_than_the_learning_rate(kind):
    net = network()
    optimizer, moved = kind(net.parameters(), lr=0.03, weight_decay=0.0, every=2), []
    for step in range(10):
        before = nn.utils.parameters_to_vector(net.parameters()).detach()
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]))
        moved.append((nn.utils.parameters_to_vector(net.parameters()).detach() - before).abs())
    assert float(torch.stack(moved).max()) <= 0.03 * (1 + 1e-12)
    assert 0 < float((torch.stack(moved) < 0.0299).double().mean()) < 1


def test_the_mean_of_sampled_squares_is_the_diagonal_of_softmax_regression():
    """(1/B) sum over examples of x_d^2 p_c (1 - p_c)."""
    net, x = nn.Linear(4, 3, bias=False).double(), normal(10, 4)
    nn.utils.vector_to_parameters(normal(12, seed=5), net.parameters())
    y = torch.zeros(10, dtype=torch.int64)
    p = net(x).softmax(1).detach()
    exact = ((p * (1 - p)).T @ x.square() / 10).flatten()
    objective = cv.Objective.of(net, "cross-entropy", [(x, y)])
    draws = torch.stack([gauss_newton_bartlett(objective, 50, seed) for seed in range(40)])
    z = (draws.mean(0) - exact) / (draws.std(0) / 40**0.5)
    assert float(z.abs().max()) < 4
    assert float(draws.std(0).mean() / exact.mean()) < 0.5  # so that a factor of two would be seen
    torch.testing.assert_close(cv.ggn_diagonal(objective).entries, exact, rtol=1e-10, atol=1e-12)


def test_tokens_are_counted_and_those_that_are_ignored_are_not():
    net, x = nn.Linear(4, 3).double(), normal(6, 5, 4)
    y = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(1))
    y[:, 3:] = -100
    objective = cv.Objective.of(net, cv.CrossEntropy(axis=-1), [(x, y)])
    exact = cv.ggn_diagonal(objective).entries
    draws = torch.stack([gauss_newton_bartlett(objective, 50, seed) for seed in range(40)])
    assert float(((draws.mean(0) - exact) / (draws.std(0) / 40**0.5)).abs().max()) < 4
    kept = cv.Objective.of(net, "cross-entropy", [(x[:, :3].reshape(18, 4), y[:, :3].reshape(18))])
    torch.testing.assert_close(exact, cv.ggn_diagonal(kept).entries, rtol=1e-10, atol=1e-12)


def test_what_is_sampled_does_not_depend_on_how_the_data_are_cut():
    net = network()
    x, y = batch(1)
    whole = cv.Objective.of(net, "cross-entropy", [(x, y)], l2=0.1)
    cut = cv.Objective.of(net, "cross-entropy", [(x[:3], y[:3]), (x[3:], y[3:])], l2=0.1)
    torch.testing.assert_close(gauss_newton_bartlett(whole, 3, 7), gauss_newton_bartlett(cut, 3, 7), rtol=1e-10, atol=0)
    assert float(gauss_newton_bartlett(whole, 3, 7).min()) >= 0.1


def test_one_probe_estimates_the_diagonal_and_its_square_the_rows():
    A = normal(6, 6)
    H = A @ A.T
    point = Point(normal(6, seed=1))
    objective = cv.Objective.from_loss(point, lambda m, _: m.theta @ H @ m.theta / 2, [torch.zeros(1)])
    draws = torch.stack([hutchinson(objective, 1, seed) for seed in range(1000)])
    of_squares = draws.square()
    for values, expected in ((draws, H.diagonal()), (of_squares, H.square().sum(1))):
        assert float(((values.mean(0) - expected) / (values.std(0) / 1000**0.5)).abs().max()) < 4
    torch.testing.assert_close(draws.var(0), H.square().sum(1) - H.diagonal().square(), rtol=0.25, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_adahessian_minimises_a_diagonal_quadratic_at_once(seed):
    h, point = torch.logspace(0, 4, 9, dtype=torch.float64), Point(normal(9))
    optimizer = AdaHessian([point.theta], lr=1.0, eps=1e-30, betas=(0.7, 0.3), seed=seed)
    stepped(optimizer, point, lambda t: (h * (t - 3).square()).sum() / 2)
    torch.testing.assert_close(point.theta.detach(), torch.full((9,), 3.0, dtype=torch.float64), rtol=1e-13, atol=0)


def test_of_a_full_hessian_adahessian_comes_to_the_norms_of_its_rows():
    A, point = normal(5, 5), Point(normal(5))
    H = A @ A.T
    optimizer = AdaHessian([point.theta], lr=0.0, betas=(0.0, 0.9999), eps=1e-30)
    for _ in range(400):
        stepped(optimizer, point, lambda t: t @ H @ t / 2)
    found = 1 / optimizer.operator().dense().diagonal()
    torch.testing.assert_close(found, H.norm(dim=1), rtol=0.1, atol=0)  # five standard errors of 400 probes
    assert float((found / H.diagonal()).max()) > 1.2


def test_with_runs_as_long_as_parameters_each_has_one_step_size():
    net = network()
    optimizer = AdaHessian(net.parameters(), lr=0.1, run=1000)
    x, y = batch(1)
    before = [p.detach().clone() for p in net.parameters()]
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]))
    for p, start in zip(net.parameters(), before, strict=True):
        ratios = (p.detach() - start) / p.grad
        torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_kernels_of_convolutions_of_any_dimension_have_one_curvature_each(kind):
    net = nn.Sequential(kind(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x = normal(4, 2, *[3] * (net[0].weight.ndim - 2))
    net(x)
    optimizer = AdaHessian(net.parameters())
    y = torch.tensor([0, 1, 2, 0])
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]))
    curvature = optimizer.state[net[0].weight]["curvature"].view(3, 2, -1)
    torch.testing.assert_close(curvature, curvature[..., :1].expand_as(curvature), rtol=0, atol=0)
    assert len(curvature.unique()) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_made_when_due_and_used_at_once(kind):
    net = network()
    optimizer, changed, steps = kind(net.parameters(), every=4), [], []
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        held = [optimizer.state[p]["curvature"].clone() for p in net.parameters() if p in optimizer.state]
        objective = cv.Objective.of(net, "cross-entropy", [(x, y)]) if step % 4 == 0 else None
        optimizer.step(objective=objective)
        now = [optimizer.state[p]["curvature"] for p in net.parameters()]
        if not held or not all(map(torch.equal, now, held)):
            changed.append(step)
        steps.append(int(optimizer.state[next(net.parameters())]["block.estimates"]))
    assert changed == [0, 4, 8]
    assert steps == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_asked_for_when_an_estimate_is_due_and_only_then(kind):
    net = network()
    x, y = batch(0)
    optimizer = kind(net.parameters(), every=3)

    def step(given: bool) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]) if given else None)

    for given in (True, False, False, True, False, False):
        step(given)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(cv.NeedsEvidence, match="needs the mini-batch as a function of the parameters"):
        step(False)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    step(True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    step(False)
    extra = optimizer.param_groups[1]["params"][0]
    extra.grad = torch.ones_like(extra)
    with pytest.raises(cv.NeedsEvidence):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_embedding_that_were_never_seen_stay(kind):
    net = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    before = net[0].weight.detach().clone()
    optimizer = kind(net.parameters(), lr=0.01, weight_decay=0.0, every=2)
    for step in range(5):
        x = torch.randint(0, 4, (8, 2), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x[:, 0] % 2).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, x[:, 0] % 2)]))
    assert torch.equal(net[0].weight[4:], before[4:])
    assert bool(net[0].weight.isfinite().all()) and bool((net[0].weight[:4] != before[:4]).all())


@pytest.mark.parametrize("kind, factor", [(SophiaH, 10.0), (AdaHessian, 10.0)])
def test_a_multiple_of_the_loss_takes_the_same_steps(kind, factor):
    ends = []
    for scale in (1.0, factor):
        point = Point(normal(6))
        optimizer = kind([point.theta], lr=0.05, **({"eps": 1e-30} if kind is AdaHessian else {"every": 2}))
        for _ in range(6):
            stepped(optimizer, point, lambda t, scale=scale: scale * (t.cosh().sum() + t.sum() ** 2))
        ends.append(point.theta.detach())
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_that_are_not_finite_are_left_out_and_end_the_run_when_they_stay(kind, monkeypatch):
    net = network()
    x, y = batch(0)

    def step(optimizer: PreconditionedOptimizer, bad: bool) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        with monkeypatch.context() as patched:
            if bad:
                rule = type(optimizer.preconditioner)
                patched.setattr(rule, "estimate", lambda *_: torch.full((35,), math.nan, dtype=torch.float64))
            optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]))

    with pytest.raises(cv.NonFinite, match="were not finite, 1 in a row"):
        step(kind(net.parameters(), every=1), bad=True)
    optimizer = kind(net.parameters(), every=1)
    step(optimizer, bad=False)
    held = optimizer.state[net[0].weight]["curvature"].clone()
    for _ in range(2):
        step(optimizer, bad=True)
    assert torch.equal(optimizer.state[net[0].weight]["curvature"], held)
    with pytest.raises(cv.NonFinite, match="were not finite, 3 in a row"):
        step(optimizer, bad=True)
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_losses_that_are_no_likelihood_are_refused_by_name():
    net = network()
    x, y = batch(0)
    optimizer = SophiaG(net.parameters())
    nn.functional.cross_entropy(net(x), y).backward()
    objective = cv.Objective.of(net, lambda outputs, targets: outputs.square().mean(), [(x, y)])
    with pytest.raises(cv.BadObjective, match="Gauss-Newton-Bartlett"):
        optimizer.step(objective=objective)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_backward_pass_the_gradient_is_that_of_the_objective_and_frozen_parameters_stay(kind):
    net, twin = network(), network()
    twin.load_state_dict(net.state_dict())
    x, y = batch(0)
    for model, backward in ((net, True), (twin, False)):
        model[0].weight.requires_grad_(False)
        optimizer, before = kind(model.parameters(), lr=0.01), model[0].weight.clone()
        for _ in range(3):
            optimizer.zero_grad()
            if backward:
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step(objective=cv.Objective.of(model, "cross-entropy", [(x, y)]))
        assert torch.equal(model[0].weight, before) and not model[0].bias.equal(network()[0].bias)
    for p, q in zip(list(net.parameters())[1:], list(twin.parameters())[1:], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [SophiaH, AdaHessian])
def test_gradient_and_product_come_of_one_pass_where_none_is_given(kind):
    net, twin = network(), network()
    twin.load_state_dict(net.state_dict())
    calls: list[nn.Module] = []
    twin.register_forward_hook(lambda module, *_: calls.append(module))
    optimizer, other = kind(net.parameters(), lr=0.1, every=2), kind(twin.parameters(), lr=0.1, every=2)
    for seed in range(4):
        x, y = batch(seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(x, y)]))
        checked, before = seed > 0, len(calls)
        other.step(objective=cv.Objective.of(twin, "cross-entropy", [(x, y)]))
        assert len(calls) - before == 1 or not checked  # the first step checks the model
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)
    slab = other.slabs[0]
    assert float(slab.state["block.estimates"]) == 2


def test_gradient_and_products_are_those_of_each_alone():
    net = network()
    objective = cv.Objective.of(net, "cross-entropy", [batch(0), batch(1, size=5)], l2=0.3)
    rows = normal(3, 35, seed=4)
    gradient, products = gradient_and_products(objective, rows)
    torch.testing.assert_close(gradient, objective.gradient(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(products, rows @ hessian(objective).dense(), rtol=1e-10, atol=1e-12)
