"""Linear systems against dense solves, with residuals that are what they say."""

from __future__ import annotations

import math

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
    torch.testing.assert_close(found.energy, (columns.double() * x.double()).sum(0), rtol=1e-9, atol=1e-12)


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
    with pytest.raises(ValueError, match=r"symmetric and of torch\.float64"):
        cv.solve(A, sides(1), preconditioner=cv.Dense(torch.eye(N)))
    with pytest.raises(cv.NonFinite, match="with the preconditioner"):
        cv.solve(A, sides(1), preconditioner=cv.Diagonal(torch.full((N,), float("nan"), dtype=torch.float64)))
    whole = cv.Dense(rotated(DEFINITE["flat"]), psd=True)
    for method in ("neumann", "newton-schulz"):
        with pytest.raises(ValueError, match=f"{method} takes none"):
            cv.solve(whole, sides(1), method=method, preconditioner=cv.identity(A.domain))
    with pytest.raises(
        ValueError, match=r"newton-schulz takes a matrix that is held whole, not <.*Dense\(A\.dense\(\)\)"
    ):
        cv.solve(A, sides(1), method="newton-schulz")
    for count in (-1, 2.5):
        with pytest.raises(ValueError, match=f"recycle is a number of directions, 0 or more, but got {count}"):
            cv.solve(whole, sides(1), recycle=count)
    with pytest.raises(ValueError, match=r"Only directions of cg with a psd matrix are recycled, but got minres"):
        cv.solve(whole, sides(1), method="minres", recycle=3)
    with pytest.raises(ValueError, match=r"Only directions of cg with a psd matrix are recycled, but got cg"):
        cv.solve(A, sides(1), method="cg", recycle=3)
    for steps in (0, 2.5, None):
        with pytest.raises(ValueError, match=rf"max_steps >= 1, a whole number,.*but got 1e-05, {steps} and 0.0"):
            cv.solve(A, sides(1), max_steps=steps)


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


@METHOD
@pytest.mark.parametrize(
    "size, dtype", [(1e-40, torch.float32), (1e38, torch.float32), (1e-300, torch.float64), (1e300, torch.float64)]
)
def test_right_hand_sides_of_any_size_are_solved(size, dtype, method):
    """Whose squares are beyond what the dtype, or float64, can tell."""
    matrix, b = rotated(DEFINITE["flat"]).to(dtype), sides(2, dtype)
    b = b / b.abs().max()
    expected = cv.solve(free(matrix), b, method=method).x
    found = cv.solve(free(matrix), torch.stack([size * b[:, 0], b[:, 1]], 1), method=method)
    assert found.converged.all() and found.steps.min() > 1
    torch.testing.assert_close(found.x[:, 0] / size, expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.x[:, 1], expected[:, 1])


def test_a_checkpoint_of_another_right_hand_side_is_told_from_one_of_another_matrix(tmp_path):
    matrix, b, run = rotated(DEFINITE["flat"]), sides(2), cv.Run(checkpoint=tmp_path / "c")
    whole = cv.solve(free(matrix), b, run=run)
    assert torch.equal(cv.solve(free(matrix), b, run=run).x, whole.x)
    with pytest.raises(cv.BadFile, match="are with other vectors than asked"):
        cv.solve(free(matrix), b + 1, run=run)
    with pytest.raises(cv.BadFile, match="are not those of <symmetric MatrixFree"):
        cv.solve(free(matrix + EYE), b, run=run)


@METHOD
@pytest.mark.parametrize("after", range(2, 7))
def test_an_interrupt_in_the_preconditioner_leaves_residuals_of_its_solution(method, after):
    matrix, b = rotated(DEFINITE["spiked"]), sides(2)
    near = cv.Diagonal(1 / matrix.diagonal())
    M = cv.MatrixFree(Stopping(after, near.apply), near.domain, psd=True)
    with pytest.raises(cv.Interrupted) as stop:
        cv.solve(free(matrix), b, method=method, preconditioner=M)
    found = stop.value.result
    check(matrix, b, found)
    assert found.steps.tolist() == [after - 1] * 2 and not found.complete


@METHOD
def test_a_preconditioner_that_is_not_positive_definite_stops_only_those_it_fails(method):
    values, b = linspace(1, 3, N), torch.zeros(N, 2, dtype=torch.float64)
    b[: N // 2, 0], b[N // 2 :, 1] = sides(2)[: N // 2].T
    M = cv.Diagonal(torch.where(torch.arange(N) < N // 2, -1.0, 1.0).double())
    with pytest.raises(cv.NotConverged, match=r"1 of 2 .*not positive definite: r . M r is -.*more damping") as caught:
        cv.solve(scaling(values), b, method=method, preconditioner=M, rtol=1e-9)
    found = caught.value.solution
    assert found.converged.tolist() == [False, True]
    torch.testing.assert_close(found.x[:, 1], b[:, 1] / values, rtol=0, atol=1e-8)
    assert (found.x[:, 0] == 0).all() and found.residuals[0] == 1


@METHOD
def test_no_right_hand_sides_have_no_solutions(method):
    found = cv.solve(free(rotated(DEFINITE["flat"])), torch.ones(N, 0, dtype=torch.float64), method=method)
    assert found.x.shape == (N, 0) and found.cost.products == 0
    assert found.summary()["solved"] == "0 of 0 right-hand sides"


# --------------------------------------------------------------------------------------------- Newton-Schulz


@pytest.mark.parametrize("dtype, tightest", [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("name", [*DEFINITE, *INDEFINITE])
def test_newton_schulz_solves_definite_and_indefinite_systems(name, dtype, tightest):
    matrix, b = rotated({**DEFINITE, **INDEFINITE}[name]).to(dtype), sides(3, dtype)
    found = cv.solve(cv.Dense(matrix), b, damping=0.01, method="newton-schulz", rtol=tightest)
    left = b.double() - matrix.double() @ found.x.double() - 0.01 * found.x.double()
    residuals = left.norm(dim=0) / b.double().norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e3 * torch.finfo(dtype).eps)
    assert found.converged.all() and found.x.dtype == dtype
    exact = torch.linalg.solve(matrix.double() + 0.01 * EYE, b.double())
    torch.testing.assert_close(found.x.double(), exact, rtol=0, atol=100 * tightest * float(exact.abs().max()))


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e7])
def test_newton_schulz_takes_twice_the_logarithm_of_the_condition_number(condition):
    values = torch.logspace(0, -torch.tensor(condition).log10(), N, dtype=torch.float64)
    found = cv.solve(cv.Dense(rotated(values)), sides(2), method="newton-schulz", rtol=1e-6)
    steps = int(found.steps.max())
    assert found.converged.all() and 2 * math.log2(condition) < steps < 2 * math.log2(condition) + math.log2(N) + 8
    assert found.cost.products == steps * N + int(found.steps.sum()) + 2 * (1 + steps // 50)  # and looks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_newton_schulz_of_singular_matrices_ends_at_about_the_least_residual(dtype):
    matrix = rotated(torch.cat([linspace(1, 9, 90), torch.zeros(N - 90, dtype=torch.float64)]))
    b, A = sides(2), cv.Dense(matrix.to(dtype))
    with pytest.raises(cv.NotConverged, match=r"as far as .* goes.*b in its range") as caught:
        cv.solve(A, b, method="newton-schulz")
    least = (b - matrix @ torch.linalg.pinv(matrix, rtol=1e-9) @ b).norm(dim=0) / b.norm(dim=0)
    torch.testing.assert_close(caught.value.solution.residuals, least, rtol=2e-2, atol=0)
    inside = cv.solve(A, (matrix @ b).to(dtype), method="newton-schulz")
    torch.testing.assert_close(matrix @ inside.x.double(), matrix @ b, rtol=0, atol=1e-3)
    for steps in (cv.solve(A, b, method="newton-schulz", rtol=0).steps, inside.steps):
        assert steps.max() < 70
    with pytest.raises(cv.NotConverged, match=r"relative residual of 1\.0e\+00"):
        cv.solve(cv.Dense(torch.zeros(N, N, dtype=dtype)), b, method="newton-schulz")


# --------------------------------------------------------------------------------------------- recycling

OUTLIERS = torch.cat([torch.logspace(1, 3, 30, dtype=torch.float64), linspace(0, 1, 370) ** 3])


class Drifting:
    """Psd matrices with 30 outliers, each with eigenvectors a little turned from those of the one before."""

    def __init__(self, turn: float, dtype: torch.dtype = torch.float64) -> None:
        self.turn, self.dtype, self.generator = turn, dtype, torch.Generator().manual_seed(0)
        self.vectors = torch.linalg.qr(self.normal(400, 400)).Q

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def __call__(self, k: int = 1) -> tuple[cv.Dense, torch.Tensor]:
        matrix = (self.vectors * OUTLIERS) @ self.vectors.T
        self.vectors = torch.linalg.qr(self.vectors + self.turn / 20 * self.normal(400, 400)).Q
        return cv.Dense(matrix.to(self.dtype), psd=True), self.normal(400, k).to(self.dtype)


def test_what_is_recycled_is_nystrom_of_the_first_directions():
    A, b = Drifting(0)()
    found = cv.solve(A, b, damping=0.1, recycle=12)
    rows = [b[:, 0]]
    for _ in range(11):
        rows.append(A.matrix @ rows[-1] / rows[-1].norm())
    Q = torch.linalg.qr(torch.stack(rows, 1)).Q  # of conjugate directions it is the Krylov space
    image = A.matrix @ Q
    expected = image @ torch.linalg.solve(Q.T @ image, image.T)
    torch.testing.assert_close(found.recycled.dense(), expected, rtol=0, atol=1e-6 * float(expected.norm()))
    assert (found.recycled.values.diff() <= 0).all() and found.recycled.psd and len(found.recycled.values) == 12
    assert torch.linalg.eigvalsh(A.matrix - found.recycled.dense()).min() > -1e-6
    plain = cv.solve(A, b, damping=0.1)
    assert torch.equal(found.x, plain.x) and found.cost.products == plain.cost.products and plain.recycled is None


@pytest.mark.parametrize("k, directions", [(1, 45), (3, 135)])
@pytest.mark.parametrize("damping", [0.1, 0.01])
def test_a_perturbed_system_takes_a_quarter_of_the_products(damping, k, directions):
    systems, options = Drifting(1e-3), {"damping": damping, "rtol": 1e-8, "max_steps": 2000}
    first = cv.solve(*systems(k), **options, recycle=directions)
    A, b = systems(k)
    plain = cv.solve(A, b, **options)
    helped = cv.solve(A, b, **options, preconditioner=cv.inverse(first.recycled, damping=damping))
    assert 4 * helped.cost.products < plain.cost.products
    torch.testing.assert_close(helped.x, plain.x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype, damping, rtol", [(torch.float64, 0.1, 1e-8), (torch.float32, 1.0, 1e-3)], ids=str)
def test_a_sequence_of_drifting_systems_stays_at_a_quarter(dtype, damping, rtol):
    systems, preconditioner = Drifting(1e-3, dtype), None
    options = {"damping": damping, "rtol": rtol}
    plain = cv.solve(*systems(), **options).cost.products
    products = []
    for _ in range(12):
        found = cv.solve(*systems(), **options, recycle=45, preconditioner=preconditioner)
        assert len(found.recycled.values) <= 45 and found.recycled.psd
        preconditioner = cv.inverse(found.recycled, damping=damping)
        products.append(found.cost.products)
    assert products[0] > 0.9 * plain and max(products[1:]) < plain / 4


@pytest.mark.parametrize("turn", [1e-3, 1e-2])
def test_what_was_known_is_kept_where_new_directions_say_nothing_else(turn):
    systems, options = Drifting(turn), {"damping": 0.1, "rtol": 0, "recycle": 45}
    first = cv.solve(*systems(), **options, max_steps=200).recycled
    A, b = systems()
    M = cv.inverse(first, damping=0.1)
    both = cv.solve(A, b, **options, max_steps=10, preconditioner=M).recycled
    alone = cv.solve(A, b, **options, max_steps=10).recycled
    direction = M @ b  # the first that is multiplied
    truth = A @ direction
    assert (both @ direction - truth).norm() < 0.1 * (first @ direction - truth).norm()
    A, b = systems()
    after_both, after_first, after_alone = (
        int(cv.solve(A, b, damping=0.1, rtol=1e-8, preconditioner=cv.inverse(known, damping=0.1)).steps)
        for known in (both, first, alone)
    )
    assert after_both <= after_first and after_both < after_alone / 2


def test_a_matrix_that_is_zero_or_a_solution_that_is_leaves_nothing_to_recycle():
    A = cv.Dense(torch.zeros(N, N, dtype=torch.float64), psd=True)
    found = cv.solve(A, sides(1), damping=1.0, recycle=5)
    assert len(found.recycled.values) == 0 and torch.equal(found.recycled @ sides(1), 0 * sides(1))
    again = cv.solve(A, sides(1), damping=1.0, recycle=5, preconditioner=cv.inverse(found.recycled, damping=1.0))
    assert again.converged.all() and len(again.recycled.values) == 0
    assert cv.solve(A, 0 * sides(1), damping=1.0, recycle=5).recycled is None


def test_a_solution_with_directions_is_saved_loaded_and_interrupted(tmp_path):
    A, b = Drifting(0)()
    found = cv.solve(A, b, damping=0.1, recycle=20)
    loaded = cv.Solution.load(found.save(tmp_path))
    assert torch.equal(loaded.recycled.dense(), found.recycled.dense()) and str(loaded) == str(found)
    assert found.summary()["recycled"] == "rank 20"
    stopping = cv.MatrixFree(Stopping(5, A.apply), A.domain, psd=True)
    with pytest.raises(cv.Interrupted) as stop:
        cv.solve(stopping, b, damping=0.1, recycle=20)
    assert len(stop.value.result.recycled.values) == 5


def test_a_matrix_that_only_says_it_is_psd_keeps_its_solution():
    A = free(rotated(INDEFINITE["a few negative"]))
    A.psd = True
    found = cv.solve(A, sides(2), damping=3.0, recycle=60, rtol=1e-8)
    assert found.converged.all() and found.recycled.psd
