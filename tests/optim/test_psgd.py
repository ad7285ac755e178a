"""PSGD equals its formulas step by step, and P becomes what theory says that it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from optimizers import awkward, batches
from reference.psgd import Kronecker, LowRank, steps
from torch import Tensor, nn

import curvature as cv
from curvature.linalg.deflation import derived
from curvature.linalg.packed import from_triangles
from curvature.optim.block import Block
from curvature.optim.evidence import Evidence
from curvature.optim.rules import psgd_fit
from curvature.optim.rules.psgd import PSGD, KroneckerNewton, KroneckerWhitening
from curvature.optim.rules.psgd_fit import scheduled, spectral_norm
from curvature.optim.rules.psgd_lowrank import LowRankNewton, LowRankWhitening

F64 = torch.float64
Rule = KroneckerWhitening | LowRankWhitening
SHAPES = {"tall": (7, 3), "wide": (3, 5), "convolution": (4, 2, 2, 2), "vector": (5,), "number": ()}


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def block_of(*shapes: tuple[int, ...], rule: type[Rule], dtype: torch.dtype = F64) -> Block:
    params = tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)
    return Block(tuple(map(str, range(len(shapes)))), params, rule.grain, "matrix")


def fitted(
    rule: Rule, block: Block, sample: Callable[[int], Tensor], count: int, *, least: float = 1e-3, of: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """P after so many fits to samples, or to products with `of`, with a rate that falls to `least`; and the state."""
    state, steps = rule.init(block), torch.ones(block.stack if rule.grain == "shape" else 1, 1, dtype=F64)
    for t in range(count):
        now = replace(rule, rate=max(least, rule.rate * (1 - t / count) ** 2))
        h = sample(t).flatten().to(block.dtype)
        now.update(state, block, Evidence(h, h, steps, run=t, place=None if of is None else lambda: of), True)
    return rule.operator(state, block, Evidence(h, h, steps), None).dense(), state


def inverse_root(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return vectors * values**-0.5 @ vectors.T


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def factors(state: dict[str, Tensor], block: Block) -> list[Tensor]:
    """Q of both sides, as matrices."""
    held = zip((state["Q_left"], state["Q_right"]), block.matrix, strict=True)
    return [q.diag_embed() if q.shape[1] == size else from_triangles(q, size) for q, size in held]


# Step by step


@pytest.mark.parametrize("of", ["gradient", "momentum"])
@pytest.mark.parametrize("skew", [1.0, math.inf], ids=["diagonal where long", "dense"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twenty_steps_with_kronecker_factors_equal_the_formulas(shape, skew, of):
    params = [nn.Parameter(draws(*shape, seed=i)) for i in range(3)]
    starts = [p.detach().clone() for p in params]
    grads = [[10.0 ** (i - 1) * draws(*shape, seed=100 * t + i) for t in range(20)] for i in range(3)]
    optimizer = PSGD(params, 0.03, 0.8, 0.1, fit=of, max_skew=skew, seed=4)
    m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    dense = (m * m <= skew * m * n, n * n <= skew * m * n)
    seeds = [derived(4 + t) for t in range(20)]
    settings = {"lr": 0.03, "beta": 0.8, "decay": 0.1, "of": of}
    paths = [steps(w, g, Kronecker((m, n), dense), seeds, **settings) for w, g in zip(starts, grads, strict=True)]
    for t in range(20):
        for p, g in zip(params, grads, strict=True):
            p.grad = g[t].clone()
        optimizer.step()
        for p, path in zip(params, paths, strict=True):
            torch.testing.assert_close(p.detach(), path[t], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("of", ["gradient", "momentum"])
def test_twenty_steps_of_low_rank_equal_the_formulas(rank, of):
    shapes = [(3, 2), (4,), (2, 2, 1)]
    params = [nn.Parameter(draws(*shape, seed=i)) for i, shape in enumerate(shapes)]
    start = torch.cat([p.detach().flatten() for p in params])
    grads = [draws(len(start), seed=100 + t) * torch.logspace(-1, 1, len(start), dtype=F64) for t in range(20)]
    optimizer = PSGD(params, 0.03, 0.8, 0.1, fit=of, rank=rank)
    seeds = [derived(t) for t in range(20)]
    path = steps(start, grads, LowRank(len(start), rank), seeds, lr=0.03, beta=0.8, decay=0.1, of=of)
    for g, expected in zip(grads, path, strict=True):
        for p, piece in zip(params, g.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view_as(p).clone()
        optimizer.step()
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), expected, rtol=1e-9, atol=1e-11)
    assert seeds != sorted(seeds) and {s % 2 for s in seeds} == {0, 1}  # U and V both moved


def test_the_matrix_of_low_rank_is_made_of_its_parts_to_rounding():
    rule = LowRankWhitening(rank=3)
    block = block_of((9,), rule=LowRankWhitening)
    P, state = fitted(rule, block, lambda t: draws(9, seed=t), 50)
    U, V = state["factors"][:3].T, state["factors"][3:].T
    Q = (torch.eye(9, dtype=F64) + U @ V.T) @ state["diagonal"].diag()
    torch.testing.assert_close(P, Q.T @ Q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U.norm(), V.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(7, 3), (3, 5), (5,), (4, 4)])
@pytest.mark.parametrize("skew", [1.0, math.inf])
@pytest.mark.parametrize("stack", [1, 3])
def test_the_matrix_of_a_stack_has_a_kronecker_product_for_each(shape, skew, stack):
    rule = KroneckerWhitening(max_skew=skew)
    block = block_of(*[shape] * stack, rule=KroneckerWhitening)
    P, state = fitted(rule, block, lambda t: draws(stack, *shape, seed=t), 5)
    each = []
    for left, right in zip(*factors(state, block), strict=True):
        each.append(torch.kron(left @ left, right @ right))
    torch.testing.assert_close(P, torch.block_diag(*each), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "options", "dense"),
    [
        ((64, 256, 3, 3), {}, (True, False)),
        ((5000, 32), {}, (False, True)),
        ((64, 64), {}, (True, True)),
        ((64, 128), {"max_skew": 2}, (True, True)),
        ((64, 64), {"max_size": 63}, (False, False)),
        ((300,), {}, (True, False)),
        ((20,), {"max_skew": 20}, (True, True)),
    ],
)
def test_sides_that_are_long_or_longer_than_the_other_have_a_diagonal(shape, options, dense):
    block = block_of(shape, shape, rule=KroneckerWhitening)
    state = KroneckerWhitening(**options).init(block)
    for side, size, full in zip(("left", "right"), block.matrix, dense, strict=True):
        assert state[f"Q_{side}"].shape == (2, size * (size + 1) // 2 if full else size)


# Where it converges to


def test_gradients_with_a_kronecker_covariance_become_white():
    m, n = 4, 6
    A, B = draws(m, m, seed=1), draws(n, n, seed=2)
    rule = KroneckerWhitening(max_skew=math.inf)
    block = block_of((m, n), rule=KroneckerWhitening)
    P, _ = fitted(rule, block, lambda t: A @ draws(m, n, seed=t + 10) @ B, 1000)
    assert off(P, torch.kron(inverse_root(A @ A.T), inverse_root(B.T @ B))) < 0.06


def test_a_diagonal_factor_becomes_the_inverse_root_of_mean_squares():
    scales = torch.logspace(-2, 2, 8, dtype=F64)
    block = block_of((8,), rule=KroneckerWhitening)
    P, _ = fitted(KroneckerWhitening(), block, lambda t: scales * draws(8, seed=t), 1500)
    assert off(scales * P.diag(), torch.ones(8, dtype=F64)) < 0.08
    assert off(P, P.diag().diag()) == 0


def test_low_rank_as_large_as_the_space_whitens_any_covariance():
    A = draws(6, 6, seed=3)
    block = block_of((2, 2), (2,), rule=LowRankWhitening)
    P, _ = fitted(LowRankWhitening(rank=6), block, lambda t: A @ draws(6, seed=t + 10), 4000)
    assert off(P, inverse_root(A @ A.T)) < 0.06


class Point(nn.Module):
    """A matrix in R^(3 x 4), at which a loss is looked at."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())

    def loss(self, H: Tensor) -> Tensor:
        return self.w.flatten() @ H @ self.w.flatten() / 2


def bowl(H: Tensor, point: Point) -> cv.Objective:
    return cv.Objective.from_loss(point, lambda module, batch: module.loss(H), [torch.zeros(1, 1, dtype=F64)])


def positive(size: int, seed: int) -> Tensor:
    A = draws(size, size, seed=seed)
    return A @ A.T / size + torch.eye(size, dtype=F64) / 4


def saddle() -> Tensor:
    values, vectors = torch.linalg.eigh(positive(4, 2))
    return torch.kron(positive(3, 1), vectors * (values * torch.tensor([-1.0, 1, 1, -1], dtype=F64)) @ vectors.T)


NEWTON = {
    "kronecker": (KroneckerNewton(max_skew=math.inf), torch.kron(positive(3, 1), positive(4, 2)), 500, 0.1, 1e-9),
    "kronecker, indefinite": (KroneckerNewton(max_skew=math.inf), saddle(), 1000, 1e-3, 0.04),
    "rank 12": (LowRankNewton(rank=12), positive(12, 3), 2000, 0.1, 0.03),
    "rank 1": (
        LowRankNewton(rank=1),
        torch.logspace(-0.5, 0.5, 12, dtype=F64).diag() + torch.outer(draws(12, seed=8), draws(12, seed=8)) / 2,
        2000,
        0.1,
        0.1,
    ),
}


@pytest.mark.parametrize("name", NEWTON)
def test_pairs_with_the_hessian_make_its_inverse_absolute_value(name, monkeypatch):
    rule, H, count, least, error = NEWTON[name]
    monkeypatch.setattr(psgd_fit, "hessian", lambda operator: operator)  # what is given is the Hessian itself
    P, _ = fitted(
        rule, block_of((3, 4), rule=type(rule)), lambda t: torch.zeros(12), count, least=least, of=cv.Dense(H)
    )
    values, vectors = torch.linalg.eigh(H)
    assert off(P, vectors / values.abs() @ vectors.T) < error


def test_a_fitted_newton_step_of_length_one_is_at_the_minimum_of_a_quadratic():
    H, point = torch.kron(positive(3, 1), positive(4, 2)), Point(draws(3, 4, seed=0))
    optimizer = PSGD(point.named_parameters(), 0.0, 0.0, fit="hessian", max_skew=math.inf)
    far = point.w.norm().item()
    for t in range(250):
        optimizer.param_groups[0]["lr"] = float(t == 249)
        optimizer.zero_grad()
        point.loss(H).backward()
        optimizer.step(objective=bowl(H, point))
    assert point.w.norm().item() < 1e-4 * far


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_gradients_times_s_have_a_preconditioner_divided_by_s(rank, scale):
    rule = KroneckerWhitening(eps=1e-15) if rank is None else LowRankWhitening(rank=rank, eps=1e-15)
    block = block_of((4, 6), rule=type(rule))
    P, _ = fitted(rule, block, lambda t: draws(4, 6, seed=t), 30)
    other, _ = fitted(rule, block, lambda t: scale * draws(4, 6, seed=t), 30)
    torch.testing.assert_close(other * scale, P, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_no_stream_of_gradients_makes_it_infinite_or_singular(rank, dtype):
    """Scales that jump from 1e-20 to 1e15, gradients of one entry, of rank one, and of zeros."""
    rule = KroneckerWhitening(max_skew=math.inf) if rank is None else LowRankWhitening(rank=rank)
    block = block_of((3, 5), rule=type(rule), dtype=dtype)
    kinds = [
        lambda t: 1e8 * draws(3, 5, seed=t),
        lambda t: 1e-20 * draws(3, 5, seed=t),
        lambda t: 1e15 * draws(3, 5, seed=t),
        lambda t: torch.zeros(3, 5),
        lambda t: torch.outer(draws(3, seed=t), draws(5, seed=t)),
        lambda t: torch.eye(3, 5),
        lambda t: torch.eye(3, 5)[:1].expand(3, 5) * torch.tensor([[1.0], [0.0], [0.0]]),
    ]
    P, state = fitted(rule, block, lambda t: kinds[t // 50 % 7](t), 700, least=0.1)
    assert all(t.isfinite().all() for t in state.values())
    assert torch.linalg.eigvalsh(P.double() / P.double().norm()).min() > 0
    if rank is None:
        assert all((torch.linalg.eigvalsh(Q.double()) > 0).all() for Q in factors(state, block))


def test_where_gradients_are_zero_it_stays_below_the_inverse_of_eps():
    eps, kept = 1e-3, torch.tensor([1.0, 1, 1, 0], dtype=F64)
    block = block_of((4,), rule=KroneckerWhitening)
    P, _ = fitted(KroneckerWhitening(eps=eps), block, lambda t: kept * draws(4, seed=t), 1000, least=0.05)
    assert 0.5 / eps < float(P[3, 3]) < 1.5 / eps and float(P.diag()[:3].max()) < 2


@pytest.mark.parametrize("rank", [None, 3])
def test_gradients_that_are_all_zero_change_nothing(rank):
    rule = KroneckerWhitening() if rank is None else LowRankWhitening(rank=rank)
    block = block_of((3, 5), (3, 5), rule=type(rule))
    P, state = fitted(rule, block, lambda t: draws(2, 3, 5, seed=t), 20)
    zero = torch.zeros(30, dtype=F64)
    rule.update(state, block, Evidence(zero, zero, torch.ones(1, 1)), True)
    torch.testing.assert_close(
        rule.operator(state, block, Evidence(zero, zero, torch.zeros(1, 1)), None).dense(), P, rtol=1e-12, atol=1e-16
    )
    half = torch.cat([zero[:15], draws(15, seed=99)])  # of one parameter of two
    rule.update(state, block, Evidence(half, half, torch.ones(1, 1)), True)
    after = rule.operator(state, block, Evidence(zero, zero, torch.zeros(1, 1)), None).dense()
    assert off(after[15:, 15:], P[15:, 15:]) > 1e-3
    if rank is None:
        torch.testing.assert_close(after[:15, :15], P[:15, :15], rtol=1e-13, atol=1e-16)


# How it gets there


@pytest.mark.parametrize("kind", ["flat", "decaying", "one large", "low rank", "blocks", "zero"])
def test_the_spectral_norm_is_met_from_below(kind):
    d = 60
    Q = torch.linalg.qr(draws(d, d, seed=1)).Q
    values = {
        "flat": torch.linspace(1, 2, d, dtype=F64),
        "decaying": torch.logspace(0, -6, d, dtype=F64),
        "one large": torch.cat([torch.full((1,), 1e3, dtype=F64), torch.ones(d - 1, dtype=F64)]),
        "low rank": torch.cat([torch.ones(3, dtype=F64), torch.zeros(d - 3, dtype=F64)]),
        "zero": torch.zeros(d, dtype=F64),
    }
    if kind == "blocks":  # the longest row lies outside the block of the largest eigenvalue
        A = torch.block_diag(torch.ones(1, 1, dtype=F64), torch.full((d - 1, d - 1), 0.1, dtype=F64))
    else:
        A = Q * values[kind] @ Q.T
    found = spectral_norm(torch.stack([A, 1e-6 * A]), torch.Generator().manual_seed(0))
    exact = torch.linalg.matrix_norm(A, 2)
    assert (found <= torch.stack([exact, 1e-6 * exact]) * (1 + 1e-12)).all()
    assert (found >= 0.85 * torch.stack([exact, 1e-6 * exact])).all()


def test_it_fits_at_every_step_at_first_then_at_ever_fewer_and_never_stops():
    turns = [scheduled(t) for t in range(6000)]
    assert all(turns[:500])
    shares = [sum(turns[t : t + 500]) / 500 for t in range(500, 6000, 500)]
    expected = [2 * (math.exp(-t / 1000) - math.exp(-(t + 500) / 1000)) for t in range(0, 5500, 500)]
    torch.testing.assert_close(torch.tensor(shares), torch.tensor(expected), rtol=0, atol=2 / 500)


def counted(optimizer: PSGD, params: list[nn.Parameter], steps: int) -> list[int]:
    """The steps at which P changed."""
    fits = []
    for t in range(steps):
        before = optimizer.operator(copy=True).dense() if optimizer.state else torch.zeros(1, dtype=F64)
        for i, p in enumerate(params):
            p.grad = draws(*p.shape, seed=10 * t + i)
        optimizer.step()
        if not torch.equal(optimizer.operator().dense(), before):
            fits.append(t)
    return fits


@pytest.mark.parametrize("rank", [None, 2])
def test_late_steps_fit_when_scheduled_and_at_one_in_every(rank):
    params = [nn.Parameter(draws(2, 3, seed=0))]
    optimizer = PSGD(params, rank=rank, every=10)
    counted(optimizer, params, 2)
    optimizer.param_groups[0]["taken"] = 2500
    expected = [t for t in range(40) if scheduled(2500 + t) or (2500 + t) % 10 == 0]
    assert counted(optimizer, params, 40) == expected and 4 < len(expected) < 15


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_saved_between_fits_goes_on_bit_for_bit(rank):
    net, twin = awkward(), awkward()
    optimizer, other = (PSGD(n.named_parameters(), 1e-2, rank=rank) for n in (net, twin))
    for t, (x, y) in enumerate(batches(60)):
        if t == 3:
            optimizer.param_groups[0]["taken"] = 2500
        if t == 20:
            twin.load_state_dict(net.state_dict())
            other.load_state_dict(optimizer.state_dict())
        for model, opt in ((net, optimizer), (twin, other)) if t >= 20 else ((net, optimizer),):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("rank", [None, 2])
def test_the_hessian_is_multiplied_once_for_each_fit_of_each_block(rank, monkeypatch):
    made = []
    monkeypatch.setattr(psgd_fit, "hessian", lambda objective: made.append(objective) or cv.hessian(objective))
    net = awkward()
    optimizer = PSGD(net.named_parameters(), 1e-2, fit="hessian", rank=rank, every=4)
    for t, batch in enumerate(batches(12)):
        if t == 2:
            optimizer.param_groups[0]["taken"] = 10_000  # where nothing is scheduled
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [batch]))
    assert len(made) == (2 + 3) * len(optimizer.slabs)  # steps 0, 1 and 10000, 10004, 10008


def test_between_fits_that_are_due_no_objective_is_needed():
    net = awkward()
    optimizer = PSGD(net.named_parameters(), 1e-2, fit="hessian", every=4)
    fits = []
    for t, batch in enumerate(batches(8)):
        before = optimizer.operator(copy=True).dense() if t else torch.zeros(1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [batch]) if t in (0, 2, 4) else None)
        fits += [t] * (not torch.equal(optimizer.operator().dense(), before))
    assert fits == [0, 2, 4]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_are_clipped(rank, sign):
    """A gradient a thousand times the last ones makes a direction of root mean square 2, and of entries up to 10."""
    p = nn.Parameter(torch.zeros(200, 2, dtype=F64))
    optimizer = PSGD([p], 1.0, 0.0, rank=rank)
    optimizer.param_groups[0]["rate"] = 1e-3
    for t in range(50):
        p.grad = draws(200, 2, seed=t)
        optimizer.step()
    before = p.detach().clone()
    p.grad = sign * 1e3 * draws(200, 2, seed=99)
    optimizer.step()
    step = before - p.detach()
    assert 1.5 < float(step.square().mean().sqrt()) < 2 + 1e-12
    p.grad = torch.zeros(200, 2, dtype=F64).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e3).double())
    before = p.detach().clone()
    optimizer.step()
    assert float((before - p.detach()).abs().max()) == pytest.approx(10, abs=1e-9)


def test_updates_are_as_long_as_those_of_adamw():
    p, q = (nn.Parameter(torch.zeros(20, 30, dtype=F64)) for _ in range(2))
    optimizer, adam = PSGD([p], 1e-3), torch.optim.AdamW([q], 1e-3, weight_decay=0.0)
    for t in range(400):
        p.grad = q.grad = torch.logspace(-1, 1, 20, dtype=F64)[:, None] * draws(20, 30, seed=t)
        optimizer.step()
        adam.step()
        if t == 200:
            start = p.detach().clone(), q.detach().clone()
    ratio = float((p.detach() - start[0]).norm() / (q.detach() - start[1]).norm())
    assert 0.8 < ratio < 1.25


def test_rules_of_hessians_ask_for_the_objective_and_others_do_not():
    assert KroneckerNewton.needs == LowRankNewton.needs == frozenset({"objective"})
    assert KroneckerWhitening.needs == LowRankWhitening.needs == frozenset({"grad"})
