"""SOAP and KL-Shampoo: their formulas, what is known of special cases, bases that turn, and failures."""

from __future__ import annotations

import pytest
import torch
from reference.soap import kl_shampoo, soap
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.functions import power
from curvature.linalg.packed import unpacked
from curvature.linalg.roots import Basis
from curvature.linalg.tensors import TensorSpectral
from curvature.optim.block import Block
from curvature.optim.evidence import Evidence
from curvature.optim.rules import soap as module
from curvature.optim.rules.adam import AdamDiagonal
from curvature.optim.rules.soap import SOAP, AdamInEigenbasis, KLShampoo, KroneckerCovariance

SHAPES = [(4, 4), (3, 4, 5), (5, 3, 2, 2)]  # along every axis of which one gradient has moments of full rank


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer, gradients: list[list[Tensor]]) -> list[Tensor]:
    """Where its parameters come to with these gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone().view_as(p)
        optimizer.step()
    return [p.detach() for p in params]


def starts(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(noise(*shape, seed=100 + i)) for i, shape in enumerate(shapes)]


def gradients(steps: int, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    return [[noise(*shape, seed=10 * t + i) for i, shape in enumerate(shapes)] for t in range(steps)]


def block_of(*shape: int, role="matrix") -> Block:
    return Block(("w",), (torch.zeros(shape, dtype=torch.float64),), "shape", role)


def evidence(G: Tensor, step: int) -> Evidence:
    return Evidence(G.reshape(-1), G.reshape(-1), torch.full((1, 1), float(step), dtype=torch.float64))


def polar(G: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    return U @ V


OPTIONS = {"lr": 0.1, "betas": (0.9, 0.8), "eps": 1e-3, "weight_decay": 0.1, "every": 3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refresh", ["before", "after"])
def test_twenty_steps_of_soap_are_those_of_the_formulas(shape, refresh):
    """And, with "after", those of the authors' order, whose momentum lives in the basis that turns."""
    shapes, read = [shape, shape], [shape if len(shape) < 4 else (5, 3, 4)] * 2
    start, steps = starts(*shapes), gradients(20, *shapes)
    wanted = soap([p.detach() for p in start], steps, shapes=read, after=refresh == "after", **OPTIONS)
    found = run(SOAP(start, refresh=refresh, merge=4, **OPTIONS), steps)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("options", "idle"), [({"one_sided": True}, 1), ({"max_dim": 5}, 1)])
def test_twenty_steps_with_an_axis_left_alone(options, idle):
    start, steps = starts((4, 7)), gradients(20, (4, 7))
    wanted = soap([p.detach() for p in start], steps, shapes=[(4, 7)], after=False, idle=idle, **OPTIONS)
    optimizer = SOAP(start, **options, **OPTIONS)
    torch.testing.assert_close(run(optimizer, steps), wanted, rtol=1e-9, atol=1e-10)
    assert set(optimizer.state[start[0]]) == {"momentum", "square", "gram.0", "basis.0", "step", "failures", "missed"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twenty_steps_of_kl_shampoo_are_those_of_the_formulas(shape):
    """In the original coordinates, where the rule keeps covariances in those of the bases."""
    shapes, read = [shape, shape], [shape if len(shape) < 4 else (5, 3, 4)] * 2
    start, steps = starts(*shapes), gradients(20, *shapes)
    options = {**OPTIONS, "eps": 1e-2}
    wanted = kl_shampoo([p.detach() for p in start], steps, shapes=read, **options)
    torch.testing.assert_close(run(KLShampoo(start, merge=4, **options), steps), wanted, rtol=1e-9, atol=1e-10)


def test_with_bases_that_never_turn_it_is_adam():
    rule, adam, block = AdamInEigenbasis(beta2=0.9, eps=1e-3), AdamDiagonal(beta2=0.9, eps=1e-3), block_of(3, 4)
    state, other = rule.init(block), adam.init(block)
    for t in range(1, 6):
        seen = evidence(noise(3, 4, seed=t), t)
        rule.update(state, block, seen, False)
        adam.update(other, block, seen, False)
        P, D = rule.operator(state, block, seen, None), adam.operator(other, block, seen, None)
        torch.testing.assert_close(P.dense(), D.dense(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "size"), [(SOAP, 1.0), (KLShampoo, 2.0)])
def test_of_a_constant_gradient_the_update_is_the_polar_factor(kind, size):
    """SOAP divides each of its four singular values by itself; for KL-Shampoo L = G R^-1 G^T / 4 makes L^(-1/2) G
    R^(-1/2) twice an orthogonal matrix, with a root mean square of 1."""
    G, start = noise(4, 4), starts((4, 4))
    optimizer = kind(start, lr=1.0, betas=(0.0, 0.5), eps=1e-8, weight_decay=0.0, every=1)
    run(optimizer, [[G]] * 60)
    before = start[0].detach().clone()
    run(optimizer, [[G]])
    torch.testing.assert_close(before - start[0].detach(), size * polar(G), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "follows"), [(SOAP, True), (KLShampoo, True), (torch.optim.Adam, False)])
def test_it_follows_rotations_of_every_axis_as_adam_does_not(kind, follows):
    U, V = (torch.linalg.qr(noise(4, 4, seed=seed)).Q for seed in (1, 2))
    options = {"eps": 1e-4} | ({"every": 2, "merge": 1} if follows else {})

    def turn(X: Tensor) -> Tensor:
        return torch.einsum("ia,abc,jb->ijc", U, X, V)

    start, steps = starts((4, 4, 3)), gradients(7, (4, 4, 3))
    turned = [torch.nn.Parameter(turn(start[0].detach()))]
    found = turn(run(kind(start, **options), steps)[0])
    other = run(kind(turned, **options), [[turn(step[0])] for step in steps])[0]
    assert (float((found - other).abs().max()) < 1e-8) == follows


def test_the_scale_of_gradients_does_not_matter_to_kl_shampoo():
    start, twin, steps = starts((4, 4)), starts((4, 4)), gradients(7, (4, 4))
    scaled = [[1e-4 * g for g in step] for step in steps]
    found, other = run(KLShampoo(start, every=3), steps), run(KLShampoo(twin, every=3), scaled)
    torch.testing.assert_close(found, other, rtol=1e-8, atol=1e-10)


def divergence(M: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """Twice KL(N(0, M) | N(0, L ⊗ R)), without what does not depend on L and R."""
    S = torch.kron(L, R)
    return torch.logdet(S) + torch.trace(torch.linalg.solve(S, M))


def settled(samples: Tensor, steps: int = 600) -> tuple[Tensor, Tensor, TensorSpectral]:
    """The factors that KL-Shampoo comes to for gradients (N, m, n): an axis that has no factor only averages."""
    rule = KroneckerCovariance(beta2=0.9, eps=1e-14, max_dim=len(samples) - 1, merge=1)
    block = block_of(*samples.shape)
    state = rule.init(block)
    for t in range(1, steps + 1):
        rule.update(state, block, evidence(samples, t), t % 3 == 1)
    bases = [state[f"basis.{axis}"][0] for axis in (1, 2)]
    inside = [unpacked(state[f"covariance.{axis}"], len(Q))[0] for axis, Q in zip((1, 2), bases, strict=True)]
    L, R = (Q @ S @ Q.T for Q, S in zip(bases, inside, strict=True))
    return L, R, rule.operator(state, block, evidence(samples, steps), None)


def test_kl_shampoo_comes_to_the_least_divergence():
    samples = noise(9, 3, 4) * torch.tensor([3.0, 1.0, 0.3]).view(3, 1)
    samples += noise(9, 3, 1, seed=1) * noise(9, 1, 4, seed=2)  # of no Kronecker covariance
    L, R, _ = settled(samples)
    M = samples.view(9, 12).T @ samples.view(9, 12) / 9
    leaves = [L.clone().requires_grad_(), R.clone().requires_grad_()]
    least = divergence(M, *leaves)
    least.backward()
    for leaf in leaves:
        assert leaf.grad is not None and float((leaf.grad * leaf.detach().abs().max()).abs().max()) < 1e-8
    for seed in range(5):
        moved = [S + 1e-2 * (d + d.T) for S, d in ((L, noise(3, 3, seed=seed)), (R, noise(4, 4, seed=seed)))]
        assert divergence(M, *moved) > least


def test_kl_shampoo_whitens_what_has_a_kronecker_covariance_without_a_trace_or_a_second_moment():
    A, B = (noise(n, n, seed=n) @ noise(n, n, seed=n).T + 0.1 * torch.eye(n) for n in (3, 4))
    a, b = torch.linalg.cholesky(A), torch.linalg.cholesky(B)
    samples = torch.stack([12**0.5 * torch.outer(a[:, i], b[:, j]) for i in range(3) for j in range(4)])
    L, R, P = settled(samples)
    torch.testing.assert_close(torch.kron(L, R), torch.kron(A, B), rtol=1e-8, atol=1e-10)
    whole = torch.block_diag(*[torch.kron(A, B)] * 12)
    torch.testing.assert_close(power(P, -2).dense(), whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_with_frozen_moments_when_they_are_refreshed_does_not_matter(kind):
    G = noise(4, 4)
    ends = [run(kind(starts((4, 4)), every=every, eps=1e-4), [[G]] * 8)[0] for every in (1, 5)]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_all_parameters_of_a_shape_are_treated_as_each_alone(kind):
    shapes, steps = [(4, 4)] * 3, gradients(7, *[(4, 4)] * 3)
    together = run(kind(starts(*shapes), every=3), steps)
    for i in range(3):
        alone = run(kind([starts(*shapes)[i]], every=3), [[step[i]] for step in steps])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_a_parameter_that_comes_later_begins_with_its_own_eigenvectors(kind):
    """It takes no step of orthogonal iteration, nor does it make others begin again."""
    start, steps = starts((4, 4), (4, 4)), gradients(8, (4, 4), (4, 4))
    optimizer = kind(start, every=3)
    for first, second in steps[:4]:
        start[0].grad, start[1].grad = first.clone(), None
        optimizer.step()
        assert second is not None
    held = optimizer.state[start[0]]["basis.0"].clone()
    start[0].grad, start[1].grad = steps[4][0].clone(), steps[4][1].clone()
    optimizer.step()
    alone = kind([torch.nn.Parameter(noise(4, 4, seed=101))], every=3)
    run(alone, [[steps[4][1]]])
    torch.testing.assert_close(start[1].detach(), alone.param_groups[0]["params"][0].detach(), rtol=1e-9, atol=1e-11)
    turned = held.T @ optimizer.state[start[0]]["basis.0"]
    assert float((turned.abs().amax(0) - 1).abs().max()) < 0.5 and not torch.equal(turned.abs(), torch.eye(4))


def test_second_moments_go_along_with_the_columns_that_are_sorted():
    rule, block = AdamInEigenbasis(beta2=0.5), block_of(3, 3)
    state = rule.init(block)
    state["square"].copy_(torch.arange(9.0).view(1, 3, 3))
    state["basis.0"].copy_(torch.eye(3)[None])
    moments = {0: torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))[None]}
    rule._turn(state, block, moments, torch.tensor([False]))
    assert state["square"][0].tolist() == [[3, 4, 5], [6, 7, 8], [0, 1, 2]]
    assert torch.equal(state["basis.0"][0].abs(), torch.eye(3, dtype=torch.float64)[:, [1, 2, 0]])
    rule._turn(state, block, {1: moments[0]}, torch.tensor([False]))
    assert state["square"][0].tolist() == [[4, 5, 3], [7, 8, 6], [1, 2, 0]]


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_bases_stay_orthogonal_in_single_precision(kind):
    p = torch.nn.Parameter(noise(12, 5).float())
    optimizer = kind([p], every=1)
    for t in range(200):
        p.grad = noise(12, 5, seed=t).float()
        optimizer.step()
    for axis in (0, 1):
        Q = optimizer.state[p][f"basis.{axis}"]
        assert float((Q.T @ Q - torch.eye(len(Q))).abs().max()) < 1e-5
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_the_first_gradient_moves_parameters(kind):
    """The authors' code leaves it out."""
    start = starts((4, 4))
    before = start[0].detach().clone()
    run(kind(start, weight_decay=0.0), [[noise(4, 4)]])
    moved = before - start[0].detach()
    assert 0.3 < float(moved.norm() / (3e-3 * 4)) < 1.1  # every entry by about the learning rate, as with Adam


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_gradients_that_begin_with_zeros_move_nothing_until_one_is_not(kind):
    start = starts((4, 4))
    optimizer = kind(start, weight_decay=0.0, every=1)
    before = start[0].detach().clone()
    run(optimizer, [[torch.zeros(4, 4, dtype=torch.float64)]] * 4)
    assert torch.equal(start[0], before)
    run(optimizer, gradients(3, (4, 4)))
    moved = float((start[0].detach() - before).abs().max())
    assert 1e-4 < moved < 0.1 and bool(start[0].isfinite().all())


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_rows_whose_gradient_is_always_zero_stay(kind):
    start, steps = starts((4, 5)), [[noise(4, 5, seed=t) * torch.tensor([1.0, 0, 1, 1]).view(4, 1)] for t in range(60)]
    before = start[0].detach().clone()
    run(kind(start, weight_decay=0.0, every=2), steps)
    assert float((start[0].detach() - before)[1].abs().max()) < 1e-6
    assert 1e-3 < float((start[0].detach() - before).abs().max()) < 1.0


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_a_decomposition_that_fails_leaves_the_last_and_a_third_in_a_row_ends_the_run(kind, monkeypatch):
    start, steps = starts((4, 4), (4, 4)), gradients(6, (4, 4), (4, 4))
    optimizer = kind(start, every=1)
    run(optimizer, steps[:2])
    held = optimizer.state[start[1]]["basis.0"].clone()
    eigenbasis = module.eigenbasis

    def broken(*arguments) -> Basis:
        found = eigenbasis(*arguments)
        nan = torch.tensor([0.0, float("nan")]).view(2, 1, 1)
        return found._replace(vectors=found.vectors + nan, fine=torch.tensor([True, False]))

    monkeypatch.setattr(module, "eigenbasis", broken)
    run(optimizer, steps[2:4])
    assert torch.equal(optimizer.state[start[1]]["basis.0"], held)
    assert optimizer.state[start[1]]["missed"] == 2 and optimizer.state[start[0]]["missed"] == 0
    assert all(bool(t.isfinite().all()) for t in optimizer.state[start[1]].values())
    with pytest.raises(NonFinite, match="second moments of 1 could not be decomposed at 3 refreshes in a row"):
        run(optimizer, steps[4:5])


def test_what_has_no_axis_short_enough_is_left_to_the_fallback():
    optimizer = SOAP([torch.nn.Parameter(torch.zeros(7, 6)), torch.nn.Parameter(torch.zeros(7, 3))], max_dim=5)
    assert [row[2:] for row in optimizer.routing.rows] == [
        ("AdamInEigenbasis", "matrix"),
        ("AdamDiagonal", "axes beyond 5"),
    ]


@pytest.mark.parametrize(("kind", "numbers"), [(SOAP, 2), (KLShampoo, 1)])
def test_memory_is_two_matrices_for_each_axis_and_a_number_or_two_for_each_parameter(kind, numbers):
    p = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = kind([p])
    optimizer.slabs  # noqa: B018
    assert sum(t.numel() for t in optimizer.state[p].values() if t.ndim) == numbers * 240 + 2 * (12**2 + 20**2)


@pytest.mark.parametrize("kind", [SOAP, KLShampoo])
def test_its_matrix_is_that_of_the_bases(kind):
    optimizer = kind(starts((4, 4)))
    run(optimizer, gradients(3, (4, 4)))
    (P,) = optimizer.operator().blocks.values()
    assert isinstance(P, TensorSpectral) and len(P.bases) == 2 and P.values.shape == (1, 4, 4)
