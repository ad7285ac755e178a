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


class Dynamic:
    """The algorithm of a ring of gradients: D_ij = g_i . F_(i-1)^-1 g_j for j >= i, and v_i = sum_j B_ij g_j, of which
    row i depends on the first i gradients of the ring alone."""

    def __init__(self, rows: torch.Tensor, damping: float):
        self.rows, self.damping = rows.clone(), damping
        self.refactor()

    def replace(self, slot: int, gradient: torch.Tensor) -> None:
        self.rows[slot] = gradient
        before = self.B
        self.refactor()
        torch.testing.assert_close(self.B[:slot], before[:slot], rtol=1e-12, atol=0)

    def refactor(self) -> None:
        m, S = len(self.rows), self.rows @ self.rows.T / self.damping
        self.D, self.B = D, B = torch.zeros(2, m, m, dtype=torch.float64)
        for i in range(m):
            for j in range(i, m):
                D[i, j] = S[i, j] - sum(D[k, i] * D[k, j] / (m + D[k, k]) for k in range(i))
        for i in range(m):
            B[i] = -sum((D[k, i] / (m + D[k, k]) * B[k] for k in range(i)), torch.zeros(m, dtype=torch.float64))
            B[i, i] += 1 / self.damping

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        m, D, c = len(self.rows), self.D, self.rows @ x / self.damping
        for i in range(m):
            c[i] -= sum(D[k, i] * c[k] / (m + D[k, k]) for k in range(i))
        return x / self.damping - self.rows.T @ (self.B.T @ (c / (m + D.diagonal())))


@pytest.mark.parametrize("damping", [1e-1, 1e-2])
def test_a_slot_that_is_replaced_is_what_the_dynamic_recurrences_replace(damping):
    rows, others = gradients(), gradients(2 * M)[M:]
    window, ring = filled(rows), Dynamic(rows, damping)
    x = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for slot, g in enumerate(others[:5]):
        window.add(g)
        ring.replace(slot, g)
        exact = torch.linalg.solve(dense(window.gradients, damping), x)
        tolerance = 1e-10 * float(exact.norm())
        torch.testing.assert_close(ring.solve(x), exact, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            cv.inverse(window.fisher, damping=damping) @ x, ring.solve(x), rtol=0, atol=tolerance
        )
        factor = torch.linalg.cholesky(M * torch.eye(M) + window.gradients @ window.gradients.T / damping)
        upper = (factor.diagonal() * factor).T  # U of the unpivoted LU, which is D with m added to its diagonal
        torch.testing.assert_close(ring.D + M * torch.eye(M), upper, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("n", [2_000, 70_001])
def test_float32_products_are_as_exact_as_the_float64_sums_they_replace(n, near):
    generator = torch.Generator().manual_seed(7)
    rows = (torch.randn(M, n, generator=generator) + 3 * torch.randn(1, n, generator=generator)) / n**0.5
    window = cv.GradientWindow(M, cv.Space(n))
    for row in rows:
        window.add(row)
    x, exact = rows[3] if near else torch.randn(n, generator=generator), rows.double()
    inside = torch.linalg.solve(M * 1e-3 * torch.eye(M).double() + exact @ exact.T, exact @ x.double())
    expected = (x.double() - inside @ exact) / 1e-3
    error = cv.inverse(window.fisher, damping=1e-3) @ x - expected
    once = (x - inside.float() @ rows) / 1e-3 - expected  # rounded only where the result is put together
    assert float(error.norm()) < 3 * float(once.norm()) + 2e-7 * float(expected.norm())


@pytest.mark.parametrize(
    "space, dtype, tolerance",
    [
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.float64, torch.float32, 1e-9),
        (torch.float64, torch.bfloat16, 1e-9),
        (torch.bfloat16, None, 3e-2),
    ],
    ids=str,
)
def test_rows_of_any_dtype_are_the_fisher_of_the_rounded_gradients(space, dtype, tolerance):
    rows = gradients().to(space)
    window = cv.GradientWindow(M, cv.Space(N, space), dtype=dtype)
    kept = window.add(rows)
    assert kept.dtype == space and window.gradients.dtype == (dtype or space)
    assert torch.equal(kept, window.gradients.to(space))
    x = torch.randn(N, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(space)
    exact = dense(window.gradients.double(), 1.0)
    found = cv.inverse(window.fisher, damping=1.0)
    for columns in (x, x[:, :1]):
        expected = torch.linalg.solve(exact, columns.double())
        assert float(((found @ columns).double() - expected).norm() / expected.norm()) < tolerance
        product = (window.fisher @ columns).double()
        assert float((product - (exact - EYE) @ columns.double()).norm() / product.norm()) < tolerance
    torch.testing.assert_close(cv.diagonal(found).value, torch.linalg.inv(exact).diagonal(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [3, 2 * N])
@pytest.mark.parametrize("size", [1, 7, 8, N])
def test_blocks_are_those_of_the_dense_matrix(size, count):
    window = filled(gradients(count), count)
    block = torch.arange(N) // size
    F = dense(window.gradients, 0.0) * (block.unsqueeze(1) == block)
    exact, A = torch.linalg.inv(F + 1e-2 * EYE), window.blocks(size)
    torch.testing.assert_close(A.dense(), F)
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))
    for inverse in (cv.inverse(A, damping=1e-2), A.inverse(1e-2), cv.power(A, -0.5, damping=1e-2)):
        dense_of = inverse.dense() @ inverse.dense() if inverse.source.get("exponent") == -0.5 else inverse.dense()
        torch.testing.assert_close(dense_of, exact, rtol=0, atol=1e-10 * float(exact.abs().max()))
        torch.testing.assert_close(inverse.entries(i, j).view(N, N), inverse.dense(), rtol=0, atol=1e-9)
        torch.testing.assert_close(cv.diagonal(inverse).value, inverse.dense().diagonal(), rtol=0, atol=1e-9)
        assert float(cv.trace(inverse)) == pytest.approx(float(inverse.dense().trace()), rel=1e-10)
        values = torch.linalg.eigvalsh(inverse.dense())
        torch.testing.assert_close(cv.eigenvalues(inverse), values, rtol=1e-9, atol=0)
        assert inverse.psd
    expected = float(torch.linalg.slogdet(F + 1e-2 * EYE).logabsdet)
    assert float(cv.logdet(A, damping=1e-2)) == pytest.approx(expected, rel=1e-10)
    back = cv.inverse(A.inverse(0.1))
    torch.testing.assert_close(back.dense(), F + 0.1 * EYE, rtol=0, atol=1e-8)


def test_one_block_is_the_whole_and_a_slid_window_has_blocks_of_its_own():
    window = filled(gradients(M + 5))
    torch.testing.assert_close(window.blocks(N).dense(), window.fisher.dense())
    before = window.blocks(9).dense()
    window.add(gradients(1))
    assert not torch.equal(window.blocks(9).dense(), before)


def test_blocks_in_float32_lose_no_more_than_rounding():
    window = filled(gradients(M, torch.float32))
    block = torch.arange(N) // 16
    exact = torch.linalg.inv(dense(window.gradients.double(), 0.0) * (block.unsqueeze(1) == block) + 1e-3 * EYE)
    error = window.blocks(16).inverse(1e-3).dense().double() - exact
    assert float(error.norm() / exact.norm()) < 1e-6


def test_the_state_of_a_window_goes_on_in_another():
    rows = gradients(3 * M)
    window, other = filled(rows[: M + 3]), cv.GradientWindow(M, cv.Space(N, torch.float64))
    for name, kept in window.state.items():
        other.state[name].copy_(kept)
    other.seen = window.seen
    for some in rows[M + 3 :]:
        assert torch.equal(window.add(some), other.add(some))
    assert torch.equal(window.fisher.dense(), other.fisher.dense())
    assert window.bytes == 8 * M * (N + M)


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
    for bad in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(cv.NonFinite, match="not finite"):
            window.add(torch.cat([torch.ones(N - 1), torch.tensor([bad])]))
    assert torch.isfinite(cv.inverse(window.fisher, damping=1.0).dense()).all()
    with pytest.raises(ValueError, match="has an eigenvalue 0"):
        cv.inverse(window.fisher)
    with pytest.raises(TypeError, match="Outer takes rows"):
        cv.Outer(gradients(), tensor(1, 2))
    with pytest.raises(ValueError, match=r"gradients \(40,\) or \(k, 40\)"):
        window.add(torch.ones(7))
    with pytest.raises(ValueError, match=r"but got \(0, 40\)"):
        window.add(torch.ones(0, N))
    with pytest.raises(ValueError, match="between 1 and 40 parameters, but got 41"):
        window.blocks(N + 1)
    with pytest.raises(ValueError, match="The window is empty"):
        cv.GradientWindow(3, cv.Space(N)).blocks(4)
    with pytest.raises(ValueError, match="has an eigenvalue 0"):
        window.blocks(8).inverse(0.0)
    with pytest.raises(TypeError, match="OuterBlocks takes rows"):
        cv.OuterBlocks(torch.ones(2, 3, 4), torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="A space of 4 is not cut into 2 blocks of 4"):
        cv.OuterBlocks(torch.ones(2, 3, 4), torch.ones(2, 3, 3), space=cv.Space(4))


def test_what_the_rows_cannot_hold_is_refused():
    window = cv.GradientWindow(2, cv.Space(3), dtype=torch.float16)
    with pytest.raises(cv.NonFinite, match="float16"):
        window.add(torch.tensor([1e5, 0.0, 0.0]))
    assert len(window) == 0


def test_what_is_returned_is_no_part_of_what_was_given():
    window, gradient = cv.GradientWindow(2, cv.Space(3)), torch.ones(3)
    window.add(gradient).zero_()
    assert gradient.sum() == 3 and window.gradients.sum() == 3
