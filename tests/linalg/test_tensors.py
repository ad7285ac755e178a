"""Operators on the axes of tensors, and tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import curvature as cv
from curvature.linalg.functions import eigenvalues, power
from curvature.linalg.known import known_diagonal, known_trace
from curvature.linalg.operator import LinearOperator
from curvature.linalg.tensors import TensorKronecker, TensorSpectral, Tiled, Tiling

SHAPES = [(3, 4), (5, 1, 2), (2, 3, 4), (4,)]


def positive(stack: int, size: int, seed: int) -> Tensor:
    A = torch.randn(stack, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A @ A.mT + torch.eye(size, dtype=torch.float64)


def kronecker(shape: tuple[int, ...], stack: int = 2, idle: int | None = None) -> TensorKronecker:
    factors = [None if axis == idle else positive(stack, size, axis) for axis, size in enumerate(shape)]
    return TensorKronecker(factors, shape, psd=True)


def by_hand(A: TensorKronecker) -> Tensor:
    """A block of `torch.kron` for each of the stack."""
    blocks = []
    for i in range(A.stack):
        block = torch.ones(1, 1, dtype=torch.float64)
        for factor, size in zip(A.factors, A.sizes, strict=True):
            block = torch.kron(block, torch.eye(size, dtype=torch.float64) if factor is None else factor[i])
        blocks.append(block)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("idle", [None, 0])
def test_a_stack_of_products_of_factors_is_the_block_diagonal_of_krons(shape, idle):
    if idle is not None and len(shape) == 1:
        pytest.skip("no factor is left")
    A = kronecker(shape, idle=idle)
    torch.testing.assert_close(A.dense(), by_hand(A), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.spectral.dense(), by_hand(A), rtol=1e-11, atol=1e-11)
    rows = torch.randn(3, A.shape[0], dtype=torch.float64)
    torch.testing.assert_close(A.apply(rows), torch.cat([A.apply(row[None]) for row in rows]), rtol=1e-12, atol=1e-12)


def tiled(shape: tuple[int, ...], longest: int, stack: int = 2, whole: frozenset[int] = frozenset()) -> Tiled:
    tiling = Tiling(shape, longest, whole)
    count = [stack * torch.tensor([c for _, c, _ in region]).prod().item() for region in tiling.regions]
    parts = [kronecker(tiling.sizes(region), count[i]) for i, region in enumerate(tiling.regions)]
    return Tiled(parts, tiling)


@pytest.mark.parametrize("whole", [frozenset(), frozenset({0})])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 4), (7,)])
def test_tiles_are_as_equal_as_can_be_and_cover_every_entry_once(shape, whole):
    tiling = Tiling(shape, 3, whole)
    X = torch.arange(2.0 * torch.Size(shape).numel()).view(2, *shape)
    pieces = tiling.cut(X)
    for axis in range(len(shape)):
        sizes = {tiling.sizes(region)[axis] for region in tiling.regions}
        assert sizes == {shape[axis]} if axis in whole else max(sizes) <= 3 and max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([p.flatten() for p in pieces]).tolist()) == X.flatten().tolist()
    assert torch.equal(tiling.joined(pieces, 2), X)


def test_the_matrix_on_tiles_is_zero_between_them():
    A = tiled((5, 4), 3, stack=1)
    dense, label = A.dense(), torch.empty(5, 4)
    for number, piece in enumerate(A.tiling.regions):
        (r, rows, h), (c, columns, w) = piece
        for i in range(rows):
            for j in range(columns):
                label[r + i * h : r + i * h + h, c + j * w : c + j * w + w] = 100 * number + 10 * i + j
    same = label.view(-1, 1) == label.view(1, -1)
    assert torch.equal(dense != 0, same)


@pytest.mark.parametrize(
    "A",
    [kronecker((2, 3, 2)), kronecker((3, 4), idle=1), tiled((5, 4), 3), kronecker((3, 2)).spectral],
    ids=lambda A: type(A).__name__,
)
def test_their_structure_tells_traces_diagonals_eigenvalues_and_powers(A: LinearOperator):
    dense = A.dense()
    torch.testing.assert_close(known_trace(A), dense.trace(), rtol=1e-12, atol=0)
    torch.testing.assert_close(known_diagonal(A), dense.diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(eigenvalues(A), torch.linalg.eigvalsh(dense), rtol=1e-10, atol=1e-12)
    root, eye = power(A, -0.5, damping=0.5).dense(), torch.eye(len(dense), dtype=torch.float64)
    torch.testing.assert_close(root @ (dense + 0.5 * eye) @ root, eye, rtol=0, atol=1e-10)
    assert A.psd and cv.trace(A).value == known_trace(A)


def test_factors_have_to_fit():
    with pytest.raises(TypeError, match=r"stacks of as many square matrices for axes of \(2, 3\)"):
        TensorKronecker([torch.eye(2)[None], torch.eye(4)[None]], (2, 3))


def test_psd_is_looked_up_where_it_is_not_given():
    eye = torch.eye(2)[None]
    assert TensorSpectral(torch.ones(1, 2, 2), (eye, None)).psd
    assert not TensorSpectral(-torch.ones(1, 2, 2), (eye, None)).psd
