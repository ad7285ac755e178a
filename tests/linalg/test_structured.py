"""Kronecker, spectral and block-diagonal matrices equal their dense forms, and what their structure tells is exact."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import curvature as cv


def psd(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random positive definite matrices."""
    root = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(shape[-1])


FACTORS = {
    "matrices": (psd(3), psd(4, seed=1)),
    "stacks": (psd(2, 3), psd(2, 4, seed=1)),
    "diagonal left": (psd(5).diagonal(), psd(2, seed=1)),
    "diagonal right": (psd(2), psd(3, seed=1).diagonal()),
    "diagonals": (psd(2).diagonal(), psd(3, seed=1).diagonal()),
    "shared": (psd(2, 3), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)),
    "small stacks": (torch.ones(3, 1, 1).double(), psd(3, 2)),
}


def dense(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same matrix the obvious way."""
    left, right = (torch.diag(f) if f.ndim == 1 else f for f in (left, right))
    left, right = (f if f.ndim == 3 else f.unsqueeze(0) for f in (left, right))
    count = max(len(left), len(right))
    pairs = zip(left.expand(count, -1, -1), right.expand(count, -1, -1), strict=True)
    return torch.block_diag(*(torch.kron(a, b) for a, b in pairs))


def blocks() -> cv.LinearOperator:
    """Four blocks on interleaved coordinates."""
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    made = {
        "kronecker": cv.Kronecker(psd(2), psd(3), psd=True),
        "diagonal": cv.Diagonal(torch.tensor([1.0, 2.0]).double()),
        "dense": cv.Dense(psd(3), psd=True),
        "slice": cv.Dense(psd(4), psd=True),
    }
    places = {"kronecker": order[:6], "diagonal": order[6:8], "dense": order[8:], "slice": slice(11, 15)}
    return cv.BlockDiagonal(made, places, cv.Space(15, torch.float64))


STRUCTURED = {
    **{name: cv.Kronecker(*factors, psd=True) for name, factors in FACTORS.items()},
    "spectral": cv.Kronecker(*FACTORS["stacks"], psd=True).spectral,
    "dense": cv.Dense(psd(5), psd=True),
    "diagonal": cv.Diagonal(psd(5).diagonal()),
    "blocks": blocks(),
    "shifted": 2 * blocks() + 0.5 * cv.identity(cv.Space(15, torch.float64)),
    "shifted from the left": cv.identity(cv.Space(15, torch.float64)) + blocks(),
    "identity": cv.identity(cv.Space(3, torch.float64)),
}
every_structure = pytest.mark.parametrize("A", STRUCTURED.values(), ids=STRUCTURED)


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_products_and_their_spectral_form_equal_the_dense_kronecker_product(factors):
    A = cv.Kronecker(*factors)
    torch.testing.assert_close(A.dense(), dense(*factors), rtol=0, atol=1e-12)
    torch.testing.assert_close(A.spectral.dense(), dense(*factors), rtol=0, atol=1e-12)


def test_blocks_lie_where_their_places_say():
    A = blocks()
    expected = torch.zeros(15, 15).double()
    for name, place in A.places.items():
        at = torch.arange(15)[place]
        expected[at[:, None], at] = A.blocks[name].dense()
    torch.testing.assert_close(A.dense(), expected, rtol=0, atol=1e-12)
    assert A.symmetric and A.psd


def test_blocks_that_are_not_symmetric_are_transposed():
    space = cv.Space(5, torch.float64)
    parts = {"a": cv.Dense(torch.randn(2, 2).double()), "b": cv.Dense(torch.randn(3, 3).double())}
    A = cv.BlockDiagonal(parts, {"a": slice(0, 2), "b": slice(2, 5)}, space)
    torch.testing.assert_close(A.T.dense(), A.dense().T)


@every_structure
def test_eigenvalues_are_those_of_the_dense_matrix(A):
    torch.testing.assert_close(cv.eigenvalues(A), torch.linalg.eigvalsh(A.dense()), rtol=1e-10, atol=1e-12)


@every_structure
@pytest.mark.parametrize("exponent", [0.5, -0.25, 2, -1])
def test_powers_are_those_of_the_dense_matrix(A, exponent):
    values, vectors = torch.linalg.eigh(A.dense() + 0.3 * torch.eye(len(A.dense())).double())
    expected = vectors * values**exponent @ vectors.T
    torch.testing.assert_close(cv.power(A, exponent, damping=0.3).dense(), expected, rtol=1e-10, atol=1e-10)


@every_structure
def test_inverse_logdet_and_trace_are_exact(A):
    matrix = A.dense()
    torch.testing.assert_close(cv.inverse(A).dense() @ matrix, torch.eye(len(matrix)).double(), rtol=0, atol=1e-10)
    logdet, trace = cv.logdet(A), cv.trace(A)
    torch.testing.assert_close(logdet.value, torch.logdet(matrix), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trace.value, matrix.trace(), rtol=1e-12, atol=1e-12)
    assert logdet.stderr == trace.stderr == 0 and trace.cost.products == 0


def test_what_is_singular_is_inverted_only_with_damping():
    A = cv.Kronecker(torch.tensor([1.0, 0.0]), psd(2).float(), psd=True)
    for question in (cv.inverse, cv.logdet):
        with pytest.raises(ValueError, match="Add damping"):
            question(A)
    assert torch.isfinite(cv.inverse(A, damping=0.1).dense()).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_has_no_eigenvalues(bad):
    A = cv.Dense(torch.eye(3).fill_diagonal_(bad), psd=True)
    with pytest.raises(cv.NonFinite, match="entries that are not finite, and no eigenvalues"):
        cv.inverse(A, damping=1.0)


def test_powers_that_negative_eigenvalues_have_are_taken():
    A = cv.Diagonal(torch.tensor([-2.0, 4.0]))
    assert cv.inverse(A).entries.tolist() == [-0.5, 0.25]
    with pytest.raises(ValueError, match=r"An eigenvalue is -2, which has no power 0\.5"):
        cv.power(A, 0.5)


def test_eigenvalues_that_rounding_made_negative_are_zero_in_a_psd_product():
    root = torch.randn(6, 2)
    A = cv.Kronecker(root @ root.T, torch.eye(2), psd=True)
    assert cv.eigenvalues(A).min() == 0 and torch.isfinite(cv.power(A, 0.5).dense()).all()


def test_matrices_without_structure_are_refused_with_what_to_ask_instead():
    A = cv.MatrixFree(lambda rows: rows, cv.Space(3), symmetric=True)
    for question in (partial(cv.power, exponent=0.5), cv.eigenvalues):
        with pytest.raises(TypeError, match="Ask eigsh"):
            question(A)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: cv.Kronecker(torch.ones(2, 3), torch.ones(2, 2)), TypeError, r"\(2, 3\)"),
        (lambda: cv.Kronecker(torch.ones(2, 3, 3), torch.ones(3, 2, 2)), TypeError, "stack of as many"),
        (
            lambda: cv.BlockDiagonal({"a": cv.Diagonal(torch.ones(2))}, {"a": slice(0, 3)}, cv.Space(3)),
            ValueError,
            r"a is \(2, 2\) for 3",
        ),
        (
            lambda: cv.BlockDiagonal({"a": cv.Diagonal(torch.ones(2))}, {"a": slice(0, 2)}, cv.Space(3)),
            ValueError,
            "have 2 coordinates",
        ),
        (
            lambda: cv.BlockDiagonal(
                {"a": cv.Diagonal(torch.ones(2)), "b": cv.Diagonal(torch.ones(1))},
                {"a": slice(0, 2), "b": slice(1, 2)},
                cv.Space(3),
            ),
            ValueError,
            "Coordinate 2 is in no block",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_powers_say_what_they_are_of():
    A = cv.Diagonal(torch.tensor([4.0, 9.0]), source={"operator": "kfac", "model": "Net"})
    told = cv.inverse(A, damping=0.5).source
    assert told["operator"] == "power" and (told["exponent"], told["damping"]) == (-1, 0.5)
    assert told["of"]["operator"] == "kfac" and told["of"]["model"] == "Net"
