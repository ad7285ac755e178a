"""Inverse roots and eigenbases of stacks of matrices, and what becomes of those that fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import rotated
from torch import Tensor

from curvature.linalg import roots
from curvature.linalg.roots import basis_roots, eigen, eigen_roots, eigenbasis, newton_roots, raised, whole_products


def spectrum(cond: float, size: int = 64) -> Tensor:
    return cond ** -torch.linspace(0, 1, size, dtype=torch.float64)


def exact(S: Tensor, exponent: float, ridge: float = 0.0) -> Tensor:
    """By NumPy, one at a time."""
    values, vectors = map(torch.from_numpy, np.linalg.eigh(S.double().numpy()))
    return (vectors * (values + ridge * values.max()) ** -exponent) @ vectors.T


def stack(count: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack([rotated(spectrum(10.0 ** (i + 1), size), seed=i) for i in range(count)]).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("root", "ridge"), [(1, 1e-6), (2, 0.0), (3, 1e-6), (4, 0.0), (8, 1e-3)])
def test_roots_by_eigenvalues_and_by_products_are_those_of_each_matrix(root, ridge):
    S = stack(4, 6)
    for i, S_i in enumerate(S):
        wanted = exact(S_i, 1 / root, ridge)
        assert error(eigen_roots(S, 1 / root, ridge).roots[i], wanted) < 1e-10
        assert error(newton_roots(S, root, ridge).roots[i], wanted) < 1e-9
    assert eigen_roots(S, 1 / root, ridge).fine.all() and newton_roots(S, root, ridge).fine.all()


@pytest.mark.parametrize("exponent", [0.1, 0.37, 0.5, 1.0])
def test_any_power_is_taken_of_eigenvalues(exponent):
    S = stack(2, 5)
    assert error(eigen_roots(S, exponent, 1e-4).roots[1], exact(S[1], exponent, 1e-4)) < 1e-11


@pytest.mark.parametrize(
    ("cond", "by_products", "by_eigenvalues"), [(1e3, 4e-6, 8e-6), (1e6, 1.7e-3, 6e-2), (1e8, 0.2, 0.4)]
)
def test_what_single_precision_can_honour(cond, by_products, by_eigenvalues):
    """Twice what was measured for a fourth root, 64 x 64: so a ridge below 1e-6 of the largest eigenvalue is rounding."""
    S = rotated(spectrum(cond))
    wanted = exact(S, 0.25)
    newton, eigh = newton_roots(S.float()[None], 4, 0.0), eigen_roots(S.float()[None], 0.25, 0.0)
    assert newton.fine.all() and error(newton.roots[0], wanted) < by_products
    assert eigh.fine.all() and error(eigh.roots[0], wanted) < by_eigenvalues


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_is_told_and_harms_no_other(bad):
    S = stack(3, 5)
    broken = S.clone()
    broken[1, 0, 1] = broken[1, 1, 0] = bad
    before = torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    never = torch.zeros(3, dtype=torch.bool)
    for f in (
        lambda A: eigen_roots(A, 0.25, 1e-6),
        lambda A: newton_roots(A, 4, 1e-6),
        lambda A: eigenbasis(A, before, never)[::2],
        lambda A: eigenbasis(A, before, ~never)[::2],
        lambda A: basis_roots(A, before, 0.25, 1e-6),
    ):
        found, fine = f(broken)
        assert fine.tolist() == [True, False, True]
        torch.testing.assert_close(found[::2], f(S)[0][::2], rtol=1e-12, atol=1e-12)


def failing(monkeypatch, fails) -> list[Tensor]:
    """Let `eigh` fail where `fails(matrices)`; returns what it is called with."""
    eigh, calls = torch.linalg.eigh, []

    def tried(A: Tensor):
        calls.append(A)
        if fails(A):
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", tried)
    return calls


def test_what_fails_in_single_precision_is_tried_in_double(monkeypatch):
    S = stack(2, 5, torch.float32)
    calls = failing(monkeypatch, lambda A: A.dtype == torch.float32)
    values, vectors, fine = eigen(S)
    assert [A.dtype for A in calls] == [torch.float32, torch.float64] and fine.all()
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, S, rtol=1e-5, atol=1e-6)


def test_one_that_fails_in_double_too_is_the_only_one_lost(monkeypatch):
    S = stack(3, 5, torch.float32)
    failing(monkeypatch, lambda A: A.ndim == 3 or bool(torch.equal(A.float(), S[2])))
    values, vectors, fine = eigen(S)
    assert fine.tolist() == [True, True, False]
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, S * fine[:, None, None], rtol=1e-5, atol=1e-6)


def test_products_that_do_not_converge_are_tried_in_double_and_then_told(monkeypatch):
    S = torch.stack([rotated(spectrum(1e3)), rotated(spectrum(1e11))]).float()
    whole, newton = [], newton_roots
    monkeypatch.setattr(roots, "newton_roots", lambda A, *more: whole.append(A) or newton(A, *more))
    found = newton(S, 4, 5e-9)
    assert found.fine.all() and [len(A) for A in whole] == [1] and whole[0].dtype == torch.float64
    assert error(found.roots[1], exact(S[1], 0.25, 5e-9)) < 1e-6
    monkeypatch.setattr(roots, "NEWTON", 5)
    assert newton(S, 4, 5e-9).fine.tolist() == [False, False]


def test_of_zero_the_root_is_the_identity():
    S, eye = torch.zeros(1, 3, 3), torch.eye(3)
    for found in (eigen_roots(S, 0.25, 1e-6), newton_roots(S, 4, 1e-6)):
        assert found.fine.all() and torch.equal(found.roots[0], eye)
    assert raised(torch.tensor([[-1e-9, 4.0]]), 1.0, 1.0).tolist() == [[0.25, 0.125]]


def test_orthogonal_iteration_comes_to_the_sorted_eigenvectors():
    S = stack(2, 6)
    never, Q = torch.zeros(2, dtype=torch.bool), torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    for _ in range(200):
        Q = eigenbasis(S, Q, never).vectors
    inside = Q.mT @ S @ Q
    values = torch.linalg.eigvalsh(S).flip(-1)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=1e-9, atol=1e-9)
    first = eigenbasis(S, Q, ~never).vectors
    torch.testing.assert_close(first.mT @ S @ first, torch.diag_embed(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        basis_roots(S, Q, 0.25, 1e-3).roots, eigen_roots(S, 0.25, 1e-3).roots, rtol=1e-8, atol=1e-8
    )


def test_a_step_of_orthogonal_iteration_is_one_of_the_qr_algorithm():
    S, Q = stack(1, 5), torch.linalg.eigh(stack(1, 5) + 0.05 * torch.diag(torch.arange(5.0)))[1].flip(-1)
    found = eigenbasis(S, Q, torch.zeros(1, dtype=torch.bool)).vectors
    R = torch.linalg.qr(Q.mT @ S @ Q)[0]
    torch.testing.assert_close((found.mT @ (Q @ R)).abs(), torch.eye(5).double()[None], rtol=1e-10, atol=1e-10)


def test_columns_are_followed_in_the_order_of_what_they_are_worth():
    S = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))[None]
    basis = eigenbasis(S, torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, dtype=torch.bool))
    assert basis.order.tolist() == [[1, 2, 0]]
    assert torch.equal(basis.vectors[0].abs(), torch.eye(3, dtype=torch.float64)[:, [1, 2, 0]])


def test_bases_stay_orthogonal_in_single_precision():
    generator = torch.Generator().manual_seed(0)
    S = torch.zeros(1, 16, 16)
    Q = torch.eye(16)[None]
    for step in range(300):
        G = torch.randn(1, 16, 3, generator=generator)
        S = 0.9 * S + G @ G.mT
        Q = eigenbasis(S, Q, torch.tensor([step == 0])).vectors
    assert float((Q.mT @ Q - torch.eye(16)).abs().max()) < 1e-5


def test_rounding_of_products_is_off_inside_and_as_it_was_after():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(KeyError), whole_products():
            assert matmul.fp32_precision == "ieee"
            raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
