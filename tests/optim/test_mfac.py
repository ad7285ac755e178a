"""M-FAC and EFCP against the dense matrix, and what the formulas say of single steps."""

from __future__ import annotations

import math

import pytest
import torch
from optimizers import awkward, batches
from reference.mfac import DenseMFAC, Largest, Projected, Whole
from torch import Tensor, nn

import curvature as cv
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.rules.mfac import EFCP, MFAC

SHAPES = [(7, 6), (5,), (2, 3, 2)]
N = sum(map(math.prod, SHAPES))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(theta: Tensor, X: Tensor) -> Tensor:
    """Smooth, and of curvature that is neither constant nor diagonal."""
    return nn.functional.softplus(X @ theta).square().mean() + 0.1 * theta.square().sum()


def fed(make, gradients: Tensor, **options) -> tuple[PreconditionedOptimizer, nn.Parameter]:
    """An optimizer that has taken steps along gradients that do not depend on where it is."""
    p = nn.Parameter(torch.zeros(gradients.shape[1], dtype=gradients.dtype))
    optimizer = make([p], **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return optimizer, p


def starts() -> dict[int, Tensor]:
    """The start of the power iteration for the one matrix that two factors of rank 2 make smaller."""
    return {0: normal(2, 6)}


CASES = {
    "dense, grafted": (MFAC, {"momentum": 0.9}, Whole, {"beta": 0.9, "momentum": "before", "graft": True}),
    "dense": (MFAC, {"momentum": 0.5, "graft": None}, Whole, {"beta": 0.5}),
    "sparse, grafted": (EFCP, {"density": 0.2}, lambda: Largest(math.ceil(0.2 * N)), {"graft": True}),
    "sparse": (EFCP, {"density": 0.2, "momentum": 0.5, "graft": None}, lambda: Largest(math.ceil(0.2 * N)), {"beta": 0.5, "momentum": "sum"}),
    "low rank": (EFCP, {"rank": 2, "momentum": 0.5, "graft": None}, lambda: Projected(SHAPES, starts()), {"beta": 0.5, "momentum": "sum"}),
    "low rank, grafted": (EFCP, {"rank": 2}, lambda: Projected(SHAPES, starts()), {"graft": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_the_dense_matrix(name):
    kind, options, keeper, of_reference = CASES[name]
    params = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    theta = nn.utils.parameters_to_vector(params).detach()
    optimizer = kind(params, lr=0.02, weight_decay=0.1, window=6, damping=1e-2, **options)
    reference = DenseMFAC(keeper(), 6, 1e-2, lr=0.02, decay=0.1, **of_reference)
    for step in range(20):
        X = normal(8, N, seed=100 + step)
        leaf = theta.clone().requires_grad_()
        theta = reference.step(theta, torch.autograd.grad(loss_of(leaf, X), leaf)[0])
        optimizer.zero_grad()
        loss_of(nn.utils.parameters_to_vector(params), X).backward()
        optimizer.step()
        torch.testing.assert_close(nn.utils.parameters_to_vector(params).detach(), theta, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [MFAC, EFCP])
def test_a_window_of_one_divides_by_its_squared_length(kind):
    g, share = normal(30), {} if kind is MFAC else {"density": 0.2}
    _, p = fed(kind, g[None], lr=1.0, window=1, damping=1e-2, graft=None, **share)
    c = g if kind is MFAC else torch.where(g.abs() >= g.abs().sort().values[-6], g, 0.0)
    torch.testing.assert_close(p.detach(), -c / (1e-2 + c @ c), rtol=1e-12, atol=0)


def test_of_a_quadratic_whose_hessian_is_in_the_window_it_is_newton():
    A = normal(12, 12)
    H = A @ A.T / 12 + torch.eye(12, dtype=torch.float64)
    values, U = torch.linalg.eigh(H)
    root = (U * values.sqrt()) @ U.T
    optimizer, _ = fed(MFAC, 12**0.5 * root, lr=0.0, window=12, damping=1e-8)
    theta, b = normal(12, seed=1), normal(12, seed=2)
    newton = theta - optimizer.operator() @ (H @ theta - b)
    torch.testing.assert_close(newton, torch.linalg.solve(H, b), rtol=1e-6, atol=1e-6)


def test_the_order_of_gradients_does_not_matter_and_old_ones_are_forgotten():
    G, options = normal(20, 15), {"lr": 0.0, "window": 8, "damping": 1e-2}
    P = fed(MFAC, G, **options)[0].operator().dense()
    fresh = fed(MFAC, G[-8:], **options)[0].operator().dense()
    mixed = fed(MFAC, G[-8:].flip(0), **options)[0].operator().dense()
    torch.testing.assert_close(fresh, P, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed, P, rtol=1e-10, atol=1e-10)


def test_while_the_window_fills_up_the_mean_is_over_what_is_there():
    m, t, damping, G = 8, 3, 1e-2, normal(3, 15)
    eye = torch.eye(15, dtype=torch.float64)
    P = fed(MFAC, G, lr=0.0, window=m, damping=m / t * damping)[0].operator().dense()
    torch.testing.assert_close(P, torch.linalg.inv(m / t * damping * eye + G.T @ G / t), rtol=1e-10, atol=1e-10)
    by_the_window = torch.linalg.inv(damping * eye + G.T @ G / m)  # as the authors' code divides
    torch.testing.assert_close(m / t * P, by_the_window, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [5, 16, 40])
def test_along_a_gradient_of_the_window_the_direction_is_at_most_the_number_of_gradients(count):
    G = normal(count, 200)
    P = fed(MFAC, G, lr=0.0, window=16, damping=1e-6)[0].operator()
    along = float(G[-1] @ (P @ G[-1]))
    assert 0.999 * min(count, 16) < along <= min(count, 16)


def test_without_grafting_on_adam_steps_turn_with_the_coordinates():
    """What diagonal methods cannot: the same run in rotated coordinates is the rotated run."""
    Q = torch.linalg.qr(normal(20, 20, seed=7)).Q
    X, ends = normal(15, 8, 20, seed=8), []
    for turn in (torch.eye(20, dtype=torch.float64), Q):
        p = nn.Parameter(turn.T @ normal(20))
        optimizer = MFAC([p], lr=0.01, window=5, damping=1e-2, graft=None)
        for x in X:
            optimizer.zero_grad()
            loss_of(turn @ p, x).backward()
            optimizer.step()
        ends.append(turn @ p.detach())
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{"density": 1.0}, {"rank": 7}], ids=str)
def test_what_compresses_nothing_is_mfac(options):
    ends = []
    for kind, more in ((MFAC, {}), (EFCP, options)):
        params = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
        optimizer = kind(params, lr=0.02, window=6, damping=1e-2, **more)
        for step in range(15):
            optimizer.zero_grad()
            loss_of(nn.utils.parameters_to_vector(params), normal(8, N, seed=step)).backward()
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(params).detach())
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"density": 0.1}, {"rank": 1}], ids=str)
def test_what_is_kept_and_the_error_are_all_gradients(options):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer, total = EFCP(params, window=20, **options), torch.zeros(N, dtype=torch.float64)
    for step in range(20):
        total += (g := normal(N, seed=step))
        for p, piece in zip(params, g.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view(p.shape).clone()
        optimizer.step()
    error = torch.cat([optimizer.state[p]["error"] for p in params])
    (slab,) = optimizer.slabs
    kept = optimizer.preconditioner._window(slab.state, slab.block).rows.columns(slice(0, N)).sum(0)
    assert float(error.norm()) > 0.1 * float(total.norm())
    torch.testing.assert_close(kept + error, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind, options", [(MFAC, {}), (EFCP, {"density": 0.3}), (EFCP, {"rank": 1})], ids=str)
def test_a_gradient_that_is_not_finite_stays_out_of_the_window(kind, options):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = kind(params, window=3, damping=1e-2, **options)

    def step(g: Tensor) -> None:
        for p, piece in zip(params, g.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view(p.shape).clone()
        optimizer.step()

    bad = normal(N)
    bad[3] = math.inf
    step(bad)  # before there is anything in it
    assert all(not p.any() for p in params)
    for seed in range(5):
        step(normal(N, seed=seed))
    P, theta = optimizer.operator(copy=True).dense(), [p.detach().clone() for p in params]
    step(bad)
    assert torch.equal(optimizer.operator().dense(), P)
    assert all(torch.equal(p, before) for p, before in zip(params, theta, strict=True))
    assert float(optimizer.state[params[0]]["block.failures"]) == 1
    step(normal(N, seed=9))
    assert all(bool(p.isfinite().all()) and not torch.equal(p, q) for p, q in zip(params, theta, strict=True))


@pytest.mark.parametrize("kind", ["dense", "sparse", "low rank"])
def test_a_window_made_of_the_state_of_another_goes_on_in_the_same_tensors(kind):
    space, shapes = cv.Space(N, torch.float64), [torch.Size(shape) for shape in SHAPES]
    make = {
        "dense": lambda **given: cv.GradientWindow(4, space, **given),
        "sparse": lambda **given: cv.SparseWindow(4, space, share=0.3, **given),
        "low rank": lambda **given: cv.LowRankWindow(4, space, shapes=shapes, rank=1, **given),
    }[kind]
    window, other = make(), make()
    tensors = dict(other.state)
    for seed in range(7):
        g = normal(N, seed=seed)
        window.add(g)
        make(state=tensors, seen=seed).add(g)
    assert window.state.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in window.state.items())
    assert torch.equal(make(state=tensors, seen=7).fisher.dense(), window.fisher.dense())
    with pytest.raises(ValueError, match="those of a window of 4, but a size of 5 came"):
        cv.GradientWindow(5, space, state=tensors, seen=7)


def test_the_window_is_the_state_cut_by_parameters():
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = MFAC(params, window=4)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (slab,) = optimizer.slabs
    assert [tuple(optimizer.state[p]["rows"].shape) for p in params] == [(4, math.prod(shape)) for shape in SHAPES]
    assert optimizer.state[params[0]]["rows"].data_ptr() == slab.state["rows"].data_ptr()
    assert bool((slab.state["rows"][0] == 1).all()) and int(optimizer.state[params[0]]["block.seen"]) == 1
    assert float(slab.state["block.gram"][0, 0]) == N


def test_groups_have_windows_of_their_own():
    net = awkward()
    named = list(net.named_parameters())
    optimizer = MFAC([{"params": named[:3]}, {"params": named[3:], "window": 5}])
    nn.functional.cross_entropy(net(batches(1)[0][0]), batches(1)[0][1]).backward()
    optimizer.step()
    assert [len(slab.state["rows"]) for slab in optimizer.slabs] == [32, 5]
    optimizer.param_groups[1]["window"] = 6
    with pytest.raises(ValueError, match="those of a window of 5, but a size of 6 came"):
        optimizer.step()


def test_sparse_windows_take_a_hundredth():
    params = [nn.Parameter(torch.zeros(200, 100))]
    params[0].grad = normal(200, 100).float()
    sizes = {}
    for kind in (MFAC, EFCP):
        optimizer = kind(params, window=64, graft=None)
        optimizer.step()
        sizes[kind] = sum(t.numel() * t.element_size() for t in optimizer.slabs[0].state.values())
    gram = 8 * 64**2
    assert sizes[MFAC] - sizes[EFCP] == 4 * 64 * 20_000 - (8 * 64 * 200 + 4 * 20_000)
    assert sizes[EFCP] < 8 * 64 * 200 + 2 * 4 * 20_000 + gram + 64


def test_flags_of_torch_are_left_alone():
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fed(MFAC, normal(3, 10))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == flags
