"""Least squares against pseudo-inverses and SciPy, for matrices of any shape and rank."""

from __future__ import annotations

import pytest
import scipy.sparse.linalg
import torch
from matrices import Stopping, linspace, tensor
from objectives import zoo

import curvature as cv

SHAPES = {"tall": (90, 40, 40), "wide": (40, 90, 40), "square": (60, 60, 60), "rank-deficient": (90, 60, 20)}
EVERY = pytest.mark.parametrize("name", SHAPES)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(m: int, n: int, values: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) with these singular values and random singular vectors."""
    left, right = (torch.linalg.qr(random(size, len(values), seed=seed)).Q for size, seed in ((m, 2), (n, 3)))
    return (left * values) @ right.T


def matrix_of(name: str, smallest: float = 0.1) -> torch.Tensor:
    m, n, rank = SHAPES[name]
    return with_values(m, n, torch.logspace(0, torch.tensor(smallest).log10(), rank, dtype=torch.float64))


def free(matrix: torch.Tensor) -> cv.MatrixFree:
    """A matrix of which only the products and those of the transpose are known."""
    m, n = matrix.shape
    domain, codomain = cv.Space(n, matrix.dtype), cv.Space(m, matrix.dtype)
    return cv.MatrixFree(lambda rows: rows @ matrix.T, domain, codomain, adjoint=lambda rows: rows @ matrix)


def stacked(matrix: torch.Tensor, b: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    n = matrix.shape[1]
    below = torch.cat([matrix, damping**0.5 * torch.eye(n, dtype=matrix.dtype)])
    return below, torch.cat([b, b.new_zeros(n, *b.shape[1:])])


def check(matrix: torch.Tensor, b: torch.Tensor, found: cv.Solution, damping: float = 0.0) -> None:
    """Residuals are those of x."""
    columns, x = (t.unsqueeze(1) if t.ndim == 1 else t for t in (b, found.x))
    left = matrix.T @ (columns - matrix @ x) - damping * x
    residuals = left.norm(dim=0) / (matrix.T @ columns).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals.double(), rtol=1e-3, atol=100 * torch.finfo(b.dtype).eps)
    assert found.x.shape == (matrix.shape[1], *b.shape[1:]) and found.x.dtype == matrix.dtype


@EVERY
@pytest.mark.parametrize("k", [None, 1, 5])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_it_is_the_shortest_minimiser(name, k, damping):
    matrix = matrix_of(name)
    b = random(len(matrix)) if k is None else random(len(matrix), k)
    found = cv.lstsq(free(matrix), b, damping=damping, rtol=1e-12)
    check(matrix, b, found, damping)
    assert found.converged.all() and found.complete
    tall, wide = stacked(matrix, b, damping)
    torch.testing.assert_close(found.x, torch.linalg.pinv(tall, rtol=1e-10) @ wide, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["tall", "square"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_it_is_what_torch_and_scipy_find(name, damping):
    matrix = matrix_of(name)
    b = random(len(matrix))
    found = cv.lstsq(free(matrix), b, damping=damping, rtol=1e-12).x
    tall, wide = stacked(matrix, b, damping)
    torch.testing.assert_close(found, torch.linalg.lstsq(tall, wide.unsqueeze(1)).solution[:, 0], rtol=0, atol=1e-8)
    options = {"damp": damping**0.5, "atol": 1e-13, "btol": 1e-13, "maxiter": 500}
    theirs = scipy.sparse.linalg.lsmr(free(matrix).to_scipy(), b.numpy(), **options)[0]
    torch.testing.assert_close(found, torch.from_numpy(theirs), rtol=0, atol=1e-8)


@EVERY
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_every_step_is_that_of_scipy(name, damping):
    matrix = matrix_of(name)
    b = random(len(matrix))
    for steps in (1, 2, 5, 11):
        found = cv.lstsq(free(matrix), b, damping=damping, rtol=0, max_steps=steps)
        options = {"damp": damping**0.5, "atol": 0, "btol": 0, "conlim": 0, "maxiter": steps}
        theirs = torch.from_numpy(scipy.sparse.linalg.lsmr(matrix.numpy(), b.numpy(), **options)[0])
        torch.testing.assert_close(found.x, theirs, rtol=0, atol=1e-11)
        assert found.steps.tolist() == [steps] and not found.converged.any()
        assert found.cost.products == 2 * steps + 3  # A^T b, and the residuals, recomputed


def test_truncated_it_has_the_least_residual_of_its_krylov_space():
    matrix = matrix_of("tall")
    b, gram = random(len(matrix)), matrix.T @ matrix
    found = cv.lstsq(free(matrix), b, rtol=0, max_steps=4)
    rows = [matrix.T @ b]
    for _ in range(3):
        rows.append(gram @ rows[-1] / rows[-1].norm())
    Q = torch.linalg.qr(torch.stack(rows, 1)).Q
    best = Q @ torch.linalg.lstsq(gram @ Q, (matrix.T @ b).unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(found.x, best, rtol=1e-8, atol=1e-9)


def test_symmetric_singular_and_indefinite_matrices():
    matrix = with_values(60, 60, tensor(3, 2, 1))
    matrix = matrix - matrix.T @ matrix.new_ones(60, 1) @ matrix.new_ones(1, 60) @ matrix / 60
    matrix, b = matrix + matrix.T, random(60, 2)
    found = cv.lstsq(cv.Dense(matrix), b, rtol=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.pinv(matrix, rtol=1e-10) @ b, rtol=0, atol=1e-8)


def test_a_square_matrix_that_is_not_symmetric():
    matrix, b = random(30, 30) + 8 * torch.eye(30, dtype=torch.float64), random(30, 2, seed=5)
    found = cv.lstsq(cv.Dense(matrix), b, rtol=1e-13)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", zoo()[:6], ids=str)
def test_jacobians_of_networks(case):
    J = torch.autograd.functional.jacobian(case.outputs, case.flat).flatten(0, -2)
    b = random(len(J), 2)
    found = cv.lstsq(cv.jacobian(case.objective((3, len(case.inputs) - 3))), b, damping=1e-2, rtol=1e-11)
    exact = torch.linalg.solve(J.T @ J + 1e-2 * torch.eye(J.shape[1]).double(), J.T @ b)
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-8)
    assert found.cost.passes >= 2 * int(found.steps.max()) + 3


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)], ids=str)
def test_an_ill_conditioned_matrix_leaves_open_what_it_must(shape):
    """A residual says of x, along a singular vector of value s, what it is over s^2: with 1e8 that is nothing at all."""
    matrix, b = with_values(*shape, torch.logspace(0, -8, 40, dtype=torch.float64)), random(shape[0])
    found = cv.lstsq(free(matrix), b, rtol=1e-7, max_steps=2000)
    check(matrix, b, found)
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    exact = torch.linalg.pinv(matrix, rtol=1e-12) @ b
    error, length = vectors @ (found.x - exact), float((matrix.T @ b).norm())
    assert (error.abs() * values.square() <= 1.01 * found.residuals[0] * length + 1e-13 * float(exact.norm())).all()
    assert error[values > 1e-2].norm() < 0.01 * (vectors @ exact)[values > 1e-2].norm()
    assert error.norm() > 0.5 * exact.norm()
    with pytest.raises(cv.NotConverged, match=r"relative residual of \d\.\de-0[78]"):
        cv.lstsq(free(matrix), b, rtol=1e-12, max_steps=1000)
    damped = cv.lstsq(free(matrix), b, damping=1e-4, rtol=1e-10, max_steps=2000)
    tall, wide = stacked(matrix, b, 1e-4)
    torch.testing.assert_close(damped.x, torch.linalg.lstsq(tall, wide.unsqueeze(1)).solution[:, 0], rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_float32(name, damping):
    matrix = matrix_of(name).float()
    b = random(len(matrix), 3).float()
    found = cv.lstsq(free(matrix), b, damping=damping, rtol=1e-5)
    check(matrix, b, found, damping)
    tall, wide = stacked(matrix.double(), b.double(), damping)
    expected = torch.linalg.pinv(tall, rtol=1e-5) @ wide
    torch.testing.assert_close(found.x.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rtol", [0.0, 1e-14])
def test_steps_beyond_rounding_lead_nowhere(dtype, rtol):
    """Of matrices of low rank, whose bidiagonalisation goes on with rounding once their range is spent."""
    generator = torch.Generator().manual_seed(7)
    for seed in range(100):
        m, n = (int(size) for size in torch.randint(2, 40, (2,), generator=generator))
        rank = int(torch.randint(1, min(m, n) + 1, (1,), generator=generator))
        left, right = (torch.linalg.qr(random(size, rank, seed=seed + at)).Q for at, size in ((0, m), (500, n)))
        matrix = ((left * linspace(0.1, 1, rank)) @ right.T).to(dtype)
        b = random(m, 2, seed=seed).to(dtype)
        try:
            found = cv.lstsq(free(matrix), b, rtol=rtol, max_steps=300)
        except cv.NotConverged as error:
            found = error.solution
        exact = torch.linalg.pinv(matrix.double(), rtol=1e-4) @ b.double()
        assert (found.x - exact).norm() <= 1e4 * torch.finfo(dtype).eps * exact.norm() and found.steps.max() < 100


@pytest.mark.parametrize(
    "size, dtype", [(1e-40, torch.float32), (1e37, torch.float32), (1e-300, torch.float64), (1e300, torch.float64)]
)
def test_right_hand_sides_of_any_size(size, dtype):
    matrix = matrix_of("tall").to(dtype)
    b = random(len(matrix)).to(dtype)
    b = b / b.abs().max()
    expected = cv.lstsq(free(matrix), b).x
    torch.testing.assert_close(cv.lstsq(free(matrix), size * b).x / size, expected, rtol=1e-3, atol=1e-3)


def test_right_hand_sides_that_need_nothing_get_nothing():
    matrix = torch.eye(5, 3, dtype=torch.float64)
    b = torch.zeros(5, 3, dtype=torch.float64)
    b[1, 1], b[4, 2] = 2, 1  # nothing; in the range; orthogonal to it
    found = cv.lstsq(free(matrix), b)
    assert torch.equal(found.x, b[:3] * tensor(1, 1, 0)) and found.converged.all() and found.steps.tolist() == [0, 1, 0]
    none = cv.lstsq(free(matrix), b[:, :0])
    assert none.x.shape == (3, 0) and none.cost.products == 0


def test_what_is_solved_is_multiplied_no_more():
    values = linspace(1, 100, 50)
    b = torch.ones(50, 2, dtype=torch.float64)
    b[:, 0] = torch.eye(50)[3]
    found = cv.lstsq(cv.Diagonal(values), b, rtol=1e-9)
    assert found.steps[0] == 1 and found.steps[1] > 20 and found.converged.all()
    looks = int(found.steps[1] - 1) // 50
    assert found.cost.products == 2 + 2 * int(found.steps.sum()) + 4 + 2 * looks


@pytest.mark.parametrize("after", range(1, 9))
def test_an_interrupt_returns_the_solution_so_far(after):
    matrix = matrix_of("wide")
    A = free(matrix)
    A.function = Stopping(after, A.function)
    b = random(len(matrix), 2)
    with pytest.raises(cv.Interrupted) as stop:
        cv.lstsq(A, b, damping=0.01)
    found = stop.value.result
    check(matrix, b, found, 0.01)
    assert not found.complete and found.steps.tolist() == [after] * 2


def test_an_interrupt_in_the_first_product_returns_zero():
    A = free(matrix_of("wide"))
    A.transposed = Stopping(0, A.transposed)
    with pytest.raises(cv.Interrupted) as stop:
        cv.lstsq(A, torch.ones(40, dtype=torch.float64))
    assert not stop.value.result.x.any() and stop.value.result.residuals.tolist() == [1]


@pytest.mark.parametrize("name", ["tall", "wide"])
def test_work_that_was_stopped_at_every_product_gives_the_same_bits(name, tmp_path):
    matrix, run = matrix_of(name), cv.Run(checkpoint=tmp_path / "checkpoint")
    b = random(len(matrix), 2)
    whole = cv.lstsq(free(matrix), b, damping=0.1, rtol=1e-8)
    for _ in range(100):
        A = free(matrix)
        A.function = Stopping(1, A.function)
        try:
            found = cv.lstsq(A, b, damping=0.1, rtol=1e-8, run=run)
            break
        except cv.Interrupted:
            continue
    assert torch.equal(found.x, whole.x) and torch.equal(found.residuals, whole.residuals)
    assert found.cost.products == whole.cost.products
    with pytest.raises(cv.BadFile, match="are with other vectors than asked"):
        cv.lstsq(free(matrix), b + 1, damping=0.1, rtol=1e-8, run=run)
    with pytest.raises(cv.BadFile, match="are not those of <MatrixFree"):
        cv.lstsq(free(2 * matrix), b, damping=0.1, rtol=1e-8, run=run)


def test_too_few_steps_say_so():
    matrix = matrix_of("tall")
    with pytest.raises(cv.NotConverged, match=r"2 of 2 systems had a relative residual of .* after 3 steps") as caught:
        cv.lstsq(free(matrix), random(90, 2), rtol=1e-10, max_steps=3)
    check(matrix, random(90, 2), caught.value.solution)


def test_the_result_is_a_solution_that_is_saved_and_loaded(tmp_path):
    found = cv.lstsq(free(matrix_of("tall")), random(90, 2))
    loaded = cv.Solution.load(found.save(tmp_path))
    assert torch.equal(loaded.x, found.x) and str(loaded) == str(found) and loaded.recycled is None
    assert found.origin.question == "lstsq" and found.summary()["solved"] == "2 of 2 right-hand sides"


def test_bad_input_is_refused():
    A = free(matrix_of("tall"))
    with pytest.raises(TypeError, match=r"lstsq takes an operator.*got Tensor\. Give Dense"):
        cv.lstsq(torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"b is one right-hand side \(90,\)"):
        cv.lstsq(A, torch.ones(40))
    with pytest.raises(cv.NonFinite, match="right-hand side"):
        cv.lstsq(A, torch.full((90,), float("inf")))
    with pytest.raises(ValueError, match=r"damping of least squares is 0 or more, but got -1"):
        cv.lstsq(A, torch.ones(90), damping=-1.0)
    with pytest.raises(ValueError, match="max_steps >= 1, a whole number"):
        cv.lstsq(A, torch.ones(90), max_steps=2.5)
    with pytest.raises(ValueError, match="at least one row and one column"):
        cv.lstsq(cv.Dense(torch.ones(3, 0)), torch.ones(3))
    with pytest.raises(TypeError, match="knows no transpose"):
        cv.lstsq(cv.MatrixFree(lambda rows: rows, cv.Space(3)), torch.ones(3))
    with pytest.raises(cv.NonFinite, match="A product with"):
        cv.lstsq(cv.Dense(torch.full((3, 2), float("nan"))), torch.ones(3))
