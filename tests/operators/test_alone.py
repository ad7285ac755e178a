"""Gradients of examples through the whole model, where no layer can be followed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature as cv
from curvature.operators import alone
from curvature.operators.alone import MANY, Alone
from curvature.operators.followed import Evidence, Recorded

COUNT = MANY + 5


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Poisson(nn.Module):
    """u'' of a network u, at points (n, 1): outputs (n, 1)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
        self.scale = 1.0

    def forward(self, points: Tensor) -> Tensor:
        x = points.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return self.scale * bend


class Own(nn.Module):
    """A parameter that no layer holds, with some outputs for each example, of one shape or another."""

    shift: Tensor

    def __init__(self, what: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w, self.what = nn.Parameter(draws(3, 2, seed=1)), what
        self.register_buffer("shift", draws(2, seed=2))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.what(x, self.w, *more) + self.shift


def product(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).tanh()


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "differentiates inside": (Poisson, draws(COUNT, 1), "_traced"),
    "several outputs": (lambda: Own(product), draws(COUNT, 3), "_traced"),
    "rows of outputs": (lambda: Own(product), draws(COUNT, 4, 3), "_traced"),
    "of what all share": (lambda: Own(lambda x, w, all: product(x, w) * all), draws(COUNT, 3), "_traced"),
    "reads numbers": (lambda: Own(lambda x, w: x @ w * (1.0 + (float(x.sum()) > 0))), draws(COUNT, 3), "in batch"),
    "depends on the number": (lambda: Own(lambda x, w: x @ w / len(x)), draws(COUNT, 3), "in batch"),
    "mixes examples": (lambda: Own(lambda x, w: x @ w - (x @ w).mean(0)), draws(COUNT, 3), "in batch"),
    "few": (Poisson, draws(MANY // 3 - 1, 1), "in batch"),
}


def objective_of(model: nn.Module, x: Any, y: Tensor, **options: Any) -> cv.Objective:
    return cv.Objective.of(model, cv.SquaredError(), [(x, y)], **options)


def gradients(objective: cv.Objective, cotangents: list[Tensor]) -> tuple[Tensor, str]:
    """Those of every example (cotangents, examples, n), and where they came from."""
    (batch,) = objective.batches
    with objective.context(), objective.randomness():
        recorded = Recorded(objective, [], batch)
        examples = Alone(objective, list(objective.params), Evidence(recorded, cotangents, seed=0))
        found = examples.gradients(cotangents)
    tried = objective.function.module in alone.TRACED
    return found, examples.sources[0].__name__ if tried and examples.sources else "in batch"


def one_by_one(objective: cv.Objective, cotangents: list[Tensor]) -> Tensor:
    """The same from backward passes through the batch."""
    (batch,) = objective.batches
    leaves = objective.leaves()
    outputs = objective.outputs(leaves, batch)[0]

    def flat(cotangent: Tensor) -> Tensor:
        found = torch.autograd.grad(
            outputs, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in found])

    def at(cotangent: Tensor, i: int) -> Tensor:
        return torch.zeros_like(cotangent).index_copy(0, torch.tensor([i]), cotangent[i : i + 1])

    return torch.stack([torch.stack([flat(at(c, i)) for i in range(len(outputs))]) for c in cotangents])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_backward_passes(name, dtype, count):
    make, x, way = MODELS[name]
    model, inputs = make().to(dtype), [x.to(dtype)]
    inputs += [draws(2, seed=5).to(dtype)] if name == "of what all share" else []
    outputs = model(*inputs)
    objective = objective_of(model, tuple(inputs), draws(*outputs.shape, seed=3).to(dtype))
    cotangents = [draws(*outputs.shape, seed=10 + i).to(dtype) for i in range(count)]
    found, taken = gradients(objective, cotangents)
    wanted = one_by_one(objective, cotangents)
    precision = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=0, atol=precision * float(wanted.abs().max()))
    assert taken == way


def poisson(model: nn.Module, **options: Any) -> cv.Objective:
    return objective_of(model, draws(COUNT, 1), draws(COUNT, 1, seed=3), **options)


def test_what_was_traced_is_for_other_numbers_too(monkeypatch):
    """Parameters, frozen ones and buffers are not constants of it."""
    model, traced = Poisson(), []
    make = alone.Operations.of
    monkeypatch.setattr("curvature.objective.operations.Operations.of", lambda *a: traced.append(1) or make(*a))
    cotangents = [draws(COUNT, 1, seed=4)]
    for seed in range(3):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(draws(*p.shape, seed=10 * seed + i))
        objective = poisson(model, select="u.0.*")
        found, taken = gradients(objective, cotangents)
        torch.testing.assert_close(found, one_by_one(objective, cotangents), rtol=1e-9, atol=1e-12)
        assert taken == "_traced"
    assert len(traced) == 1


def test_what_was_traced_and_is_no_longer_true_is_left():
    model, cotangents = Poisson(), [draws(COUNT, 1, seed=4)]
    assert gradients(poisson(model), cotangents)[1] == "_traced"
    model.scale = 1.5  # a number of Python, which is a constant of it
    found, taken = gradients(poisson(model), cotangents)
    torch.testing.assert_close(found, one_by_one(poisson(model), cotangents), rtol=1e-9, atol=1e-12)
    assert taken == "in batch"


def test_what_vmap_cannot_do_is_tried_once(monkeypatch):
    tried = []

    def failing(*args: Any, **options: Any) -> Tensor:
        tried.append(args)
        raise RuntimeError("Batching rule not implemented")

    monkeypatch.setattr(alone, "vmapped", failing)
    model, cotangents = Poisson(), [draws(COUNT, 1, seed=4)]
    for _ in range(2):
        found, taken = gradients(poisson(model), cotangents)
        torch.testing.assert_close(found, one_by_one(poisson(model), cotangents), rtol=1e-9, atol=1e-12)
        assert taken == "in batch"
    assert len(tried) == 1


def test_as_many_go_at_once_as_memory_allows(monkeypatch):
    cotangents = [draws(COUNT, 1, seed=4)]
    whole = gradients(poisson(Poisson()), cotangents)[0]
    model = Poisson()
    sizes, vmapped = [], alone.vmapped
    monkeypatch.setattr(alone, "budget_of", lambda *a: 7.5 * (poisson(model).check().example_bytes + 8 * 13))
    monkeypatch.setattr(alone, "vmapped", lambda f, t, **k: sizes.append(len(t[0])) or vmapped(f, t, **k))
    found, taken = gradients(poisson(model), cotangents)
    assert taken == "_traced" and 6 <= max(sizes) <= 8 and found.shape == whole.shape
    torch.testing.assert_close(found, one_by_one(poisson(model), cotangents), rtol=1e-9, atol=1e-12)


def test_what_was_traced_goes_with_the_model():
    model = Poisson()
    gradients(poisson(model), [draws(COUNT, 1)])
    assert model in alone.TRACED
    before = len(alone.TRACED)
    del model
    gc.collect()
    assert len(alone.TRACED) < before
