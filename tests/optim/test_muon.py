"""Muon equals the iteration on the matrix itself, and what is known of that."""

from __future__ import annotations

import pytest
import torch
from optimizers import awkward, batches
from reference.muon import orthogonalised, steps
from torch import Tensor, nn

from curvature.optim.rules.muon import CONVERGENT, QUINTIC, Muon, polar_factor, symmetric_product

F64 = torch.float64
SHAPES = {"wide": (3, 8), "tall": (9, 4), "square": (5, 5), "convolution": (4, 3, 2, 2)}


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draws(size, size, seed=seed)).Q


def with_values(values: Tensor, columns: int) -> Tensor:
    """A matrix with these singular values."""
    return rotation(len(values), 1) * values @ rotation(columns, 2)[: len(values)]


def direction(B: Tensor, **options) -> Tensor:
    """What a first step subtracts, for the gradient B."""
    p = nn.Parameter(torch.zeros_like(B))
    p.grad = B.clone()
    Muon([p], 1.0, 0.0, 0.0, **{"match": "none", **options}).step()
    return -p.detach()


@pytest.mark.parametrize("match", ["rms", "spectral", "none"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twenty_steps_equal_the_iteration_on_the_matrix_itself(shape, nesterov, match):
    params = [nn.Parameter(draws(*shape, seed=i)) for i in range(3)]  # of one shape: a stack
    grads = [[draws(*shape, seed=100 * t + i) for t in range(20)] for i in range(3)]
    settings = {"lr": 0.02, "beta": 0.9, "decay": 0.1, "nesterov": nesterov, "match": match, "count": 5}
    paths = [steps(p.detach(), g, **settings) for p, g in zip(params, grads, strict=True)]
    optimizer = Muon(params, 0.02, 0.9, 0.1, nesterov=nesterov, match=match)
    for t in range(20):
        for p, g in zip(params, grads, strict=True):
            p.grad = g[t].clone()
        optimizer.step()
        for p, g, path in zip(params, grads, paths, strict=True):
            torch.testing.assert_close(p.detach(), path[t], rtol=1e-9, atol=1e-11)
            assert torch.equal(p.grad, g[t])  # no average is written into it


@pytest.mark.parametrize(
    ("least", "coefficients", "count", "low", "high"),
    [
        (1e-2, QUINTIC, 5, 0.682, 1.134),
        (1e-3, QUINTIC, 5, 0.47, 1.203),
        (1e-2, CONVERGENT, 5, 0.972, 1.21),
        (1e-2, CONVERGENT, 10, 0.9963, 1.0043),
        (1e-2, CONVERGENT, 15, 0.9997, 1.0003),
    ],
)
def test_singular_values_end_near_one(least, coefficients, count, low, high):
    values = torch.cat([torch.logspace(0, torch.tensor(least).log10().item(), 40, dtype=F64)])
    values = (
        values / values.norm() * max(1, float(values.norm() * least / values.min()))
    )  # the least of them is `least`
    B = with_values(values / values.norm(), 60)
    kept = torch.linalg.svdvals(B) >= least
    found = torch.linalg.svdvals(polar_factor(B[None], count, coefficients)[0] @ B)
    expected = torch.linalg.svdvals(orthogonalised(B, count, coefficients))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    U, _, Vh = torch.linalg.svd(B, full_matrices=False)
    images = ((U.T @ polar_factor(B[None], count, coefficients)[0] @ B) @ Vh.T).diagonal()[kept]
    assert kept.sum() > 10 and low - 1e-3 < float(images.min()) and float(images.max()) < high + 1e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_length_of_the_gradient_does_not_matter(shape):
    B = draws(*shape, seed=0)
    torch.testing.assert_close(direction(1e6 * B), direction(B), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(128, 200), (200, 128), (136, 136)], ids=str)
@pytest.mark.parametrize("spread", [0, 4], ids=["even", "decaying"])
def test_bfloat16_is_as_exact_as_the_iteration_on_the_matrix_itself_is_in_bfloat16(spread, shape):
    B = with_values(torch.logspace(0, -spread, min(shape), dtype=F64), max(shape))
    B = B if shape[0] <= shape[1] else B.T.contiguous()
    exact = orthogonalised(B, 5, QUINTIC)
    error = (direction(B, dtype=torch.bfloat16) - exact).norm()
    plain = (orthogonalised((B / B.norm()).bfloat16(), 5, QUINTIC).double() - exact).norm()
    assert 0 < error < 1.5 * plain
    torch.testing.assert_close(direction(B, dtype=torch.float32), exact, rtol=0, atol=1e-3)
    small = B[:20, :30]
    assert torch.equal(direction(small, dtype=torch.bfloat16), direction(small))
    with pytest.raises(ValueError, match="float16"):
        Muon([nn.Parameter(B)], dtype=torch.float16)


def test_what_bfloat16_multiplies_by_is_a_matrix_like_that_of_float64():
    B = with_values(torch.logspace(0, -2, 128, dtype=F64), 130)
    matrices = []
    for dtype in (torch.bfloat16, None):
        p = nn.Parameter(torch.zeros_like(B))
        p.grad = B.clone()
        optimizer = Muon([p], momentum=0.0, dtype=dtype)
        optimizer.step()
        matrices.append(optimizer.operator().apply(draws(3, B.numel(), seed=0)))
    found, expected = matrices
    assert found.dtype == F64 and not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_it_turns_with_the_gradient_and_is_transposed_with_it():
    B, U, V = draws(4, 7, seed=0), rotation(4, 1), rotation(7, 2)
    torch.testing.assert_close(direction(U @ B @ V), U @ direction(B) @ V, rtol=0, atol=1e-12)
    torch.testing.assert_close(direction(B.T.contiguous()), direction(B).T, rtol=0, atol=1e-12)


def test_it_is_the_largest_step_down_of_a_unit_of_the_spectral_norm():
    B = draws(6, 9, seed=0)
    step = direction(B, convergent=True, steps=25)
    assert float(torch.linalg.matrix_norm(step, 2)) == pytest.approx(1, abs=1e-6)
    assert float((B * step).sum()) == pytest.approx(float(torch.linalg.matrix_norm(B, "nuc")), rel=1e-6)
    for seed in range(20):
        other = draws(6, 9, seed=seed + 1)
        assert float((B * other).sum() / torch.linalg.matrix_norm(other, 2)) < float((B * step).sum())


def test_it_is_shampoo_without_memory():
    B = draws(5, 8, seed=0)
    values, vectors = torch.linalg.eigh(B @ B.T)
    left = vectors * values**-0.25 @ vectors.T
    U, singular, Vh = torch.linalg.svd(B, full_matrices=False)
    right = Vh.T * singular**-0.5 @ Vh  # the pseudo-inverse of the fourth root of B^T B
    step = direction(B, convergent=True, steps=25)
    torch.testing.assert_close(step, left @ B @ right, rtol=0, atol=1e-6)
    torch.testing.assert_close(step, vectors * values**-0.5 @ vectors.T @ B, rtol=0, atol=1e-6)
    torch.testing.assert_close(step, U @ Vh, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steps_are_matched_by_their_rows_and_all_other_axes(shape):
    B, rows, columns = draws(*shape, seed=0), shape[0], draws(*shape, seed=0)[0].numel()
    exact = {"convergent": True, "steps": 25}
    assert float(direction(B, match="rms", **exact).square().mean().sqrt()) == pytest.approx(0.2, rel=1e-6)
    spectral = direction(B, match="spectral", **exact).reshape(rows, columns)
    assert float(torch.linalg.matrix_norm(spectral, 2)) == pytest.approx((rows / columns) ** 0.5, rel=1e-6)


def test_decay_keeps_the_spectral_norm_below_its_inverse():
    p = nn.Parameter(draws(6, 9, seed=0))
    optimizer = Muon([p], 0.5, 0.5, 0.4, match="none", convergent=True, steps=20)
    for _ in range(40):
        p.grad = draws(6, 9, seed=1)  # always the same way
        optimizer.step()
    assert 2.4 < float(torch.linalg.matrix_norm(p.detach(), 2)) < 2.5 + 1e-6


@pytest.mark.parametrize("stack", [1, 3])
def test_gradients_of_zero_move_nothing(stack):
    params = [nn.Parameter(draws(4, 6, seed=i)) for i in range(stack)]
    before = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = torch.zeros_like(p) if i == 0 else draws(4, 6, seed=9)
    Muon(params, weight_decay=0.0).step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True] + [False] * (stack - 1)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (300, 260)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_with_full_precision_it_is_the_muon_of_torch(shape, nesterov, monkeypatch):
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    assert distance(shape, nesterov) < 1e-6  # torch clamps the norm where 1e-7 is added here


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (300, 260)])
def test_as_torch_has_it_the_muon_of_torch_is_off_by_rounding(shape):
    assert 1e-4 < distance(shape, True) < 0.06


def distance(shape: tuple[int, int], nesterov: bool) -> float:
    """How far ten steps of torch's and of ours are apart, relative to their length."""
    ours, theirs = (nn.Parameter(draws(*shape, seed=0)) for _ in range(2))
    optimizer = Muon([ours], 0.02, 0.9, 0.1, nesterov=nesterov)
    other = torch.optim.Muon(
        [theirs], 0.02, momentum=0.9, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for t in range(10):
        for p in (ours, theirs):
            p.grad = draws(*shape, seed=t)
        optimizer.step()
        other.step()
    return float((ours - theirs).detach().norm() / (theirs.detach() - draws(*shape, seed=0)).norm())


def test_parameters_of_a_model_are_enough_and_names_route_the_rest():
    net = awkward()
    optimizer = Muon(net.parameters(), 1e-2)
    x, y = batches(1)[0]
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    named = {name: rule for name, _, rule, _ in Muon(net.named_parameters()).routing.rows}
    orthogonal = {"first.weight", "conv.weight", "second.weight"}
    assert {name for name, rule in named.items() if rule == "NewtonSchulz"} == orthogonal


@pytest.mark.parametrize("size", [255, 256, 259, 512])
def test_half_a_symmetric_product_is_the_whole(size):
    A = draws(2, size, size, seed=0)
    A = A + A.mT
    torch.testing.assert_close(symmetric_product(A, A), A @ A, rtol=1e-11, atol=1e-9)
    B = draws(2, size, 40, seed=1)
    torch.testing.assert_close(symmetric_product(B, B.mT), B @ B.mT, rtol=1e-11, atol=1e-11)


def test_its_matrix_is_that_of_the_last_momentum():
    p = nn.Parameter(draws(5, 8, seed=0))
    optimizer = Muon([p], nesterov=False)
    for t in range(3):
        p.grad = draws(5, 8, seed=t)
        optimizer.step()
    M = optimizer.state[p]["momentum"]
    expected = torch.kron(polar_factor(M[None], 5, QUINTIC)[0], torch.eye(8, dtype=F64))
    torch.testing.assert_close(optimizer.operator().dense(), expected, rtol=1e-9, atol=1e-11)
