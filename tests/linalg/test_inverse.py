"""Inverses as operators: by structure where there is one, by solves where there is none."""

from __future__ import annotations

import pytest
import torch
from matrices import free, rotated
from objectives import zoo

import curvature as cv

VALUES = torch.logspace(-4, 1, 60, dtype=torch.float64)
MATRIX = rotated(VALUES)
EYE = torch.eye(60, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_without_structure_every_product_is_a_solve(damping):
    A = cv.MatrixFree(lambda rows: rows @ MATRIX, cv.Space(60, torch.float64), psd=True)
    inverse = cv.inverse(A, damping=damping, rtol=1e-10)
    exact = torch.linalg.inv(MATRIX + damping * EYE)
    torch.testing.assert_close(inverse.dense(), exact, rtol=0, atol=1e-7 * float(exact.abs().max()))
    assert inverse.psd and inverse.symmetric
    assert float(cv.eigsh(inverse).values[0]) == pytest.approx(1 / (1e-4 + damping), rel=1e-4)


def test_an_indefinite_matrix_has_one_too():
    matrix = rotated(torch.linspace(-1, 1, 60, dtype=torch.float64))
    inverse = cv.inverse(free(matrix), rtol=1e-11)
    torch.testing.assert_close(inverse.dense(), torch.linalg.inv(matrix), rtol=0, atol=1e-7)
    assert not inverse.psd


def test_blocks_are_inverted_each_in_its_way():
    case = next(case for case in zoo() if case.name == "classifier")
    A = cv.blockwise(cv.ggn, case.objective())
    dense = A.dense()
    inverse = cv.inverse(A, damping=0.1, rtol=1e-12)
    torch.testing.assert_close(inverse.dense(), torch.linalg.inv(dense + 0.1 * torch.eye(len(dense)).double()))
    assert isinstance(inverse, cv.BlockDiagonal)


def test_a_preconditioner_saves_products():
    count = 0

    def apply(rows: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(rows)
        return rows @ MATRIX

    A = cv.MatrixFree(apply, cv.Space(60, torch.float64), psd=True)
    counts = []
    for preconditioner in (None, cv.inverse(cv.Dense(MATRIX), damping=1e-3)):
        count = 0
        cv.inverse(A, damping=1e-3, preconditioner=preconditioner, rtol=1e-8) @ torch.ones(60).double()
        counts.append(count)
    assert counts[1] <= 4 < counts[0] / 4


def test_guests_and_nonsense():
    torch.testing.assert_close(cv.inverse(2 * torch.eye(3)) @ torch.ones(3), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="finite"):
        cv.inverse(cv.identity(cv.Space(3)), damping=float("nan"))


def test_what_has_no_inverse_says_so():
    with pytest.raises(ValueError, match="symmetric"):
        cv.inverse(cv.Dense(torch.triu(torch.ones(3, 3))))
    A = cv.MatrixFree(lambda rows: rows @ MATRIX, cv.Space(60, torch.float64), psd=True)
    with pytest.raises(cv.NotConverged, match="max_steps"):
        cv.inverse(A, damping=1e-4, max_steps=3) @ torch.ones(60).double()
    with pytest.raises(TypeError, match="does not tell its eigenvalues"):
        cv.power(A, -1)
