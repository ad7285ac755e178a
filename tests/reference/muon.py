"""Muon from its formulas: a matrix at a time, and the iteration on the matrix itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonalised(
    B: Tensor, steps: int, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
) -> Tensor:
    a, b, c = coefficients
    X = B if B.shape[0] <= B.shape[1] else B.T
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X if B.shape[0] <= B.shape[1] else X.T


def steps(
    start: Tensor, grads: list[Tensor], *, lr: float, beta: float, decay: float, nesterov: bool, match: str, count: int
) -> list[Tensor]:
    """Where a parameter is after each step."""
    w, m, path = start.clone(), torch.zeros_like(start), []
    rows, columns = start.shape[0], math.prod(start.shape[1:])
    scale = {"rms": 0.2 * max(rows, columns) ** 0.5, "spectral": (rows / columns) ** 0.5, "none": 1.0}[match]
    for g in grads:
        m = beta * m + (1 - beta) * g
        ahead = beta * m + (1 - beta) * g if nesterov else m
        O = orthogonalised(ahead.reshape(rows, columns), count).view_as(w)
        w = (1 - lr * decay) * w - lr * scale * O
        path.append(w)
    return path
