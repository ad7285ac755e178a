"""Shampoo: its formulas, what is known of special cases, tiles, and failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.shampoo import shampoo
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.functions import power
from curvature.optim.block import Block
from curvature.optim.evidence import Evidence
from curvature.optim.rules import shampoo as module
from curvature.optim.rules.shampoo import KroneckerRoots, Shampoo

SHAPES = [(4, 4), (3, 4, 5), (5, 3, 2, 2)]


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


def after(rule, shape: tuple[int, ...], steps: list[Tensor], role="matrix"):
    """The matrix of a rule for one parameter after these gradients, of which every one is refreshed at."""
    block = Block(("w",), (torch.zeros(shape, dtype=torch.float64),), "shape", role)
    state = rule.init(block)
    evidence = None
    for t, G in enumerate(steps, 1):
        evidence = Evidence(G.reshape(-1), G.reshape(-1), torch.full((1, 1), float(t), dtype=torch.float64))
        rule.update(state, block, evidence, True)
    assert evidence is not None
    return rule.operator(state, block, evidence, None)


def polar(G: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("method", "betas", "exponent", "graft"),
    [("eigh", (0.9, 0.95), None, True), ("newton", (0.9, 1.0), None, False), ("eigh", (0.0, 0.9), 0.5, False)],
)
def test_twenty_steps_are_those_of_the_formulas(shape, method, betas, exponent, graft):
    shapes, read = [shape, shape, (2, 3)], [shape if len(shape) < 4 else (5, 3, 4)] * 2 + [(2, 3)]
    options = {"lr": 0.1, "betas": betas, "eps": 1e-2, "weight_decay": 0.1, "every": 3, "exponent": exponent}
    start, steps = starts(*shapes), gradients(20, *shapes)
    wanted = shampoo([p.detach() for p in start], steps, shapes=read, graft=graft, **options)
    grafted = {} if graft else {"graft": None}
    found = run(Shampoo(start, method=method, merge=4, **options, **grafted), steps)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
@pytest.mark.parametrize("shape", [(5, 5), (5, 3)])
def test_the_update_of_one_gradient_is_its_polar_factor(method, shape):
    """L^(-1/4) G R^(-1/4) = U V^T; what the ridge adds is left at the side of the null space, which G has nothing on."""
    G = noise(*shape)
    P = after(KroneckerRoots(beta2=0.0, eps=1e-14 if method != "newton" else 1e-10, method=method), shape, [G])
    torch.testing.assert_close((P @ G.view(-1)).view(shape), polar(G), rtol=0, atol=1e-6)


def test_with_one_factor_it_is_the_polar_factor_too():
    G = noise(7, 3)
    rule = KroneckerRoots(beta2=0.0, eps=0.0, max_dim=5)
    P = after(rule, (7, 3), [G], role="head")
    assert P.factors[0] is None
    torch.testing.assert_close((P @ G.view(-1)).view(7, 3), polar(G), rtol=0, atol=1e-12)


def test_a_single_axis_is_full_matrix_adagrad():
    steps = [noise(1, 6, seed=t) for t in range(9)]
    P = after(KroneckerRoots(beta2=1.0, eps=1e-3), (1, 6), steps)
    S = sum(torch.outer(g[0], g[0]) for g in steps)
    values, Q = torch.linalg.eigh(S)
    torch.testing.assert_close(
        P.dense(), Q @ torch.diag((values + 1e-3 * values[-1]) ** -0.5) @ Q.T, rtol=1e-10, atol=0
    )


def test_tiles_of_one_entry_are_adagrad():
    steps = [noise(3, 4, seed=t) for t in range(5)]
    P = after(KroneckerRoots(beta2=1.0, eps=0.0, max_dim=1), (3, 4), steps)
    adagrad = sum(g.square() for g in steps).view(-1) ** -0.5
    torch.testing.assert_close(P.dense(), torch.diag(adagrad), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(7, 4), (5, 7)])
def test_tiles_are_parameters_of_their_own(shape):
    """In pieces of at most four: an axis of seven in four and three, one of five in three and two."""
    rows, columns = ({7: (4, 3), 5: (3, 2), 4: (4,)}[n] for n in shape)
    options = {"betas": (0.9, 0.9), "eps": 1e-3, "every": 2, "graft": None}
    whole, steps = starts(shape), gradients(7, shape)

    def tiles(X: Tensor) -> list[Tensor]:
        return [t for strip in X.split(rows, 0) for t in strip.split(columns, 1)]

    parts = [torch.nn.Parameter(t.clone()) for t in tiles(whole[0].detach())]
    wanted = run(Shampoo(parts, **options), [tiles(step[0]) for step in steps])
    found = run(Shampoo(whole, max_dim=4, **options), steps)
    for a, b in zip(tiles(found[0]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_square_root_with_the_trace_whitens_what_has_a_kronecker_covariance():
    """Gradients A^(1/2) E_ij B^(1/2), whose sum of outer products is A ⊗ B."""
    A, B = (noise(n, n, seed=n) @ noise(n, n, seed=n).T + 0.1 * torch.eye(n) for n in (4, 3))
    a, b = (torch.linalg.cholesky(M) for M in (A, B))
    steps = [torch.outer(a[:, i], b[:, j]) for i in range(4) for j in range(3)]
    P = after(KroneckerRoots(beta2=1.0, eps=0.0, exponent=0.5), (4, 3), steps).dense()
    torch.testing.assert_close(P @ torch.kron(A, B) @ P, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    quarter = after(KroneckerRoots(beta2=1.0, eps=0.0), (4, 3), steps).dense()
    ratio = quarter @ quarter @ quarter @ quarter @ torch.kron(A, B)
    torch.testing.assert_close(ratio, ratio[0, 0] * torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_sum_of_outer_products_is_bounded_as_the_regret_is():
    """sum vec(G) vec(G)^T <= r L^(1/2) ⊗ R^(1/2), which is P^-2, for gradients of rank r."""
    steps = [
        noise(4, 1, seed=t) @ noise(1, 5, seed=50 + t) + noise(4, 1, seed=90 + t) @ noise(1, 5, seed=t)
        for t in range(9)
    ]
    P = after(KroneckerRoots(beta2=1.0, eps=0.0), (4, 5), steps)
    total = sum(torch.outer(g.view(-1), g.view(-1)) for g in steps)
    assert float(torch.linalg.eigvalsh(2 * power(P, -2).dense() - total)[0]) > -1e-9


@pytest.mark.parametrize("exponent", [None, 0.5, 0.3])
def test_updates_do_not_depend_on_the_scale_of_gradients(exponent):
    start, twin = starts((3, 4)), starts((3, 4))
    steps = gradients(6, (3, 4))
    options = {"exponent": exponent, "graft": None, "every": 2}
    found = run(Shampoo(start, **options), steps)
    scaled = run(Shampoo(twin, **options), [[1e-3 * g for g in step] for step in steps])
    torch.testing.assert_close(found, scaled, rtol=1e-9, atol=1e-11)


def test_it_follows_rotations_of_both_sides():
    U, V = (torch.linalg.qr(noise(n, n, seed=n)).Q for n in (4, 3))
    start, steps = starts((4, 3)), gradients(6, (4, 3))
    turned = [torch.nn.Parameter(U @ start[0].detach() @ V)]
    found = run(Shampoo(start, graft=None, every=2), steps)[0]
    other = run(Shampoo(turned, graft=None, every=2), [[U @ step[0] @ V] for step in steps])[0]
    torch.testing.assert_close(U @ found @ V, other, rtol=1e-8, atol=1e-9)


def test_updates_are_as_long_as_those_of_adam():
    start, twin, steps = starts((3, 4), (5, 5)), starts((3, 4), (5, 5)), gradients(5, (3, 4), (5, 5))
    adam = torch.optim.AdamW(twin, lr=1e-3, weight_decay=0.0)
    optimizer = Shampoo(start, lr=1e-3, weight_decay=0.0, every=2)
    for step in steps:
        before = [[p.detach().clone() for p in params] for params in (start, twin)]
        run(optimizer, [step])
        run(adam, [step])
        for old, new, old_, new_ in zip(before[0], start, before[1], twin, strict=True):
            torch.testing.assert_close((new - old).norm(), (new_ - old_).norm(), rtol=1e-9, atol=0)


def test_with_frozen_moments_when_they_are_refreshed_does_not_matter():
    G = noise(4, 4)
    ends = [run(Shampoo(starts((4, 4)), betas=(0.9, 0.9), every=every, graft=None), [[G]] * 8)[0] for every in (1, 5)]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


def test_all_parameters_of_a_shape_are_treated_as_each_alone():
    shapes, steps = [(3, 4)] * 3, gradients(7, *[(3, 4)] * 3)
    for method in ("eigh", "newton", "qr"):
        together = run(Shampoo(starts(*shapes), method=method, every=3), steps)
        for i in range(3):
            alone = run(Shampoo([starts(*shapes)[i]], method=method, every=3), [[step[i]] for step in steps])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-12)


def test_eigenvectors_that_are_followed_come_to_the_same_update():
    """With moments that change little from refresh to refresh."""
    shapes = [(5, 5)]
    steps = [[noise(5, 5, seed=t % 7) * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])] for t in range(200)]
    options = {"betas": (0.9, 1.0), "every": 1, "lr": 1e-2}
    found, wanted = (run(Shampoo(starts(*shapes), method=m, **options), steps)[0] for m in ("qr", "eigh"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


def test_axes_are_merged_from_the_last_on():
    def read(shape: tuple[int, ...], merge: int) -> tuple[int, ...]:
        return module.axes(Block(("w",), (torch.zeros(shape),), "shape", "matrix"), merge)

    assert read((64, 32, 3, 3), 64) == (64, 32, 9)
    assert read((16, 3, 3, 3), 64) == (16, 27)
    assert read((64, 32, 3, 3), 1024) == (64, 288)
    assert read((8, 1, 3, 3), 1) == (8, 3, 3)
    assert read((4, 6), 1000) == (4, 6)
    assert read((1, 5, 1), 64) == (5,)


def test_what_is_too_long_of_an_embedding_has_no_factor_and_other_axes_are_cut():
    rule = KroneckerRoots(max_dim=10)
    for role, names in (("embedding", {"gram.0.1"}), ("head", {"gram.0.1"}), ("matrix", {"gram.0.0", "gram.0.1"})):
        block = Block(("w",), (torch.zeros(20, 4),), "shape", role)
        state = rule.init(block)
        assert {name for name in state if name.startswith("gram")} == names
        assert sum(t.numel() for name, t in state.items() if name in names) == {"matrix": 2 * (100 + 16)}.get(role, 16)
    for shape, own in (
        ((65, 4), {"1"}),
        ((64, 4), {"0", "1"}),
        ((2, 3, 97), {"0", "1"}),
        ((2, 3, 96), {"0", "1", "2"}),
    ):
        state = KroneckerRoots(max_dim=10, merge=1).init(Block(("0.weight",), (torch.zeros(shape),), "shape", "matrix"))
        assert {name[-1] for name in state if name.startswith("gram")} == own
    small = Block(("w",), (torch.zeros(10, 4),), "shape", "head")
    assert "gram.0.0" in rule.init(small)


@pytest.mark.parametrize("longest", [3, 1000])
def test_it_is_refreshed_in_single_precision_for_half_precision_parameters(longest):
    p = torch.nn.Parameter(noise(5, 4).bfloat16())
    optimizer = Shampoo([p], max_dim=longest)
    run(optimizer, [[noise(5, 4).bfloat16()]])
    assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32, torch.float64}
    assert p.dtype == torch.bfloat16 and bool(p.isfinite().all())


def test_a_zero_gradient_moves_nothing_and_harms_nothing():
    start = starts((3, 4))
    optimizer = Shampoo(start, weight_decay=0.0, every=1)
    before = start[0].detach().clone()
    for _ in range(5):
        run(optimizer, [[torch.zeros(3, 4, dtype=torch.float64)]])
    assert torch.equal(start[0], before)
    assert bool(run(optimizer, gradients(3, (3, 4)))[0].isfinite().all())
    assert not torch.equal(start[0], before)


def test_a_decomposition_that_fails_leaves_the_last_and_a_third_in_a_row_ends_the_run(monkeypatch):
    start, steps = starts((3, 4), (3, 4)), gradients(6, (3, 4), (3, 4))
    optimizer = Shampoo(start, every=1)
    run(optimizer, steps[:2])
    held = [{n: t.clone() for n, t in optimizer.state[p].items() if n.startswith("root")} for p in start]
    eigen_roots = module.eigen_roots

    def broken(S, *more):
        return replace_second(eigen_roots(S, *more))

    def replace_second(found):
        return found._replace(
            roots=found.roots * torch.tensor([1.0, float("nan")])[:, None, None], fine=torch.tensor([True, False])
        )

    monkeypatch.setattr(module, "eigen_roots", broken)
    run(optimizer, steps[2:4])
    for name in held[0]:
        assert torch.equal(optimizer.state[start[1]][name], held[1][name])
        assert not torch.equal(optimizer.state[start[0]][name], held[0][name])
    assert optimizer.state[start[1]]["missed"] == 2 and optimizer.state[start[0]]["missed"] == 0
    before = [p.detach().clone() for p in start]
    with pytest.raises(NonFinite, match="second moments of 1 could not be decomposed at 3 refreshes in a row"):
        run(optimizer, steps[4:5])
    assert all(torch.equal(p, q) for p, q in zip(start, before, strict=True))
    monkeypatch.undo()
    optimizer.state[start[1]]["missed"].zero_()
    run(optimizer, steps[5:])
    assert optimizer.state[start[1]]["missed"] == 0


def test_memory_is_two_matrices_for_each_axis_and_what_adam_has():
    p = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = Shampoo([p])
    optimizer.slabs  # noqa: B018
    numbers = sum(t.numel() for t in optimizer.state[p].values() if t.ndim)
    assert numbers == 2 * p.numel() + 2 * (12**2 + 20**2)


def test_numbers_are_hyperparameters_of_groups_and_checked_where_they_are_used():
    optimizer = Shampoo([{"params": starts((3, 4)), "every": 2, "max_dim": 2}])
    assert optimizer.param_groups[0]["every"] == 2
    run(optimizer, gradients(1, (3, 4)))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert [tuple(state[f"root.{i}.0"].shape) for i in range(2)] == [(2, 2, 2), (2, 1, 1)]
    optimizer.param_groups[0]["every"] = 0
    with pytest.raises(ValueError, match="every is a whole number of 1 or more, but got 0"):
        run(optimizer, gradients(1, (3, 4)))
    assert replace(optimizer.preconditioner, every=3).every == 3
