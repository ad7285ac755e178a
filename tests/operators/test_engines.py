"""Engines change the cost and never the answer: all agree, and what is kept is read and built once."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch
from objectives import Case, zoo
from torch import nn

import curvature as cv
from curvature.operators.engine import ENGINES, PATIENCE, SMALL

ZOO = pytest.mark.parametrize("case", zoo(), ids=str)
MATRICES = pytest.mark.parametrize("matrix", [cv.hessian, cv.ggn], ids=["hessian", "ggn"])
NO_FORWARD = {"lstm"}  # torch has no forward derivative of its fused LSTM


def sizes(case: Case) -> tuple[int, ...]:
    return 2, len(case.inputs) - 2


@ZOO
@MATRICES
@pytest.mark.parametrize("engine", [e for e in ENGINES if e not in ("auto", "compiled")])
def test_every_engine_gives_the_same_products(case, matrix, engine):
    if engine == "forward" and case.name in NO_FORWARD:
        pytest.skip("no forward derivative")
    rows = cv.hessian(case.objective()).domain.draw(3, seed=2)
    expected = matrix(case.objective(sizes(case))).apply(rows)
    A = matrix(case.objective(sizes(case)), engine=engine)
    for _ in range(2):
        torch.testing.assert_close(A.apply(rows), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@MATRICES
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_compiled_engine_gives_the_same_products(matrix):
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    case = zoo()[1]
    rows = cv.hessian(case.objective()).domain.draw(3, seed=2)
    expected = matrix(case.objective()).apply(rows)
    torch.testing.assert_close(
        matrix(case.objective(), engine="compiled").apply(rows), expected, rtol=1e-10, atol=1e-12
    )


@ZOO
def test_auto_gives_the_same_products_before_and_after_it_has_linearized(case):
    A, reference = cv.ggn(case.objective(sizes(case))), cv.ggn(case.objective(sizes(case)), engine="recomputed")
    rows = A.domain.draw(PATIENCE // 2 + 1, seed=0)
    expected = reference.apply(rows)
    for _ in range(3):
        torch.testing.assert_close(A.apply(rows), expected, rtol=1e-10, atol=1e-12)


class Counting(nn.Sequential):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return super().forward(x)


class Reading:
    """Batches that count how often each is read."""

    def __init__(self, batches: list) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.reads += 1
            yield batch


def counting() -> tuple[cv.Objective, Reading]:
    torch.manual_seed(0)
    x, y = torch.randn(9, 3).double(), torch.randint(0, 2, (9,))
    data = Reading([(x[:4], y[:4]), (x[4:], y[4:])])
    objective = cv.Objective.of(Counting(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), "cross-entropy", data)
    objective.check()
    Counting.calls = data.reads = objective.meter.passes = 0
    return objective, data


@MATRICES
def test_building_an_operator_costs_nothing(matrix):
    objective, data = counting()
    matrix(objective)
    assert (Counting.calls, data.reads, objective.meter.passes) == (0, 0, 0)


@MATRICES
@pytest.mark.parametrize("engine", ["auto", "retained", "linearized"])
def test_the_graph_of_each_batch_is_built_once(matrix, engine):
    objective, data = counting()
    A = matrix(objective, engine=engine)
    rows = A.domain.draw(5, seed=0)
    for _ in range(3):
        A.apply(rows)
    assert (Counting.calls, data.reads, objective.meter.passes) == (2, 2, 3)


@MATRICES
@pytest.mark.parametrize("options", [{"engine": "recomputed"}, {"memory": 10}, {"memory": 0}], ids=str)
def test_with_little_memory_one_graph_is_alive_at_a_time(matrix, options):
    objective, data = counting()
    A = matrix(objective, **options)
    rows = A.domain.draw(5, seed=0)
    products = [A.apply(rows) for _ in range(3)]
    assert Counting.calls == 6 and data.reads == (2 if "engine" in options else 6)
    torch.testing.assert_close(products[2], products[0], rtol=0, atol=0)


def test_batches_that_do_not_fit_are_not_kept_whatever_the_engine():
    objective, data = counting()
    A = cv.hessian(objective, engine="recomputed", memory=100)  # the first batch alone has 128 bytes
    for _ in range(3):
        A.apply(A.domain.draw(1, seed=0))
    assert data.reads == 6


def test_what_is_kept_goes_with_the_operator():
    objective, _ = counting()
    A = cv.hessian(objective)
    A.apply(A.domain.draw(1, seed=0))
    kept = weakref.ref(A._passes)
    del A
    gc.collect()
    assert kept() is None


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"engine is one of auto, retained, .*but got 'fast'"):
        cv.hessian(zoo()[0].objective(), engine="fast")


def test_the_call_of_other_libraries_is_answered():
    for make in (cv.hessian, cv.ggn, cv.fisher, cv.jacobian):
        name = make.__name__
        with pytest.raises(
            TypeError, match=rf"{name} takes an Objective, but got a Linear. Write {name}\(Objective.of"
        ):
            make(nn.Linear(2, 2))


@pytest.mark.parametrize("engine", ["forward", "batched"])
@pytest.mark.parametrize("memory, chunk", [(1e9, 16), (1.0, 1), (None, 3)])
def test_as_many_vectors_go_together_as_fit_into_memory(monkeypatch, engine, memory, chunk):
    case = zoo()[1]
    objective = case.objective()
    if memory is None:  # what three vectors take
        memory = 3.5 * objective.check().example_bytes * len(case.inputs)
    chunks = []

    def vmap(function, *, chunk_size, vmap=torch.vmap, **options):
        chunks.append(chunk_size)
        return vmap(function, chunk_size=chunk_size, **options)

    monkeypatch.setattr(torch, "vmap", vmap)
    A = cv.hessian(objective, engine=engine, memory=memory)
    rows = A.domain.draw(7, seed=0)
    expected = cv.hessian(objective, engine="retained").apply(rows)
    torch.testing.assert_close(A.apply(rows), expected, rtol=1e-10, atol=1e-12)
    assert chunks == [chunk]


@MATRICES
def test_auto_takes_vectors_together_where_tensors_are_small_and_says_so(matrix, monkeypatch):
    case = zoo()[1]
    A = matrix(case.objective())
    assert A.source["engines"] == []
    A.apply(A.domain.draw(1, seed=0))
    assert A.source["engines"] == ["retained"]
    A.apply(A.domain.draw(2, seed=0))
    assert A.source["engines"] == ["batched", "retained"]
    assert cv.trace(matrix(case.objective())).origin.operator["engines"] == ["batched"]
    monkeypatch.setitem(SMALL, "cpu", case.objective().check().example_tensor * len(case.inputs) - 1)
    B = matrix(case.objective())
    rows = B.domain.draw(2, seed=0)
    torch.testing.assert_close(B.apply(rows), A.apply(rows), rtol=1e-10, atol=1e-12)
    assert B.source["engines"] == ["retained"]


class Cube(torch.autograd.Function):
    """Twice differentiable, and nothing that vmap knows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        if x.sum() + cotangent.sum() == torch.pi:  # which depends on the numbers
            raise AssertionError
        return 3 * x**2 * cotangent


class Cubic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Cube.apply(self.linear(x))


@MATRICES
def test_auto_takes_vectors_one_by_one_where_vmap_cannot(matrix):
    torch.manual_seed(0)
    data = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    objective = cv.Objective.of(Cubic().double(), "mse", data)
    A = matrix(objective)
    rows = A.domain.draw(4, seed=0)
    expected = matrix(objective, engine="retained").apply(rows)
    for _ in range(2):
        torch.testing.assert_close(A.apply(rows), expected, rtol=1e-12, atol=1e-14)
    assert A.source["engines"] == ["retained"]


def test_large_parameters_are_not_sent_together():
    """Tables of embeddings are not in the graph, and still in every product."""
    module = nn.Sequential(nn.Embedding(300_000, 4), nn.Flatten(), nn.Linear(8, 2))
    data = torch.randint(0, 300_000, (4, 2)), torch.randint(0, 2, (4,))
    A = cv.ggn(cv.Objective.of(module, "cross-entropy", data))
    A.apply(A.domain.draw(2, seed=0))
    assert A.source["engines"] == ["retained"]


class LogCumSum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.logcumsumexp(1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", ["auto", "retained", "batched", "forward"])
@pytest.mark.parametrize("odd", [LogCumSum(), nn.Mish()], ids=lambda m: type(m).__name__)
@MATRICES
def test_backwards_that_are_special_at_zero_or_unknown_to_vmap_are_right(matrix, odd, engine):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), odd, nn.Linear(4, 2)).double()
    objective = cv.Objective.of(module, "mse", (torch.randn(5, 3).double(), torch.randn(5, 2).double()))
    with torch.random.fork_rng():
        dense = matrix(objective, engine="retained").dense()
        J = torch.cat([j.flatten(2) for j in jacobian(module, objective)], 2).flatten(0, 1)
    if matrix is cv.ggn:
        torch.testing.assert_close(dense, 2 * J.T @ J / 10, rtol=1e-9, atol=1e-12)
    try:
        products = matrix(objective, engine=engine).dense()
    except cv.BadObjective as refusal:  # forward derivatives of it are not there
        assert engine == "forward" and "performance drop" not in str(refusal)
    else:
        torch.testing.assert_close(products, dense, rtol=1e-9, atol=1e-12)


def jacobian(module: nn.Module, objective: cv.Objective) -> list[torch.Tensor]:
    (batch,) = objective.batches

    def outputs(*params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(objective.space.names, params, strict=True)), (batch[0],))

    return list(torch.autograd.functional.jacobian(outputs, tuple(objective.params.values())))


def test_losses_that_call_torch_func_have_a_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def force(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(torch.func.grad(lambda x: module(x)[0]))(batch).square().mean()

    x = torch.randn(5, 2).double()
    objective = cv.Objective.from_loss(net, force, x)
    H, params = cv.hessian(objective).dense(), dict(net.named_parameters())

    def loss(flat: torch.Tensor) -> torch.Tensor:
        own = objective.space.named(flat)
        return torch.func.vmap(torch.func.grad(lambda x: torch.func.functional_call(net, own, x)[0]))(x).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    torch.testing.assert_close(H, torch.func.hessian(loss)(flat), rtol=1e-9, atol=1e-12)


def test_no_rows_have_no_products():
    A = cv.hessian(zoo()[0].objective())
    assert A.apply(A.domain.empty).shape == (0, A.shape[0])
