"""EFCP: windows of sparse and low-rank rows against dense ones, and what error feedback is for."""

from __future__ import annotations

import math

import pytest
import torch

import curvature as cv
from curvature.linalg.compressed import FactoredRows, JoinedRows, SparseRows
from curvature.linalg.rows import DenseRows

SHAPES = [torch.Size(shape) for shape in [(6, 5), (7,), (4, 3, 2), (), (2, 2)]]
N, M = sum(map(math.prod, SHAPES)), 9
SPACE = cv.Space(N, torch.float64)


def gradients(count: int = M, *, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def windows(space: cv.Space = SPACE) -> dict[str, cv.SparseWindow | cv.LowRankWindow]:
    return {
        "sparse": cv.SparseWindow(M, space, share=0.2),
        "low rank": cv.LowRankWindow(M, space, shapes=SHAPES, rank=2),
    }


def some_rows() -> dict[str, tuple[cv.LinearOperator, torch.Tensor]]:
    """Rows of each kind, and the same dense."""
    generator = torch.Generator().manual_seed(1)
    values, P = torch.randn(4, 3, generator=generator), torch.randn(4, 2, 3, generator=generator)
    Q, plain = torch.randn(4, 2, 4, generator=generator), torch.randn(4, 5, generator=generator)
    values, P, Q, plain = (t.double() for t in (values, P, Q, plain))
    indices = torch.tensor([[0, 1, 2], [1, 4, 6], [0, 3, 6], [4, 5, 6]], dtype=torch.int32)
    sparse = torch.zeros(4, 7, dtype=torch.float64).scatter(1, indices.long(), values)
    products = torch.einsum("mro,mri->moi", P, Q).flatten(1)
    factored, joined = FactoredRows(P, Q), [DenseRows(plain), FactoredRows(P, Q)]
    return {
        "sparse": (SparseRows(indices, values, cv.Space(7, torch.float64)), sparse),
        "factored": (factored, products),
        "joined": (JoinedRows(joined, cv.Space(17, torch.float64)), torch.cat([plain, products], dim=1)),
    }


@pytest.mark.parametrize("kind", ["sparse", "factored", "joined"])
def test_rows_multiply_combine_and_show_columns_as_dense_ones(kind):
    rows, dense = some_rows()[kind]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, dense.shape[1], generator=generator, dtype=torch.float64)
    c = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(rows.apply(x), x @ dense.T)
    torch.testing.assert_close(rows.combine(c), c @ dense)
    torch.testing.assert_close(rows.adjoint().apply(c), c @ dense)
    torch.testing.assert_close(rows.columns(slice(2, 6)), dense[:, 2:6])
    places = torch.tensor([6, 0, 0, 3])
    torch.testing.assert_close(rows.columns(places), dense[:, places])


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
@pytest.mark.parametrize("count", [3, 2 * M + 4])
def test_fisher_is_the_mean_over_the_vectors_that_are_kept(kind, count):
    window = windows()[kind]
    kept = torch.cat([window.add(g[None]) for g in gradients(count)])[-M:]
    F = kept.T @ kept / len(kept)
    torch.testing.assert_close(window.fisher.dense(), F)
    inverse, exact = cv.inverse(window.fisher, damping=1e-2), torch.linalg.inv(F + 1e-2 * torch.eye(N).double())
    torch.testing.assert_close(inverse.dense(), exact, rtol=0, atol=1e-10 * float(exact.abs().max()))
    torch.testing.assert_close(cv.diagonal(inverse).value, exact.diagonal())
    i, j = torch.arange(N), torch.arange(N).flip(0)
    torch.testing.assert_close(inverse.entries(i, j), exact[i, j], rtol=1e-9, atol=1e-9)
    assert float(cv.trace(inverse)) == pytest.approx(float(exact.trace()), rel=1e-10)
    expected = float(torch.linalg.slogdet(exact).logabsdet)
    assert float(cv.logdet(window.fisher, damping=1e-2)) == pytest.approx(-expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
def test_nothing_is_lost_what_is_not_kept_is_in_the_error(kind):
    window, rows = windows()[kind], gradients(4 * M)
    kept = window.add(rows)
    torch.testing.assert_close(kept.sum(0) + window.error, rows.sum(0), rtol=1e-13, atol=1e-12)
    assert float(window.error.norm()) > 0


def test_sparse_rows_and_error_are_the_gradients_without_rounding():
    window = cv.SparseWindow(M, cv.Space(N), share=0.1)
    rows = torch.randint(-9, 10, (50, N), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(window.add(rows).sum(0) + window.error, rows.sum(0))


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
def test_one_after_another_is_all_at_once(kind):
    single, block, rows = windows()[kind], windows()[kind], gradients(2 * M + 3)
    kept = torch.stack([single.add(g) for g in rows])
    assert torch.equal(block.add(rows), kept)
    torch.testing.assert_close(single.fisher.dense(), block.fisher.dense(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_a_window_that_keeps_all_is_a_gradient_window(dtype, tolerance):
    space, rows, x = cv.Space(N, dtype), gradients(2 * M, dtype=dtype), gradients(1, seed=8, dtype=dtype)[0]
    dense = cv.GradientWindow(M, space)
    dense.add(rows)
    expected = cv.inverse(dense.fisher, damping=1e-2) @ x
    for window in (cv.SparseWindow(M, space, share=1.0), cv.LowRankWindow(M, space, shapes=SHAPES, rank=3)):
        assert torch.equal(window.add(rows), rows)
        assert not window.error.any()
        found = cv.inverse(window.fisher, damping=1e-2) @ x
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def test_the_largest_entries_are_kept_and_of_equal_ones_the_first():
    window = cv.SparseWindow(2, cv.Space(6), share=0.5)
    assert window.add(torch.tensor([1.0, -2.0, 1.0, 1.0, -1.0, 0.5])).tolist() == [1.0, -2.0, 1.0, 0.0, 0.0, 0.0]
    assert window.add(torch.tensor([0.0, 0.0, 0.0, 0.5, 0.0, 0.0])).tolist() == [0.0, 0.0, 0.0, 1.5, -1.0, 0.5]
    assert window.add(torch.zeros(6)).tolist() == [0.0] * 6


def test_matrices_of_the_rank_are_kept_whole_after_one_step_of_the_power_iteration():
    space, generator = cv.Space(20 * 30, torch.float64), torch.Generator().manual_seed(5)
    window = cv.LowRankWindow(4, space, shapes=[torch.Size([20, 5, 6])], rank=3)
    for _ in range(3):
        left, right = (torch.randn(3, size, generator=generator, dtype=torch.float64) for size in (20, 30))
        matrix = left.T @ right
        torch.testing.assert_close(window.add(matrix.flatten()), matrix.flatten())


def test_the_power_iteration_goes_on_from_row_to_row():
    space, generator = cv.Space(20 * 30, torch.float64), torch.Generator().manual_seed(5)
    U, _, V = torch.linalg.svd(torch.randn(20, 30, generator=generator, dtype=torch.float64), full_matrices=False)
    matrix = (U * 0.8 ** torch.arange(20)) @ V
    window = cv.LowRankWindow(4, space, shapes=[torch.Size([20, 30])], rank=2)
    misses = []
    for _ in range(15):
        window.error.zero_()  # so that the same matrix is met again
        misses.append(float((window.add(matrix.flatten()) - matrix.flatten()).norm()))
    best = float((0.8 ** torch.arange(2, 20)).norm())
    assert misses[-1] == pytest.approx(best, rel=1e-3)
    assert misses[0] > 1.05 * best


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
def test_zero_gradients_are_harmless(kind):
    window = windows()[kind]
    assert not window.add(torch.zeros(M, N)).any()
    rows = gradients(3 * M)
    torch.testing.assert_close(window.add(rows).sum(0) + window.error, rows.sum(0), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
def test_gradients_in_bfloat16_are_kept_and_fed_back_in_float32(kind):
    window, rows = windows(cv.Space(N, torch.bfloat16))[kind], gradients(M, dtype=torch.bfloat16)
    assert window.add(rows).dtype == torch.bfloat16 and window.error.dtype == torch.float32
    dense = window.rows.columns(slice(0, N))
    torch.testing.assert_close(dense.sum(0) + window.error, rows.double().sum(0), rtol=1e-5, atol=1e-5)
    x = gradients(1, seed=8, dtype=torch.bfloat16)[0]
    exact = torch.linalg.solve(dense.T @ dense / M + torch.eye(N), x.double())
    assert float(((cv.inverse(window.fisher, damping=1.0) @ x).double() - exact).norm() / exact.norm()) < 3e-2


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
def test_what_is_not_finite_is_refused_and_changes_nothing(kind):
    window = windows()[kind]
    window.add(gradients(4))
    before, seen = {name: tensor.clone() for name, tensor in window.state.items()}, window.seen
    bad = gradients(3)
    bad[1, 2] = float("nan")
    with pytest.raises(cv.NonFinite, match="not finite"):
        window.add(bad)
    assert window.seen == seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in window.state.items())


@pytest.mark.parametrize("kind", ["sparse", "low rank"])
def test_the_state_goes_on_in_another_window(kind):
    window, other, rows = windows()[kind], windows()[kind], gradients(3 * M)
    window.add(rows[: M + 2])
    for name, tensor in window.state.items():
        other.state[name].copy_(tensor)
    other.seen = window.seen
    assert torch.equal(window.add(rows[M + 2 :]), other.add(rows[M + 2 :]))
    assert torch.equal(window.fisher.dense(), other.fisher.dense())


def test_memory_is_what_is_said():
    m, n = 64, 100 * 100 + 24
    space = cv.Space(n)
    gram = 8 * m * m
    assert cv.SparseWindow(m, space, share=0.01).bytes == m * math.ceil(0.01 * n) * 8 + 4 * n + gram
    factored = cv.LowRankWindow(m, space, shapes=[torch.Size([100, 100]), torch.Size([24])], rank=4)
    assert factored.bytes == 4 * (m * (4 * 200 + 24) + n + 2 * 4 * 100) + gram  # and the last Q and the first
    assert cv.GradientWindow(m, space).bytes == 4 * m * n + gram


def test_bad_arguments_are_refused():
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"at most 1, but got {share}"):
            cv.SparseWindow(3, SPACE, share=share)
    with pytest.raises(ValueError, match="The rank is 1 at least, but got 0"):
        cv.LowRankWindow(3, SPACE, shapes=SHAPES, rank=0)
    with pytest.raises(ValueError, match=r"have 30 entries together, but the vectors have 66.*in order"):
        cv.LowRankWindow(3, SPACE, shapes=SHAPES[:1])
    with pytest.raises(ValueError, match="The window is empty"):
        assert cv.SparseWindow(3, SPACE).fisher
    with pytest.raises(ValueError, match=r"gradients \(66,\) or \(k, 66\)"):
        cv.SparseWindow(3, SPACE).add(torch.ones(5))


class WithoutFeedback(cv.SparseWindow):
    """Forgets what it does not keep."""

    def add(self, gradients):
        self.error.zero_()
        return super().add(gradients)


def trained(window: cv.GradientWindow | cv.SparseWindow, rate: float, steps: int = 250) -> float:
    """The loss of ill-conditioned logistic regression after M-FAC steps with a window."""
    generator = torch.Generator().manual_seed(0)
    n = window.space.size
    X = torch.randn(600, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    truth = torch.randn(n, generator=generator, dtype=torch.float64) * torch.logspace(0, 1.5, n, dtype=torch.float64)
    y = (torch.rand(600, generator=generator, dtype=torch.float64) < torch.sigmoid(X @ truth)).double()
    theta = torch.zeros(n, dtype=torch.float64)
    for step in range(steps):
        batch = torch.randint(0, 600, (64,), generator=generator)
        gradient = X[batch].T @ (torch.sigmoid(X[batch] @ theta) - y[batch]) / 64
        kept = window.add(gradient)
        theta -= rate * (1 - step / steps) * (cv.inverse(window.fisher, damping=1e-4) @ kept)
    return float((torch.nn.functional.softplus(X @ theta) - y * (X @ theta)).mean())


def test_error_feedback_makes_a_tenth_of_the_entries_nearly_as_good_as_all():
    space, rates = cv.Space(60, torch.float64), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    makers = {
        "dense": lambda: cv.GradientWindow(48, space),
        "fed back": lambda: cv.SparseWindow(48, space, share=0.1),
        "forgotten": lambda: WithoutFeedback(48, space, share=0.1),
    }
    loss = {name: min(trained(make(), rate) for rate in rates) for name, make in makers.items()}
    gained = {name: math.log(2) - value for name, value in loss.items()}
    assert gained["fed back"] > 0.8 * gained["dense"]
    assert gained["forgotten"] < 0.8 * gained["fed back"]


@pytest.mark.parametrize("first", ["zeros", "another subspace"])
def test_a_power_iteration_that_lost_its_subspace_finds_one_again(first):
    """Of a zero gradient, or one without anything in common with the next, nothing is left to start from."""
    window = cv.LowRankWindow(6, cv.Space(400, torch.float64), shapes=[torch.Size([20, 20])], rank=2)
    rows = torch.zeros(20, 20, dtype=torch.float64)
    if first != "zeros":
        rows[0, 0] = 1.0
    window.add(rows.flatten())
    gradient = torch.zeros(20, 20, dtype=torch.float64)
    gradient[5:, 10:] = 1.0
    kept = [float(window.add(gradient.flatten()).norm()) for _ in range(4)]
    assert kept[-1] > 0.9 * float(gradient.norm()) and float(window.error.norm()) < 2 * float(gradient.norm())


def test_nothing_times_nothing():
    for window in (
        cv.SparseWindow(3, cv.Space(50)),
        cv.LowRankWindow(3, cv.Space(50), shapes=[torch.Size([5, 10])], rank=1),
    ):
        window.add(torch.ones(50))
        assert (cv.inverse(window.fisher, damping=1.0) @ torch.ones(50, 0)).shape == (50, 0)
        with pytest.raises(IndexError, match="50 rows"):
            window.fisher.entries(torch.tensor([50]), torch.tensor([0]))
        dense = window.fisher.dense()
        assert float(window.fisher.entries(torch.tensor([-1]), torch.tensor([-1]))) == pytest.approx(
            float(dense[-1, -1])
        )
