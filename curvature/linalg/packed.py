"""Stacks of symmetric matrices as panels of their upper triangles, one after another: about half of the memory.

A panel is 64 rows of a matrix, from the diagonal on. Its first square is held whole, so that a product is added to a
panel at full speed, and a symmetric product of many rows takes little more than half of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

PANEL = 64  # with fewer rows products are no longer made at full speed


def packed_size(size: int) -> int:
    """The numbers that are held of a matrix with `size` rows."""
    return sum(min(PANEL, size - start) * (size - start) for start in range(0, size, PANEL))


def panels(S: Float[Tensor, "b n"], size: int) -> Iterator[tuple[slice, Float[Tensor, "b rows rest"]]]:
    """Where the rows of each panel are, and a view of it."""
    taken = 0
    for start in range(0, size, PANEL):
        rows, rest = min(PANEL, size - start), size - start
        yield slice(start, start + rows), S[:, taken : taken + rows * rest].unflatten(1, (rows, rest))
        taken += rows * rest


def packed(S: Float[Tensor, "b d d"]) -> Float[Tensor, "b n"]:
    """What is held of symmetric matrices."""
    size = S.shape[-1]
    return torch.cat([S[:, i : i + PANEL, i:].flatten(1) for i in range(0, size, PANEL)], 1)


def unpacked(S: Float[Tensor, "b n"], size: int) -> Float[Tensor, "b d d"]:
    """The matrices of which this is held."""
    whole = S.new_empty(len(S), size, size)
    for rows, panel in panels(S, size):
        whole[:, rows, rows.start :] = panel
        whole[:, rows.stop :, rows] = panel[:, :, panel.shape[1] :].mT
    return whole


def diagonals(S: Float[Tensor, "b n"], size: int) -> Float[Tensor, "b d"]:
    """The diagonals of the matrices of which this is held."""
    return torch.cat([panel.diagonal(dim1=1, dim2=2) for _, panel in panels(S, size)], 1)


def add_gram_(S: Float[Tensor, "b n"], X: Float[Tensor, "b d rest"], *, decay: float, weight: float) -> None:
    """S <- decay S + weight X X^T for the matrices of which S is held."""
    for rows, panel in panels(S, X.shape[1]):
        panel.baddbmm_(X[:, rows], X[:, rows.start :].mT, beta=decay, alpha=weight)
