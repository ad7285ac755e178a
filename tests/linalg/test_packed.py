"""Symmetric matrices held as panels of their upper triangles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvature.linalg.packed import (
    PANEL,
    add_gram_,
    diagonals,
    from_triangles,
    packed,
    packed_size,
    panels,
    triangles,
    unpacked,
)

SIZES = [1, 5, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL, 3 * PANEL + 7]


def symmetric(size: int, stack: int = 2) -> Tensor:
    A = torch.randn(stack, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return A + A.mT


@pytest.mark.parametrize("size", SIZES)
def test_what_is_packed_comes_back(size):
    S = symmetric(size)
    held = packed(S)
    assert held.shape == (2, packed_size(size))
    assert torch.equal(unpacked(held, size), S)
    assert torch.equal(diagonals(held, size), S.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("size", SIZES)
def test_triangles_are_the_upper_ones(size):
    S = symmetric(size)
    T = triangles(S)
    assert torch.equal(T[1], S[1][torch.ones(size, size).triu().bool()])
    assert torch.equal(from_triangles(T, size), S)
    assert torch.equal(triangles(S.triu()), T)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rest", [1, 30])
def test_gram_matrices_are_added_in_place(size, rest):
    S, X = symmetric(size), torch.randn(2, size, rest, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    held = packed(S)
    place = held.data_ptr()
    add_gram_(held, X, decay=0.9, weight=0.3)
    assert held.data_ptr() == place
    torch.testing.assert_close(unpacked(held, size), 0.9 * S + 0.3 * X @ X.mT, rtol=1e-12, atol=1e-12)


def test_panels_are_views():
    held = packed(symmetric(PANEL + 3))
    for _, panel in panels(held, PANEL + 3):
        panel.zero_()
    assert not held.any()


@pytest.mark.parametrize("size", [128, 512, 1000])
def test_little_more_than_half_is_held(size):
    assert packed_size(size) <= size * (size + PANEL) / 2
