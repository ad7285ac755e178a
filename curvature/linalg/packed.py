"""Stacks of symmetric matrices in about half of the memory: as panels or as triangles.

A panel is 64 rows of the upper triangle of a matrix, from the diagonal on. Its first square is held whole, so that a
product is added to a panel at full speed, and a symmetric product of many rows takes little more than half of the
operations. Triangles are the least that can be held, for what is made anew each time.
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


def triangles(S: Float[Tensor, "b d d"]) -> Float[Tensor, "b n"]:
    """The upper triangles, row by row."""
    rows, columns = torch.triu_indices(*S.shape[1:], device=S.device)
    return S.flatten(1).index_select(1, rows * S.shape[-1] + columns)


def from_triangles(T: Float[Tensor, "b n"], size: int) -> Float[Tensor, "b d d"]:
    """The symmetric matrices of which these are the upper triangles."""
    place = torch.arange(size, device=T.device)
    row, column = place.unsqueeze(1).minimum(place), place.unsqueeze(1).maximum(place)
    begins = row * (2 * size - row - 1) // 2
    return T.index_select(1, (begins + column).flatten()).view(-1, size, size)
