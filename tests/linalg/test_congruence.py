"""P^T A P."""

from __future__ import annotations

import pytest
import torch
from matrices import free, linspace, rotated

import curvature as cv
from curvature.linalg.congruence import congruence

MATRIX = rotated(linspace(-1, 4, 6))
WIDE = torch.linspace(-1, 1, 24).double().view(6, 4).sin()


@pytest.mark.parametrize("P", [WIDE, torch.diag(linspace(0, 2, 6)), rotated(linspace(1, 2, 6))], ids=str)
def test_it_is_the_dense_product(P):
    A = congruence(cv.Dense(P), free(MATRIX))
    torch.testing.assert_close(A.dense(), P.T @ MATRIX @ P, rtol=1e-12, atol=1e-12)
    assert A.symmetric and not A.psd and A.adjoint() is A and len(list(A.leaves())) == 2
    top = cv.eigsh(A, 2).values
    torch.testing.assert_close(top, torch.linalg.eigvalsh(P.T @ MATRIX @ P).flip(0)[:2])


def test_it_is_symmetric_and_psd_where_the_middle_is():
    P = cv.Dense(WIDE)
    assert congruence(P, cv.Dense(MATRIX @ MATRIX, psd=True)).psd
    middle = torch.arange(36.0).double().view(6, 6)
    A = congruence(P, cv.Dense(middle))
    assert not A.symmetric
    torch.testing.assert_close(A.adjoint().dense(), WIDE.T @ middle.T @ WIDE)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"P is \(4, 6\) and A is \(6, 6\)"):
        congruence(cv.Dense(WIDE.T), cv.Dense(MATRIX))
    with pytest.raises(ValueError, match="with a square A"):
        congruence(cv.Dense(WIDE), cv.Dense(WIDE.T))
