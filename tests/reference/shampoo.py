"""Shampoo as in its formulas: a loop over parameters and axes, Kronecker products written out, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_gram(G: Tensor, axis: int) -> Tensor:
    """The sum over all other places of the products of two entries."""
    letters = "abcdef"[: G.ndim]
    other = letters.replace(letters[axis], "z")
    return torch.einsum(f"{letters},{other}->{letters[axis]}z", G, G)


def inverse_power(S: Tensor, p: float, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag((values + eps * values.max()) ** -p) @ vectors.T


def shampoo(
    starts: list[Tensor],
    gradients: list[list[Tensor]],
    *,
    shapes: list[tuple[int, ...]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    every: int,
    exponent: float | None = None,
    graft: bool = True,
) -> list[Tensor]:
    """Where parameters come to; `gradients[t][i]` is that of parameter i, read as a tensor of shape `shapes[i]`."""
    ends = []
    for i, start in enumerate(starts):
        w, shape = start.clone().reshape(-1), shapes[i]
        k = len(shape)
        p = 1 / (2 * k) if exponent is None else exponent
        sums = [torch.zeros(d, d, dtype=torch.float64) for d in shape]
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        P = torch.zeros(0)
        for t in range(1, len(gradients) + 1):
            g = gradients[t - 1][i].reshape(-1)
            for axis in range(k):
                fresh = axis_gram(g.reshape(shape), axis)
                sums[axis] = sums[axis] + fresh if betas[1] == 1 else betas[1] * sums[axis] + (1 - betas[1]) * fresh
            if t % every == 1 or every == 1:
                moments = sums if betas[1] == 1 else [S / (1 - betas[1] ** t) for S in sums]
                P = moments[0].trace() ** (k * p - 0.5) * torch.ones(1, 1, dtype=torch.float64)
                for S in moments:
                    P = torch.kron(P, inverse_power(S, p, eps))
            m = betas[0] * m + (1 - betas[0]) * g
            mean = m / (1 - betas[0] ** t)
            update = P @ mean
            if graft:
                v = 0.999 * v + 0.001 * g**2
                adam = mean / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
                update = update * adam.norm() / update.norm()
            w = w - lr * weight_decay * w
            w = w - lr * update
        ends.append(w.reshape(start.shape))
    return ends
