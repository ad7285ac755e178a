"""Nystrom's approximation against its definition, and what it does for linear systems."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import free, linspace, rotated, tensor

import curvature as cv

POLYNOMIAL = 1 / torch.arange(1, 401, dtype=torch.float64) ** 2
EYE = torch.eye(400, dtype=torch.float64)


def psd(values: torch.Tensor, dtype: torch.dtype = torch.float64) -> tuple[cv.MatrixFree, torch.Tensor]:
    matrix = rotated(values).to(dtype)
    A = free(matrix)
    A.psd = True
    return A, matrix


@pytest.mark.parametrize("rank", [1, 10, 60])
def test_it_is_that_of_its_definition(rank):
    A, matrix = psd(POLYNOMIAL)
    found = cv.nystrom(A, rank, seed=4)
    draws = A.domain.draw(rank, seed=4, kind="normal")
    image = matrix @ draws.T
    expected = image @ torch.linalg.solve(draws @ image, image.T)
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-9)
    assert len(found.values) == rank and (found.values.diff() <= 0).all()
    assert (found.values <= POLYNOMIAL[:rank] + 1e-12).all()
    assert torch.linalg.eigvalsh(matrix - found.dense()).min() > -1e-9


def test_a_matrix_of_low_rank_is_found_whole():
    values = torch.cat([linspace(1, 9, 7), torch.zeros(393, dtype=torch.float64)])
    A, matrix = psd(values)
    found = cv.nystrom(A, 20)
    torch.testing.assert_close(found.dense(), matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3])
def test_its_inverse_is_a_preconditioner(damping, dtype):
    A, matrix = psd(POLYNOMIAL, dtype)
    dimension = float((POLYNOMIAL / (POLYNOMIAL + damping)).sum())
    inverse = cv.inverse(cv.nystrom(A, 2 * math.ceil(1.5 * dimension) + 1), damping=damping)
    half = cv.power(inverse, 0.5).dense().double()
    values = torch.linalg.eigvalsh(half @ (matrix.double() + damping * EYE) @ half)
    assert values[-1] / values[0] < 28


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_the_rank_follows_the_damping_and_saves_steps(damping):
    A, _ = psd(POLYNOMIAL)
    b = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cv.nystrom(A, damping=damping)
    assert found.values[-1] <= 10 * damping and len(found.values) < 100
    preconditioner = cv.inverse(found, damping=damping)
    helped = cv.solve(A, b, damping=damping, preconditioner=preconditioner, rtol=1e-8)
    plain = cv.solve(A, b, damping=damping, rtol=1e-8)
    torch.testing.assert_close(helped.x, plain.x, rtol=0, atol=1e-5 / damping * 1e-2)
    assert helped.steps.max() < 30 and (damping > 1e-2 or helped.steps.max() < 0.7 * plain.steps.max())


def test_its_inverse_stays_positive_definite_in_float32():
    A = cv.Diagonal(torch.logspace(0, -9, 1000))
    with pytest.raises(cv.NotConverged) as caught:
        cv.nystrom(A, damping=1e-7)
    preconditioner = cv.inverse(caught.value.solution, damping=1e-7)
    b = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert cv.solve(A, b, damping=1e-7, preconditioner=preconditioner, rtol=1e-3).converged.all()


def test_a_zero_matrix_has_rank_zero_and_a_noisy_one_its_rank():
    assert len(cv.nystrom(cv.Dense(torch.zeros(5, 5), psd=True), 2).values) == 0
    matrix = rotated(torch.cat([linspace(1, 9, 50), torch.zeros(250, dtype=torch.float64)])).float()
    noise = 1e-5 * torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    noisy = cv.Dense(matrix + noise, psd=True)
    torch.testing.assert_close(cv.nystrom(noisy, 80).dense(), matrix, rtol=0, atol=3e-2)


def test_a_matrix_of_full_rank_has_an_inverse():
    A = cv.LowRank(tensor(1, 2), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(cv.inverse(A).dense(), torch.diag(tensor(1, 0.5)))


def test_structure_tells_trace_diagonal_and_functions():
    vectors = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64)).Q.T
    A = cv.LowRank(tensor(4, 3, 2, 1), vectors, shift=0.5)
    matrix = A.dense()
    assert A.psd and A.symmetric
    assert float(cv.trace(A)) == pytest.approx(float(matrix.trace()))
    torch.testing.assert_close(cv.diagonal(A).value, matrix.diagonal())
    torch.testing.assert_close(cv.eigenvalues(A), torch.linalg.eigvalsh(matrix))
    torch.testing.assert_close(cv.inverse(A, damping=0.1).dense(), torch.linalg.inv(matrix + 0.1 * EYE[:30, :30]))
    torch.testing.assert_close(cv.power(A, 0.5).dense() @ cv.power(A, 0.5).dense(), matrix)
    assert float(cv.logdet(A)) == pytest.approx(float(torch.linalg.slogdet(matrix).logabsdet))
    with pytest.raises(ValueError, match="An eigenvalue is 0"):
        cv.inverse(cv.LowRank(tensor(4, 3, 2, 1), vectors))


def test_bad_input_is_refused():
    A, _ = psd(linspace(1, 3, 400))
    with pytest.raises(ValueError, match="needs a rank, or the damping"):
        cv.nystrom(A)
    with pytest.raises(ValueError, match="between 1 and the size"):
        cv.nystrom(A, 401)
    with pytest.raises(cv.NotConverged, match="The smallest of 16 eigenvalues") as caught:
        cv.nystrom(A, damping=1e-3, max_rank=16)
    assert len(caught.value.solution.values) == 16
    with pytest.raises(ValueError, match="for positive semidefinite matrices"):
        cv.nystrom(free(rotated(linspace(-1, 1, 50))), 5)
    liar = free(rotated(linspace(-1, 1, 50)))
    liar.psd = True
    with pytest.raises(ValueError, match="says that it is psd, but is not"):
        cv.nystrom(liar, 20)
