"""M-FAC: the inverse of the Fisher matrix of a window of gradients, against the dense one and the paper's recurrences."""

from __future__ import annotations

import pytest
import torch
from matrices import tensor

import curvature as cv

N, M = 40, 12
EYE = torch.eye(N, dtype=torch.float64)


def gradients(count: int = M, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    scales = torch.linspace(0.1, 3, N, dtype=torch.float64)
    return (torch.randn(count, N, generator=generator, dtype=torch.float64) * scales).to(dtype)


def filled(rows: torch.Tensor, size: int = M) -> cv.GradientWindow:
    window = cv.GradientWindow(size, cv.Space(N, rows.dtype))
    for row in rows:
        window.add(row)
    return window


def dense(rows: torch.Tensor, damping: float) -> torch.Tensor:
    return rows.T @ rows / len(rows) + damping * EYE


def recurrences(rows: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """v and q of the static algorithm: F_m^-1 x = x / damping - sum_i v_i (v_i . x) / q_i."""
    m, v, q = len(rows), torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.float64)
    for i, g in enumerate(rows):
        v[i] = g / damping - sum((v[j] * (v[j] @ g) / q[j] for j in range(i)), torch.zeros_like(g))
        q[i] = m + g @ v[i]
    return v, q


@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("count", [1, M, 2 * N])
def test_the_inverse_is_that_of_the_dense_matrix_and_of_the_recurrences(count, damping):
    rows = gradients(count)
    inverse = cv.inverse(filled(rows, count).fisher, damping=damping)
    exact = torch.linalg.inv(dense(rows, damping))
    tolerance = max(1e-10, 1e-13 / damping) * float(exact.abs().max())
    torch.testing.assert_close(inverse.dense(), exact, rtol=0, atol=tolerance)
    v, q = recurrences(rows, damping)
    torch.testing.assert_close(inverse.dense(), EYE / damping - v.T @ (v / q.unsqueeze(1)), rtol=0, atol=tolerance)
    torch.testing.assert_close(cv.diagonal(inverse).value, exact.diagonal(), rtol=0, atol=tolerance)
    i, j = torch.arange(N), torch.arange(N).flip(0)
    torch.testing.assert_close(inverse.entries(i, j), exact[i, j], rtol=0, atol=tolerance)
    assert float(cv.trace(inverse)) == pytest.approx(float(exact.trace()), rel=max(1e-10, 1e-13 / damping))
    expected = float(torch.linalg.slogdet(dense(rows, damping)).logabsdet)
    assert float(cv.logdet(filled(rows, count).fisher, damping=damping)) == pytest.approx(expected, rel=1e-9)
    assert N * torch.tensor(damping).double().log() + (q / count).log().sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 5, M, M + 5, 3 * M + 1])
def test_a_window_that_slid_is_that_of_the_last_gradients(steps):
    rows = gradients(steps)
    slid, fresh = filled(rows), filled(rows[-M:])
    at_once = cv.GradientWindow(M, cv.Space(N, torch.float64))
    at_once.add(rows)
    exact = dense(rows[-M:], 1e-2)
    for window in (slid, fresh, at_once):
        assert len(window) == min(steps, M)
        torch.testing.assert_close(cv.inverse(window.fisher, damping=1e-2).dense() @ exact, EYE, rtol=0, atol=1e-10)
    assert torch.equal(slid.gradients, at_once.gradients)


def test_a_gradient_that_is_taken_out_and_put_back_changes_nothing():
    rows = gradients()
    window = filled(rows)
    before = cv.inverse(window.fisher, damping=1e-2).dense()
    window.add(torch.cat([rows[:1] * 7, rows[1:]]))
    window.add(rows)
    torch.testing.assert_close(cv.inverse(window.fisher, damping=1e-2).dense(), before, rtol=0, atol=1e-12)


def test_one_gradient_is_sherman_and_morrison():
    g = gradients(1)[0]
    expected = EYE / 0.1 - torch.outer(g, g) / 0.01 / (1 + g @ g / 0.1)
    torch.testing.assert_close(cv.inverse(filled(g[None], 1).fisher, damping=0.1).dense(), expected)


def test_the_inverse_of_the_inverse_is_the_matrix():
    F = filled(gradients()).fisher
    back = cv.inverse(cv.inverse(F, damping=0.1))
    torch.testing.assert_close(back.dense(), F.dense() + 0.1 * EYE, rtol=0, atol=1e-8)
    torch.testing.assert_close(cv.eigenvalues(F)[-M:], torch.linalg.eigvalsh(F.dense())[-M:])
    root = cv.power(F, 0.5, damping=0.1).dense()
    torch.testing.assert_close(root @ root, F.dense() + 0.1 * EYE)


def test_float32_loses_no_more_than_the_cancellation():
    rows, x = gradients(M, torch.float32), torch.randn(N, generator=torch.Generator().manual_seed(5))
    product = cv.inverse(filled(rows).fisher, damping=1e-3) @ x
    exact = torch.linalg.solve(dense(rows.double(), 1e-3), x.double())
    assert float((product - exact).norm() / exact.norm()) < 1e-5


def test_it_is_a_preconditioner_of_what_it_is_near():
    rows = gradients(200)
    matrix = dense(rows, 0.0)
    b = torch.randn(N, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    A = cv.Dense(matrix, psd=True)
    inverse = cv.inverse(filled(rows, 200).fisher, damping=1e-2)
    found = cv.solve(A, b, damping=1e-2, preconditioner=inverse, rtol=1e-9)
    assert int(found.steps[0]) <= 2


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="The window is empty"):
        assert cv.GradientWindow(3, cv.Space(N)).fisher
    with pytest.raises(ValueError, match="one gradient at least"):
        cv.GradientWindow(0, cv.Space(N))
    window = filled(gradients())
    with pytest.raises(cv.NonFinite, match="not finite"):
        window.add(torch.full((N,), float("inf")))
    assert torch.isfinite(cv.inverse(window.fisher, damping=1.0).dense()).all()
    with pytest.raises(ValueError, match="has an eigenvalue 0"):
        cv.inverse(window.fisher)
    with pytest.raises(TypeError, match="Outer takes rows"):
        cv.Outer(gradients(), tensor(1, 2))
    with pytest.raises(ValueError, match=r"gradients \(40,\) or \(k, 40\)"):
        window.add(torch.ones(7))
