"""Operators of every kind against their dense matrices, their lazy algebra, and views from and for other libraries."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import free, linspace, rotated, tensor

import curvature as cv
from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.operator import Meter, Product, Scaled, Sum, as_operator

N, M = 6, 4


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SQUARE, TALL, WIDE = random(N, N, 1), random(N, M, 2), random(M, N, 3)
SYMMETRIC, PSD = SQUARE + SQUARE.T, SQUARE @ SQUARE.T
EYE = torch.eye(N, dtype=torch.float64)
SPACE, SMALL = cv.Space(N, torch.float64), cv.Space(M, torch.float64)


def matrix_free(matrix: torch.Tensor, **facts) -> cv.MatrixFree:
    m, n = matrix.shape
    spaces = (cv.Space(n, matrix.dtype), cv.Space(m, matrix.dtype))
    return cv.MatrixFree(lambda rows: rows @ matrix.T, *spaces, adjoint=lambda rows: rows @ matrix, **facts)


KINDS = {
    "dense": (cv.Dense(SQUARE), SQUARE),
    "dense-tall": (cv.Dense(TALL), TALL),
    "dense-symmetric": (cv.Dense(SYMMETRIC), SYMMETRIC),
    "dense-psd": (cv.Dense(PSD, psd=True), PSD),
    "diagonal": (cv.Diagonal(tensor(1, -2, 3, 0, 5, 6)), torch.diag(tensor(1, -2, 3, 0, 5, 6))),
    "diagonal-psd": (cv.Diagonal(tensor(1, 2, 3, 0, 5, 6)), torch.diag(tensor(1, 2, 3, 0, 5, 6))),
    "identity": (cv.identity(SPACE), EYE),
    "matrix-free": (matrix_free(SQUARE), SQUARE),
    "matrix-free-wide": (matrix_free(WIDE), WIDE),
    "matrix-free-symmetric": (matrix_free(SYMMETRIC, symmetric=True), SYMMETRIC),
    "matrix-free-psd": (matrix_free(PSD, psd=True), PSD),
    "sum": (cv.Dense(SQUARE) + cv.Dense(SYMMETRIC), SQUARE + SYMMETRIC),
    "difference": (cv.Dense(SYMMETRIC) - cv.identity(SPACE), SYMMETRIC - EYE),
    "damped": (cv.Dense(PSD, psd=True) + 1e-3 * cv.identity(SPACE), PSD + 1e-3 * EYE),
    "scaled": (-2.5 * cv.Dense(TALL), -2.5 * TALL),
    "scaled-integer": (cv.Dense(TALL) * 3, 3 * TALL),
    "negated": (-cv.Dense(PSD, psd=True), -PSD),
    "scaled-psd": (0 * cv.Dense(PSD, psd=True), 0 * PSD),
    "product": (cv.Dense(WIDE) @ cv.Dense(SQUARE), WIDE @ SQUARE),
    "gram": (matrix_free(TALL) @ matrix_free(TALL).adjoint(), TALL @ TALL.T),
    "nested": (
        2 * (cv.Dense(WIDE) @ (cv.Dense(SYMMETRIC) - 0.5 * cv.identity(SPACE)) @ cv.Dense(TALL)) + cv.identity(SMALL),
        2 * (WIDE @ (SYMMETRIC - 0.5 * EYE) @ TALL) + torch.eye(M),
    ),
}
EVERY = pytest.mark.parametrize("A, matrix", KINDS.values(), ids=list(KINDS))


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-12, "atol": 1e-12, **tolerance})


@EVERY
def test_dense_equals_the_matrix_whatever_the_block(A, matrix):
    for block in (1, 4, 64):
        close(A.dense(block=block), matrix)
    assert A.shape == tuple(matrix.shape) == (A.codomain.size, A.domain.size)
    assert A.dtype == torch.float64 and A.device == torch.device("cpu")


@EVERY
def test_products_with_vectors_and_columns_equal_those_of_the_matrix(A, matrix):
    x, X = random(A.shape[1], 1).squeeze(1), random(A.shape[1], 5)
    close(A @ x, matrix @ x)
    close(A @ X, matrix @ X)
    close(A @ X[:, :1], matrix @ X[:, :1])
    close(A @ X[:, ::2], matrix @ X[:, ::2])
    assert (A @ X[:, :0]).shape == (A.shape[0], 0)


@EVERY
def test_a_block_is_its_rows_one_by_one(A, matrix):
    rows = random(4, A.shape[1])
    before = rows.clone()
    close(A.apply(rows), torch.cat([A.apply(row[None]) for row in rows]), rtol=1e-14, atol=1e-14)
    assert torch.equal(rows, before)  # and the rows are not written to


@EVERY
def test_products_are_linear(A, matrix):
    x, y = random(2, A.shape[1])
    close(A @ (2 * x - 3 * y), 2 * (A @ x) - 3 * (A @ y))


@EVERY
def test_adjoint_is_the_transpose_and_an_involution(A, matrix):
    close(A.adjoint().dense(), matrix.T)
    close(A.adjoint().adjoint().dense(), matrix)
    u, v = random(A.shape[0], 1).squeeze(1), random(A.shape[1], 1).squeeze(1)
    close(u @ (A @ v), (A.adjoint() @ u) @ v)


@EVERY
def test_declared_facts_are_true(A, matrix):
    if A.symmetric:
        close(matrix, matrix.T, rtol=0, atol=1e-14)
        assert A.adjoint() is A or type(A) in (Sum, Scaled)
    if A.psd:
        assert A.symmetric
        assert torch.linalg.eigvalsh(matrix)[0] > -1e-12


@pytest.mark.parametrize(
    "name, symmetric, psd",
    [
        ("dense", False, False),
        ("dense-tall", False, False),
        ("dense-symmetric", True, False),
        ("dense-psd", True, True),
        ("diagonal", True, False),
        ("diagonal-psd", True, True),
        ("identity", True, True),
        ("matrix-free-psd", True, True),
        ("sum", False, False),
        ("difference", True, False),
        ("damped", True, True),
        ("negated", True, False),
        ("scaled-psd", True, True),
        ("product", False, False),
    ],
)
def test_facts_that_are_known_are_declared(name, symmetric, psd):
    A = KINDS[name][0]
    assert (A.symmetric, A.psd) == (symmetric, psd)
    facts = "psd " if psd else "symmetric " if symmetric else ""
    assert repr(A) == f"<{facts}{type(A).__name__} {A.shape[0]} x {A.shape[1]}, torch.float64, cpu>"


@EVERY
def test_scipy_view_has_the_same_action(A, matrix):
    view = A.to_scipy()
    X = random(A.shape[1], 3).numpy()
    assert view.shape == A.shape and view.dtype == np.float64
    np.testing.assert_allclose(view @ X, matrix.numpy() @ X, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(view.matvec(X[:, 0]), matrix.numpy() @ X[:, 0], rtol=1e-12, atol=1e-12)
    Y = random(A.shape[0], 2).numpy()
    np.testing.assert_allclose(view.H @ Y, matrix.numpy().T @ Y, rtol=1e-12, atol=1e-12)


def test_scipy_eigsh_of_the_view_finds_the_eigenvalues():
    values = linspace(-3, 5, 60)
    A = free(rotated(values))
    found = scipy.sparse.linalg.eigsh(A.to_scipy(), k=4, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), values[-4:].numpy(), rtol=1e-10)


def test_scipy_view_of_a_float32_operator_is_float32():
    A = cv.Dense(SYMMETRIC.float())
    view = A.to_scipy()
    assert view.dtype == np.float32
    assert (view @ np.ones(N, dtype=np.float32)).dtype == np.float32


GUESTS = {
    "tensor": lambda S: S,
    "parameter": torch.nn.Parameter,
    "sparse-tensor": lambda S: S.to_sparse(),
    "numpy": lambda S: S.numpy(),
    "numpy-fortran": lambda S: np.asfortranarray(S.numpy()),
    "scipy-csr": lambda S: scipy.sparse.csr_matrix(S.numpy()),
    "scipy-coo-array": lambda S: scipy.sparse.coo_array(S.numpy()),
    "scipy-operator": lambda S: scipy.sparse.linalg.aslinearoperator(S.numpy()),
    "dense-operator": cv.Dense,
}


@pytest.mark.parametrize("guest", GUESTS.values(), ids=list(GUESTS))
def test_guests_are_asked_the_same_questions(guest):
    values = linspace(-3, 5, 40)
    S = rotated(values)
    A = as_operator(guest(S))
    assert A.symmetric and A.shape == (40, 40) and A.dtype == torch.float64
    close(A.dense().detach(), S)
    pairs = cv.eigsh(guest(S), 3)
    close(pairs.values, values.flip(0)[:3], rtol=1e-9)
    assert not pairs.vectors.requires_grad
    assert cv.trace(guest(S), products=40).value.item() == pytest.approx(float(S.trace()), rel=1e-12)
    density = cv.spectral_density(guest(S), probes=2, steps=20)
    close(density.nodes, values)


def test_guests_keep_single_precision():
    S = rotated(linspace(1, 2, 30)).float()
    for guest in (S, S.numpy(), scipy.sparse.csr_matrix(S.numpy())):
        A = as_operator(guest)
        assert A.dtype == torch.float32
        close(A.dense(), S, rtol=1e-6, atol=1e-6)


def test_whole_numbers_in_numpy_are_measured_in_float64():
    A = as_operator(np.diag([3, 1, 2]))
    assert A.dtype == torch.float64
    close(cv.eigsh(A, 3).values, tensor(3, 2, 1))


def test_an_operator_is_its_own_view():
    A = cv.Dense(SYMMETRIC)
    assert as_operator(A) is A


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: as_operator(TALL), TypeError, r"Expected a square operator with .shape and @, but got Tensor \(6, 4\)"),
        (lambda: as_operator(3.0), TypeError, r"square operator .* but got float \(\)"),
        (lambda: as_operator([[1.0]]), TypeError, r"but got list \(\)"),
        (lambda: as_operator(torch.eye(3, dtype=torch.int64)), TypeError, "real floating-point numbers, but got torch.int64"),
        (lambda: as_operator(torch.eye(3) * 1j), TypeError, "real floating-point numbers, but got torch.complex64"),
        (lambda: as_operator(np.eye(3) * 1j), TypeError, "real floating-point numbers, but got complex128"),
        (lambda: cv.Dense(torch.ones(3)), TypeError, r"Dense holds a real matrix, but got \(3,\) of torch.float32"),
        (lambda: cv.Dense(torch.eye(3) * 1j), TypeError, r"Dense holds a real matrix, but got \(3, 3\) of torch.complex64"),
        (lambda: cv.Dense(torch.eye(3, dtype=torch.int64)), TypeError, "of torch.int64"),
        (lambda: cv.Diagonal(torch.eye(2)), TypeError, r"Diagonal holds a real vector, but got \(2, 2\) of torch.float32"),
        (lambda: cv.Diagonal(torch.arange(3)), TypeError, r"but got \(3,\) of torch.int64"),
        (lambda: cv.Dense(TALL) + cv.Dense(WIDE), ValueError, r"shapes \(6, 4\) and \(4, 6\) cannot be added"),
        (lambda: cv.Dense(TALL) - cv.Dense(SQUARE), ValueError, r"shapes \(6, 4\) and \(6, 6\) cannot be added"),
        (lambda: cv.Dense(TALL) @ cv.Dense(TALL), ValueError, r"shapes \(6, 4\) and \(6, 4\) cannot be multiplied"),
        (lambda: cv.Dense(TALL) @ torch.ones(6), ValueError, r"A of shape \(6, 4\) multiplies \(4,\) or \(4, k\), but got \(6,\)"),
        (lambda: cv.Dense(TALL) @ torch.ones(4, 2, 2), ValueError, r"but got \(4, 2, 2\)"),
        (lambda: cv.Dense(TALL) @ torch.tensor(1.0), ValueError, r"but got \(\)"),
        (lambda: cv.Dense(TALL) @ 3, TypeError, "Expected a torch tensor or an operator behind @, but got int"),
        (lambda: cv.Dense(TALL) @ np.ones(4), TypeError, "but got ndarray. Use torch.from_numpy, or A.to_scipy"),
        (lambda: np.ones(6) @ cv.Dense(TALL), TypeError, "ndarray @ operator is not defined. Write A.adjoint"),
        (lambda: cv.Dense(TALL) + 3, TypeError, "unsupported operand"),
        (lambda: cv.Dense(TALL) - 3, TypeError, "unsupported operand"),
        (lambda: cv.Dense(TALL) * "3", TypeError, "multiply"),
        (
            lambda: cv.MatrixFree(lambda rows: rows, SPACE).adjoint(),
            TypeError,
            "MatrixFree knows no transpose. Give MatrixFree an `adjoint=` function.",
        ),
        (
            lambda: cv.identity(cv.Space(30_000)).dense(),
            cv.TooLarge,
            r"30000 x 30000, beyond the limit of 20000. Ask trace, eigsh or spectral_density instead, "
            r"or pass dense\(limit=30000\)",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_question_about_an_operator_that_is_not_square_is_refused():
    for question in (cv.trace, cv.eigsh, cv.spectral_density):
        with pytest.raises(ValueError, match=rf"{question.__name__} needs a square operator, but got \(6, 4\)"):
            question(cv.MatrixFree(lambda rows: rows @ TALL.T, SMALL, SPACE))


def test_a_question_about_an_operator_without_rows_is_refused():
    empty = cv.MatrixFree(lambda rows: rows, cv.Space(0, torch.float64), symmetric=True)
    for question in (cv.trace, cv.eigsh, cv.spectral_density):
        with pytest.raises(ValueError, match=rf"{question.__name__} needs an operator with at least one row"):
            question(empty)


def test_dense_finds_out_whether_it_is_symmetric_unless_told():
    assert cv.Dense(SYMMETRIC).symmetric and not cv.Dense(SQUARE).symmetric and not cv.Dense(TALL).symmetric
    assert not cv.Dense(SYMMETRIC, symmetric=False).symmetric
    assert cv.Dense(SQUARE, symmetric=True).symmetric
    nearly = SYMMETRIC.clone()
    nearly[0, 1] += 1e-15
    assert cv.Dense(nearly).symmetric
    nearly[0, 1] += 1e-9
    assert not cv.Dense(nearly).symmetric


def test_leaves_are_each_listed_once_and_passes_counted_once():
    meter = Meter()

    def read(rows):
        meter.passes += 1
        return rows @ SYMMETRIC

    A = cv.MatrixFree(read, SPACE, symmetric=True, meter=meter, source={"operator": "Counted"})
    B = 2 * (A @ A) + A - 0.5 * cv.identity(SPACE)
    leaves = list(B.leaves())
    assert len(leaves) == 2 and sum(leaf is A for leaf in leaves) == 1
    measurement = Measurement(B, "test", options={})
    measurement.apply(torch.ones(4, N, dtype=torch.float64))
    assert (measurement.cost.products, measurement.cost.passes) == (4, 3)
    described = describe(B)["parts"]
    assert [part["operator"] for part in described] == ["Sum", "Scaled"]
    assert described[1]["scale"] == -1 and described[1]["parts"][0]["parts"][0]["operator"] == "Identity"
    assert describe(B)["operator"] == "Sum" and describe(B)["shape"] == [N, N]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_product_that_is_not_finite_is_refused(bad):
    matrix = rotated(linspace(1, 2, 30))
    matrix[3, 4] = bad
    A = cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(30, torch.float64), symmetric=True)
    for question in (cv.trace, cv.eigsh, cv.spectral_density):
        with pytest.raises(cv.NonFinite, match=r"A product with <symmetric MatrixFree 30 x 30.*Check the weights"):
            question(A)


def test_adding_to_a_multiple_of_the_identity_shifts_the_spectrum():
    values = linspace(-1, 1, 30)
    damped = free(rotated(values)) + 2.0 * cv.identity(cv.Space(30, torch.float64))
    close(cv.eigsh(damped, 2).values, 2 + values.flip(0)[:2], rtol=1e-9)


LEAVES = st.sampled_from(
    ["dense", "dense-symmetric", "dense-psd", "diagonal", "diagonal-psd", "identity", "matrix-free"]
)


def grow(parts):
    return st.one_of(
        st.tuples(st.sampled_from("+-@"), parts, parts),
        st.tuples(st.just("*"), st.floats(-3, 3, allow_nan=False), parts),
        st.tuples(st.just("T"), parts),
        st.tuples(st.just("neg"), parts),
    )


def build(tree):
    """The operator that an expression says, and its dense matrix."""
    match tree:
        case str():
            return KINDS[tree]
        case ("+", a, b):
            (A, X), (B, Y) = build(a), build(b)
            return A + B, X + Y
        case ("-", a, b):
            (A, X), (B, Y) = build(a), build(b)
            return A - B, X - Y
        case ("@", a, b):
            (A, X), (B, Y) = build(a), build(b)
            return A @ B, X @ Y
        case ("*", scale, a):
            A, X = build(a)
            return scale * A, scale * X
        case ("T", a):
            A, X = build(a)
            return A.adjoint(), X.T
        case ("neg", a):
            A, X = build(a)
            return -A, -X


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.recursive(LEAVES, grow, max_leaves=6))
def test_any_expression_equals_the_expression_of_matrices(tree):
    A, matrix = build(tree)
    size = 1 + float(matrix.abs().max())
    close(A.dense() / size, matrix / size)
    close(A.adjoint().dense() / size, matrix.T / size)
    if A.symmetric:
        close(matrix / size, matrix.T / size)
    if A.psd:
        assert float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0]) > -1e-11 * size


def test_a_product_of_operators_claims_nothing():
    product = cv.Dense(PSD, psd=True) @ cv.Dense(PSD, psd=True)
    assert isinstance(product, Product) and not product.symmetric and not product.psd
    with pytest.raises(ValueError, match=r"eigsh needs a symmetric operator.*A.adjoint\(\) @ A"):
        cv.eigsh(product)


def test_a_view_of_numpy_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cv.eigsh(rotated(linspace(1, 2, 20)).numpy(), 2)


def test_more_ways_to_write_it():
    A, B = cv.Dense(SQUARE), cv.Dense(SQUARE.T.contiguous())
    for made, matrix in [
        (A / 2, SQUARE / 2),
        (A * torch.tensor(2.0), SQUARE * 2),
        (np.float64(3) * A, SQUARE * 3),
        (sum([A, B]), SQUARE + SQUARE.T),
        (A.T, SQUARE.T),
    ]:
        torch.testing.assert_close(made.dense(), matrix)


@pytest.mark.parametrize(
    "make",
    [
        lambda A: A.adjoint() @ A,
        lambda A: A @ A.adjoint(),
        lambda A: (lambda S: S @ S)(cv.Dense(SQUARE + SQUARE.T)),
    ],
    ids=["normal", "gram", "square"],
)
def test_a_matrix_times_its_transpose_is_known_to_be_psd(make):
    free = cv.MatrixFree(
        lambda rows: rows @ TALL.T,
        cv.Space(TALL.shape[1], TALL.dtype),
        cv.Space(TALL.shape[0], TALL.dtype),
        adjoint=lambda rows: rows @ TALL,
    )
    for A in (cv.Dense(TALL), free):
        product = make(A)
        assert product.symmetric and product.psd
        expected = torch.linalg.eigvalsh(product.dense()).flip(0)[:2]
        torch.testing.assert_close(cv.eigsh(product, 2).values.to(expected), expected, rtol=1e-5, atol=1e-5)
    other = cv.Dense(TALL) @ cv.Dense(TALL).adjoint()  # equal numbers, but nobody said so
    assert not other.symmetric
