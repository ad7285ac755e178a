"""Hypergradients against closed forms, against retraining, and against derivatives through unrolled training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature as cv

GENERATOR = torch.Generator().manual_seed(3)
X, HELD_OUT = (torch.randn(n, 5, generator=GENERATOR, dtype=torch.float64) for n in (20, 11))
Y, WANTED = (torch.randn(n, 2, generator=GENERATOR, dtype=torch.float64) for n in (20, 11))
LABELS, WANTED_LABELS = (torch.randint(0, 3, (n,), generator=GENERATOR) for n in (20, 11))


def variable(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def linear(outputs: int, weight: Tensor) -> nn.Linear:
    model = nn.Linear(5, outputs, bias=False).double()
    model.weight.data = weight.detach().clone()
    return model


def ridge(weight: Tensor, decay: Tensor, sizes: tuple[int, ...] = (20,)) -> cv.Objective:
    """Half the mean square of the residuals, and a penalty for each input."""

    def loss(model: Any, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().sum(1).mean() / 2 + (decay * model.weight.square()).sum() / 2

    batches = list(zip(X.split(list(sizes)), Y.split(list(sizes)), strict=True))
    return cv.Objective.from_loss(linear(2, weight), loss, batches)


def ridge_minimum(decay: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X / 20 + torch.diag(decay.expand(5)), X.T @ Y / 20).T


def held_out(weight: Tensor) -> cv.Objective:
    return cv.Objective.of(linear(2, weight), cv.SquaredError(scale=1, over="examples"), (HELD_OUT, WANTED))


def differences(function, at: Tensor, step: float = 1e-5) -> Tensor:
    """Central ones."""
    at = at.detach()
    slopes = torch.zeros_like(at)
    for index in range(at.numel()):
        e = torch.zeros_like(at)
        e.view(-1)[index] = step
        slopes.view(-1)[index] = (function(at + e) - function(at - e)) / (2 * step)
    return slopes


@pytest.mark.parametrize("sizes", [(20,), (3, 9, 8)])
@pytest.mark.parametrize("decays", [(0.3,), (0.3, 0.1, 1.0, 2.0, 0.5)])
@pytest.mark.parametrize("method", ["auto", "cg"])
def test_ridge_penalties_against_the_closed_form_and_retraining(decays, method, sizes):
    decay = variable(*decays)
    weight = ridge_minimum(decay.detach())
    found = cv.hypergradient(ridge(weight, decay, sizes), held_out(weight), decay, method=method, rtol=1e-12)
    slope = (weight @ HELD_OUT.T - WANTED.T) @ HELD_OUT / 11
    inverse = torch.linalg.inv(X.T @ X / 20 + torch.diag(decay.detach().expand(5)))
    closed = -((slope @ inverse) * weight).sum(0)
    closed = closed.sum(0, keepdim=True) if len(decays) == 1 else closed
    (gradient,) = found.gradients
    torch.testing.assert_close(gradient, closed, rtol=1e-9, atol=0)

    def retrained(values: Tensor) -> float:
        return held_out(ridge_minimum(values)).value()

    torch.testing.assert_close(gradient, differences(retrained, decay), rtol=1e-8, atol=1e-10)
    assert found.converged.all() and found.stationarity < 1e-14 and abs(found.excess) < 1e-14
    assert found.cost.products > 0 and found.origin.question == "hypergradient"


def logistic_minimum(decay: Tensor, weights: Tensor, near: Tensor | None = None) -> Tensor:
    """By Newton's method, of the weighted cross-entropy with a decay for each parameter."""

    def value(flat: Tensor) -> Tensor:
        losses = F.cross_entropy(X @ flat.view(3, 5).T, LABELS, reduction="none")
        return (weights * losses).mean() + (decay.reshape(-1) * flat.square()).sum() / 2

    flat = torch.zeros(15, dtype=torch.float64) if near is None else near.flatten()
    for _ in range(10 if near is None else 3):
        gradient = torch.autograd.functional.jacobian(value, flat)
        flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(value, flat), gradient)
    return flat.view(3, 5)


def test_a_decay_for_each_weight_and_weights_of_examples_against_retraining():
    """More of them than there are parameters, with names, and one of them also in the outer loss."""
    decay = (0.05 + torch.rand(3, 5, generator=GENERATOR, dtype=torch.float64)).requires_grad_()
    weights = (0.5 + torch.rand(20, generator=GENERATOR, dtype=torch.float64)).requires_grad_()
    weight = logistic_minimum(decay.detach(), weights.detach())
    model = linear(3, weight)

    def fit(model, batch):
        x, y, weights = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (weights * losses).mean() + (decay * model.weight.square()).sum() / 2

    def outside(weight: Any, decay: Tensor) -> Tensor:
        return F.cross_entropy(HELD_OUT @ weight.T, WANTED_LABELS) + decay.square().sum() / 10

    inner = cv.Objective.from_loss(model, fit, (X, LABELS, weights), terms=lambda batch: len(batch[0]), batch_size=7)
    outer = cv.Objective.from_loss(
        model, lambda model, batch: outside(model.weight, decay), [(HELD_OUT, WANTED_LABELS)], terms=lambda batch: 11
    )
    found = cv.hypergradient(inner, outer, {"decay": decay, "weights": weights}, rtol=1e-12)
    assert found.stationarity < 1e-14 and found.names == ("decay", "weights")

    def of_decay(values: Tensor) -> float:
        return float(outside(logistic_minimum(values, weights.detach(), weight), values))

    def of_weights(values: Tensor) -> float:
        return float(outside(logistic_minimum(decay.detach(), values, weight), decay.detach()))

    torch.testing.assert_close(found["decay"], differences(of_decay, decay), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found["weights"], differences(of_weights, weights), rtol=1e-7, atol=1e-9)


def test_the_data_themselves_may_be_what_is_learned():
    """Derivatives with respect to the inputs and targets of a ridge regression, of which the minimum has a formula."""
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()

    def minimum(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x / 20 + 0.2 * torch.eye(5, dtype=torch.float64), x.T @ y / 20).T

    def value(weight: Tensor) -> Tensor:
        return (HELD_OUT @ weight.T - WANTED).square().sum(1).mean() / 2

    weight = minimum(x, y)
    exact = torch.autograd.grad(value(weight), (x, y))
    inner = cv.Objective.of(linear(2, weight), cv.SquaredError(scale=1, over="examples"), (x, y), batch_size=6, l2=0.2)
    found = cv.hypergradient(inner, held_out(weight), (x, y), rtol=1e-12)
    assert found.stationarity < 1e-14
    for gradient, truth in zip(found.gradients, exact, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-13)
    squared = cv.hypergradient(inner, held_out(weight), (x, y), matrix=cv.ggn, method="cg", rtol=1e-12)
    torch.testing.assert_close(
        squared["0"], exact[0], rtol=1e-9, atol=1e-13
    )  # of a linear model the GGN is the Hessian


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_a_neumann_series_is_the_derivative_through_so_many_steps_of_gradient_descent(steps):
    decay = variable(0.3, 0.1, 1.0, 2.0, 0.5)
    weight = ridge_minimum(decay.detach())
    inner, outer = ridge(weight, decay), held_out(weight)
    found = cv.hypergradient(inner, outer, decay, method="neumann", rtol=0, max_steps=steps)
    first = cv.hypergradient(inner, outer, decay, method="neumann", rtol=0, max_steps=1).x
    v = outer.gradient()
    rate = float(first @ v / (v @ v))
    walked = weight
    for _ in range(steps):
        slope = (walked @ X.T - Y.T) @ X / 20 + decay * walked
        walked = walked - rate * slope
    loss = (HELD_OUT @ walked.T - WANTED).square().sum(1).mean() / 2
    (unrolled,) = torch.autograd.grad(loss, decay)
    torch.testing.assert_close(found.gradients[0], unrolled, rtol=1e-11, atol=1e-14)
    assert found.steps.tolist() == [steps]


def test_a_longer_neumann_series_comes_nearer_to_the_solution():
    decay = variable(0.3)
    weight = ridge_minimum(decay.detach())
    inner, outer = ridge(weight, decay), held_out(weight)
    exact = float(cv.hypergradient(inner, outer, decay, rtol=1e-12).gradients[0])
    series = [
        float(cv.hypergradient(inner, outer, decay, method="neumann", rtol=0, max_steps=k).gradients[0])
        for k in (1, 5, 20, 200)
    ]
    errors = [abs(value - exact) / abs(exact) for value in series]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-8


def test_damping_is_added_to_the_matrix():
    decay = variable(0.3)
    weight = ridge_minimum(decay.detach())
    inner, outer = ridge(weight, decay), held_out(weight)
    found = cv.hypergradient(inner, outer, decay, damping=0.7, rtol=1e-12)
    q = torch.linalg.solve(cv.hessian(inner).dense() + 0.7 * torch.eye(10, dtype=torch.float64), outer.gradient())
    torch.testing.assert_close(found.x, q, rtol=1e-9, atol=0)
    assert float(found.gradients[0]) == pytest.approx(-float(q @ weight.flatten()), rel=1e-9)


def test_away_from_the_minimum_it_says_by_how_much():
    decay = variable(0.3)
    best = ridge_minimum(decay.detach())
    off = best + 1e-4 * torch.randn(2, 5, generator=GENERATOR, dtype=torch.float64)
    inner, outer = ridge(off, decay), held_out(off)
    found = cv.hypergradient(inner, outer, decay, rtol=1e-12)
    assert found.stationarity == pytest.approx(float(inner.gradient().norm()), rel=1e-12)
    assert found.excess == pytest.approx(outer.value() - held_out(best).value(), rel=1e-2)
    assert "gradient of inner" in found.summary() and "d outer / d 0" in str(found)


def test_one_tensor_that_is_used_twice_and_one_made_of_it_beforehand():
    """Autograd returns one tensor for both terms of a sum, and sums over batches are made in place."""
    a, b, log = variable(0.1), variable(0.2), variable(0.3)
    made = log.exp()  # a graph that every batch goes through
    weight = ridge_minimum(variable(0.3).detach() + made.detach())
    inner, outer = ridge(weight, a + b + made, (4, 8, 8)), held_out(weight)
    found = cv.hypergradient(inner, outer, (a, b, log), rtol=1e-12)
    whole = (a + b + made).detach().requires_grad_()
    alone = float(cv.hypergradient(ridge(weight, whole), outer, whole, rtol=1e-12).gradients[0])
    assert [float(g) for g in found.gradients] == pytest.approx([alone, alone, alone * float(made.detach())], rel=1e-9)


def test_float32_agrees_with_float64():
    decay = variable(0.3, 0.1, 1.0, 2.0, 0.5)
    weight = ridge_minimum(decay.detach())
    exact = cv.hypergradient(ridge(weight, decay), held_out(weight), decay, rtol=1e-12).gradients[0]
    single = decay.detach().float().requires_grad_()
    inner, outer = (o.to(dtype=torch.float32) for o in (ridge(weight, single), held_out(weight)))
    found = cv.hypergradient(inner, outer, single).gradients[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_everything_is_as_before_and_passes_are_counted():
    decay = variable(0.3)
    weight = ridge_minimum(decay.detach())
    inner, outer = ridge(weight, decay, (10, 10)), held_out(weight)
    found = cv.hypergradient(inner, outer, decay, rtol=1e-12)
    assert decay.grad is None and inner.function.module.weight.grad is None
    assert found.cost.passes == inner.meter.passes + outer.meter.passes
    assert found.cost.products + 5 == found.cost.passes  # both losses, both gradients, the mixed derivative
    inner = ridge(weight, decay, (10, 10))
    both = cv.hypergradient(inner, inner.on([(HELD_OUT, WANTED)]), decay, rtol=1e-12)
    assert both.cost.passes == inner.meter.passes  # which they share


def test_it_is_saved_and_loaded(tmp_path):
    decay = variable(0.3)
    weight = ridge_minimum(decay.detach())
    found = cv.hypergradient(ridge(weight, decay), held_out(weight), {"decay": decay})
    back = cv.Result.load(found.save(tmp_path))
    assert isinstance(back, cv.Hypergradient) and back.names == ("decay",) and back.stationarity == found.stationarity
    assert torch.equal(back["decay"], found["decay"]) and torch.equal(back.x, found.x)


def test_a_tensor_that_nothing_depends_on_is_refused():
    decay, other = variable(0.3), variable(1.0)
    weight = ridge_minimum(decay.detach())
    inner, outer = ridge(weight, decay), held_out(weight)
    with pytest.raises(cv.BadObjective, match=r"Neither loss depends on other of hyper\. Pass the very tensor"):
        cv.hypergradient(inner, outer, {"decay": decay, "other": other})
    detached = ridge(weight, decay.detach())
    with pytest.raises(cv.BadObjective, match=r"without detach\(\)"):
        cv.hypergradient(detached, outer, decay)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_what_the_model_holds_itself_is_refused_with_the_way_out(kind):
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 2, bias=False).double()
            if kind == "parameter":
                self.decay = nn.Parameter(variable(0.3).detach())
            else:
                self.register_buffer("decay", variable(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Penalised()

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean() + (model.decay * model.body.weight.square()).sum()

    inner = cv.Objective.from_loss(model, loss, (X, Y), select="body")
    outer = cv.Objective.of(model, "mse", (HELD_OUT, WANTED), select="body")
    with pytest.raises(cv.BadObjective, match=r"decay is the model's own.*Keep the tensor outside of the model"):
        cv.hypergradient(inner, outer, model.decay)


def test_arguments_without_sense_are_refused():
    decay = variable(0.3)
    weight = ridge_minimum(decay.detach())
    inner, outer = ridge(weight, decay), held_out(weight)
    with pytest.raises(ValueError, match=r"'0' does not\. Call requires_grad_\(\)"):
        cv.hypergradient(inner, outer, decay.detach())
    with pytest.raises(ValueError, match="'decay' is a float"):
        cv.hypergradient(inner, outer, {"decay": 0.3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="of one dtype on one device, but got 0, 1"):
        cv.hypergradient(inner, outer, (decay, torch.ones(1, requires_grad=True)))
    with pytest.raises(ValueError, match="hyper holds no tensor"):
        cv.hypergradient(inner, outer, ())
    with pytest.raises(ValueError, match=r"weight differ\. Make both after training, or take outer\.at"):
        cv.hypergradient(inner, held_out(weight + 1), decay)
    other = cv.Objective.of(nn.Linear(5, 2).double(), "mse", (HELD_OUT, WANTED))
    with pytest.raises(ValueError, match="inner has 10 parameters, weight, and outer 12, weight, bias"):
        cv.hypergradient(inner, other, decay)
    with pytest.raises(TypeError, match=r"hypergradient takes an Objective, but got a Linear"):
        cv.hypergradient(inner, nn.Linear(5, 2), decay)  # pyright: ignore[reportArgumentType]
    with pytest.raises(cv.NotConverged) as caught:
        cv.hypergradient(inner, outer, decay, max_steps=1)
    assert isinstance(caught.value.solution, cv.Solution)
