"""Linear systems against dense solves, with residuals that are what they say."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, scaling, tensor
from objectives import zoo

import curvature as cv

N = 120
EYE = torch.eye(N, dtype=torch.float64)
DEFINITE = {
    "flat": linspace(1, 3, N),
    "spiked": torch.cat([tensor(1000, 300, 100), linspace(0.5, 2, N - 3)]),
    "power law": 1 / torch.arange(1, N + 1, dtype=torch.float64),
    "repeated": tensor(1, 2, 5, 7).repeat(N // 4),
}
INDEFINITE = {
    "two sides": torch.cat([linspace(-3, -0.5, N // 3), linspace(0.4, 8, N - N // 3)]),
    "symmetric": torch.cat([linspace(-3, -1, N // 2), linspace(1, 3, N // 2)]),
    "a few negative": torch.cat([tensor(-2, -1), linspace(0.2, 9, N - 2)]),
}
METHOD = pytest.mark.parametrize("method", ["cg", "minres"])


def sides(k: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(N, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def check(
    matrix: torch.Tensor, b: torch.Tensor, found: cv.Solution, damping: float = 0.0, rounding: float = 1e-13
) -> None:
    """Residuals are those of x, and x solves what is said to be solved."""
    columns, x = (t.unsqueeze(1) if t.ndim == 1 else t for t in (b, found.x))
    left = columns - matrix @ x - damping * x
    residuals = left.norm(dim=0) / columns.norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals.cpu().double(), rtol=1e-4, atol=rounding)
    assert found.x.shape == b.shape and found.x.dtype == matrix.dtype


@METHOD
@pytest.mark.parametrize("k", [None, 1, 5])
@pytest.mark.parametrize("name", DEFINITE)
def test_definite_systems_are_solved(name, k, method):
    matrix = rotated(DEFINITE[name])
    b = sides(1)[:, 0] if k is None else sides(k)
    found = cv.solve(free(matrix), b, damping=0.1, method=method, rtol=1e-11)
    check(matrix, b, found, 0.1)
    assert found.converged.all() and found.complete
    exact = torch.linalg.solve(matrix + 0.1 * EYE, b)
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-9 * float(exact.abs().max()))


@pytest.mark.parametrize("name", INDEFINITE)
def test_indefinite_systems_are_solved_by_minres(name):
    matrix, b = rotated(INDEFINITE[name]), sides(3)
    found = cv.solve(free(matrix), b, rtol=1e-11)
    assert found.origin.options["method"] == "minres"
    check(matrix, b, found)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-9)


@METHOD
def test_an_ill_conditioned_system_with_its_preconditioner(method):
    values = 10 ** linspace(-8, 0, N)
    matrix, b = rotated(values), sides(2)
    near = rotated(1 / (values * linspace(0.5, 2, N) + 1e-8))
    found = cv.solve(free(matrix), b, damping=1e-8, method=method, preconditioner=cv.Dense(near, psd=True), rtol=1e-8)
    check(matrix, b, found, 1e-8, rounding=1e-9)
    assert found.converged.all() and int(found.steps.max()) < 40


@METHOD
def test_a_singular_matrix_with_damping(method):
    values = torch.cat([linspace(1, 9, 20), torch.zeros(N - 20, dtype=torch.float64)])
    matrix, b = rotated(values), sides(2)
    found = cv.solve(free(matrix), b, damping=1e-3, method=method, rtol=1e-9)
    check(matrix, b, found, 1e-3)
    assert found.converged.all() and int(found.steps.max()) < 40


def test_an_inconsistent_system_ends_at_the_least_residual():
    matrix, b = rotated(torch.cat([linspace(1, 9, 20), torch.zeros(N - 20, dtype=torch.float64)])), sides(2)
    with pytest.raises(cv.NotConverged, match=r"as far as torch.float64 goes.*b in its range") as caught:
        cv.solve(free(matrix), b)
    least = (b - matrix @ torch.linalg.pinv(matrix) @ b).norm(dim=0) / b.norm(dim=0)
    torch.testing.assert_close(caught.value.solution.residuals, least, rtol=1e-3, atol=0)


def test_conjugate_gradients_say_that_a_matrix_is_singular():
    matrix, b = rotated(torch.cat([linspace(1, 9, 20), torch.zeros(N - 20, dtype=torch.float64)])), sides(2)
    with pytest.raises(cv.NotConverged, match="came to a direction of curvature"):
        cv.solve(free(matrix), b, method="cg")
    inside = cv.solve(free(matrix), matrix @ b, method="cg", rtol=1e-9)
    check(matrix, matrix @ b, inside)


def test_as_many_steps_as_there_are_eigenvalues():
    matrix, b = rotated(DEFINITE["repeated"]), sides(3)
    A = free(matrix)
    A.psd = True
    found = cv.solve(A, b, rtol=1e-10)
    assert found.origin.options["method"] == "cg"
    assert found.steps.tolist() == [4, 4, 4]
    assert found.cost.products == 3 * 4 + 3  # and the residuals, recomputed


def test_what_is_solved_is_multiplied_no_more():
    values = linspace(1, 100, N)
    easy, hard = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    easy[3] = 1
    found = cv.solve(scaling(values), torch.stack([easy, hard, 0 * hard], 1), method="cg", rtol=1e-9)
    assert found.steps[0] == 1 and found.steps[2] == 0 and found.steps[1] > 20
    assert found.cost.products == int(found.steps.sum()) + int(found.steps[1]) // 50 + 2
    assert found.converged.all() and (found.x[:, 2] == 0).all()


def test_negative_curvature_is_met_and_said():
    matrix, b = rotated(INDEFINITE["a few negative"]), sides(2)
    with pytest.raises(cv.NotConverged, match=r"came to a direction of curvature -.*minres") as caught:
        cv.solve(free(matrix), b, method="cg")
    found = caught.value.solution
    check(matrix, b, found)
    assert (found.curvature < 0).all() and (found.curvature >= -2 - 1e-9).all() and not found.converged.any()
    assert "negative curvature" in str(found)


def test_truncated_conjugate_gradients_are_best_in_their_krylov_space():
    matrix, b = rotated(DEFINITE["power law"]), sides(1)[:, 0]
    found = cv.solve(free(matrix), b, damping=0.01, method="cg", rtol=0, max_steps=6)
    assert not found.converged.any() and found.steps.tolist() == [6]
    damped, rows = matrix + 0.01 * EYE, [b]
    for _ in range(5):
        rows.append(damped @ rows[-1] / rows[-1].norm())
    Q = torch.linalg.qr(torch.stack(rows, 1)).Q
    best = Q @ torch.linalg.solve(Q.T @ damped @ Q, Q.T @ b)
    torch.testing.assert_close(found.x, best, rtol=1e-7, atol=1e-9)


def test_truncated_minimal_residuals_are_least_in_their_krylov_space():
    matrix, b = rotated(INDEFINITE["two sides"]), sides(1)[:, 0]
    found = cv.solve(free(matrix), b, rtol=0, max_steps=7)
    rows = [b]
    for _ in range(6):
        rows.append(matrix @ rows[-1] / rows[-1].norm())
    Q = torch.linalg.qr(torch.stack(rows, 1)).Q
    best = Q @ torch.linalg.lstsq(matrix @ Q, b.unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(found.x, best, rtol=1e-7, atol=1e-9)


def test_the_neumann_series_is_the_filter_it_is():
    values, b = linspace(0.1, 4, N), sides(2)
    A = scaling(values)
    found = cv.solve(A, b, method="neumann", rtol=0, max_steps=30)
    ratio = found.x / b  # (1 - (1 - step * value)^30) / value
    step = float((1 - (1 - ratio[0, 0] * values[0]) ** (1 / 30)) / values[0])
    assert 0.2 < step <= 1 / 4  # one over the largest eigenvalue, or a little less
    torch.testing.assert_close(ratio, ((1 - (1 - step * values) ** 30) / values).unsqueeze(1).expand(-1, 2))
    long = cv.solve(A, b, method="neumann", rtol=1e-8, max_steps=2000)
    torch.testing.assert_close(long.x, b / values.unsqueeze(1), rtol=0, atol=1e-5)


def test_a_diverging_series_is_stopped():
    with pytest.raises(cv.NotConverged, match=r"diverged.*negative eigenvalues"):
        cv.solve(free(rotated(INDEFINITE["two sides"])), sides(2), method="neumann")


@METHOD
def test_float32_says_how_far_it_came(method):
    matrix, b = rotated(10 ** linspace(-5, 0, N)).float(), sides(2, torch.float32)
    with pytest.raises(cv.NotConverged) as caught:
        cv.solve(free(matrix), b, method=method, rtol=1e-9, max_steps=2000)
    found = caught.value.solution
    double = cv.solve(free(matrix), b, method=method, damping=1e-2, rtol=1e-4)
    assert double.converged.all()
    left = b.double() - matrix.double() @ found.x.double()
    torch.testing.assert_close(left.norm(dim=0) / b.double().norm(dim=0), found.residuals, rtol=0.5, atol=1e-6)


@METHOD
def test_an_interrupt_returns_the_solution_so_far(method):
    matrix = rotated(DEFINITE["power law"])
    A = free(matrix)
    A.function = Stopping(5, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.solve(A, sides(2), method=method)
    found = stop.value.result
    assert not found.complete and not found.converged.any() and found.x.any()


@METHOD
def test_systems_of_one_call_do_not_know_of_each_other(method):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([linspace(1e8, 2e8, N // 2), linspace(1, 2, N // 2)]).float()
    b = torch.zeros(N, 2)
    b[: N // 2, 0], b[N // 2 :, 1] = torch.randn(2, N // 2, generator=generator)
    both = cv.solve(cv.Diagonal(values), b, method=method, rtol=1e-4)
    alone = cv.solve(cv.Diagonal(values), b[:, 1], method=method, rtol=1e-4)
    assert both.converged.all() and both.steps[1] == alone.steps[0]
    torch.testing.assert_close(both.x[:, 1], alone.x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_right_hand_side_in_the_kernel_takes_no_other_with_it(dtype):
    b = torch.zeros(5, 2, dtype=dtype)
    b[1:, 0], b[0, 1] = 1, 1
    with pytest.raises(cv.NotConverged) as caught:
        cv.solve(cv.Dense(torch.diag(torch.arange(0.0, 5)).to(dtype)), b)
    found = caught.value.solution
    assert found.converged.tolist() == [True, False]
    torch.testing.assert_close(found.x[1:, 0], 1 / torch.arange(1.0, 5).to(dtype), rtol=1e-4, atol=0)
    assert torch.equal(found.x[:, 1], torch.zeros(5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_minimal_residuals_are_never_longer_than_the_right_hand_side(dtype):
    """Of singular matrices, whose Lanczos process goes on with rounding once the least residual is reached."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(200):
        n = int(torch.randint(4, 40, (1,), generator=generator))
        Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        values = torch.randn(n, generator=generator, dtype=torch.float64)
        values[: n // 4] = 0
        matrix, b = ((Q * values) @ Q.T).to(dtype), torch.randn(n, 3, generator=generator).to(dtype)
        try:
            found = cv.solve(cv.Dense((matrix + matrix.T) / 2), b, method="minres", rtol=1e-4)
        except cv.NotConverged as error:
            found = error.solution
        assert found.residuals.max() < 1.001


def test_a_right_hand_side_that_requires_grad_is_a_number():
    x = cv.solve(cv.Diagonal(tensor(2, 3)), torch.ones(2, dtype=torch.float64, requires_grad=True)).x
    torch.testing.assert_close(x, 1 / tensor(2, 3))


def test_bad_input_is_refused():
    A = free(rotated(DEFINITE["flat"]))
    with pytest.raises(ValueError, match=r"b is one right-hand side \(120,\)"):
        cv.solve(A, torch.ones(7))
    with pytest.raises(cv.NonFinite, match="right-hand side"):
        cv.solve(A, torch.full((N,), float("nan")))
    with pytest.raises(ValueError, match="symmetric matrices"):
        cv.solve(cv.Dense(torch.randn(N, N)), torch.ones(N))
    with pytest.raises(ValueError, match="method is 'auto', 'cg'"):
        cv.solve(A, torch.ones(N), method="lu")
    with pytest.raises(ValueError, match=r"not positive definite: r . M r"):
        cv.solve(A, sides(1), preconditioner=-1.0 * cv.identity(A.domain))
    with pytest.raises(ValueError, match=r"symmetric and of torch\.float64"):
        cv.solve(A, sides(1), preconditioner=cv.Dense(torch.eye(N)))
    with pytest.raises(cv.NonFinite, match="with the preconditioner"):
        cv.solve(A, sides(1), preconditioner=cv.Diagonal(torch.full((N,), float("nan"), dtype=torch.float64)))
    with pytest.raises(ValueError, match="neumann takes none"):
        cv.solve(A, sides(1), method="neumann", preconditioner=cv.identity(A.domain))
    with pytest.raises(ValueError, match="max_steps >= 1"):
        cv.solve(A, sides(1), max_steps=0)


@pytest.mark.parametrize("case", zoo()[:4], ids=str)
def test_damped_gauss_newton_directions_of_networks(case):
    objective = case.objective()
    G, gradient = cv.ggn(objective), objective.gradient()
    plain = cv.solve(G, gradient, damping=1e-2, rtol=1e-10, max_steps=2000)
    helped = cv.solve(
        G, gradient, damping=1e-2, rtol=1e-10, preconditioner=cv.inverse(cv.kfac(objective), damping=1e-2)
    )
    exact = torch.linalg.solve(G.dense() + 1e-2 * torch.eye(len(gradient)).double(), gradient)
    for found in (plain, helped):
        torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-8 * float(exact.abs().max()))


def test_a_preconditioner_of_another_metric_does_not_stop_minimal_residuals():
    matrix, b = rotated(INDEFINITE["two sides"]), sides(3)
    near = cv.Dense(rotated(1 / linspace(0.1, 10, N)), psd=True)
    found = cv.solve(free(matrix), b, method="minres", preconditioner=near, rtol=1e-8)
    check(matrix, b, found)
    assert found.converged.all()
