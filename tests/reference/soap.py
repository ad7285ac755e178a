"""SOAP and KL-Shampoo as in their formulas: a loop over parameters and axes, float64."""

from __future__ import annotations

import torch
from reference.shampoo import axis_gram
from torch import Tensor


def along(X: Tensor, M: Tensor, axis: int) -> Tensor:
    """The sum over j of M[i, j] X[..., j, ...]."""
    return torch.tensordot(X, M, dims=([axis], [1])).movedim(-1, axis)


def rotate(X: Tensor, bases: list[Tensor]) -> Tensor:
    for axis, Q in enumerate(bases):
        X = along(X, Q.T, axis)
    return X


def rotate_back(X: Tensor, bases: list[Tensor]) -> Tensor:
    for axis, Q in enumerate(bases):
        X = along(X, Q, axis)
    return X


def descending(S: Tensor) -> Tensor:
    return torch.linalg.eigh(S).eigenvectors.flip(1)


def soap(
    starts: list[Tensor],
    gradients: list[list[Tensor]],
    *,
    shapes: list[tuple[int, ...]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    every: int,
    after: bool,
    idle: int | None = None,
) -> list[Tensor]:
    """Where parameters come to; moments live in the rotated basis, as in the code of the authors.

    With `after` the statistics and bases are updated once a step has been taken, as there, but for the first gradient,
    which is not left out. The axis `idle` is not rotated.
    """
    ends = []
    for i, start in enumerate(starts):
        w, shape = start.clone().reshape(shapes[i]), shapes[i]
        grams = [torch.zeros(d, d, dtype=torch.float64) for d in shape]
        bases = [torch.eye(d, dtype=torch.float64) for d in shape]
        m, v = torch.zeros_like(w), torch.zeros_like(w)

        def observe(g: Tensor, grams=grams) -> None:
            for axis in range(g.ndim):
                grams[axis] = betas[1] * grams[axis] + (1 - betas[1]) * axis_gram(g, axis)

        def turn(m: Tensor, v: Tensor, grams=grams, bases=bases) -> tuple[Tensor, Tensor]:
            m = rotate_back(m, bases)
            for axis in range(m.ndim):
                if axis != idle:
                    worth = torch.diag(bases[axis].T @ grams[axis] @ bases[axis])
                    order = torch.argsort(worth, descending=True)
                    v = v.index_select(axis, order)
                    bases[axis] = torch.linalg.qr(grams[axis] @ bases[axis][:, order]).Q
            return rotate(m, bases), v

        for t in range(1, len(gradients) + 1):
            g = gradients[t - 1][i].reshape(shape)
            due = t % every == 1 or every == 1
            if t == 1:
                observe(g)
                bases[:] = [
                    b if a == idle else descending(S) for a, (b, S) in enumerate(zip(bases, grams, strict=True))
                ]
            elif not after:
                observe(g)
                m, v = turn(m, v) if due else (m, v)
            rotated = rotate(g, bases)
            m = betas[0] * m + (1 - betas[0]) * rotated
            v = betas[1] * v + (1 - betas[1]) * rotated**2
            update = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
            w = w - lr * weight_decay * w
            w = w - lr * rotate_back(update, bases)
            if after and t > 1:
                observe(g)
            if after and t % every == 0:
                m, v = turn(m, v)
        ends.append(w.reshape(start.shape))
    return ends


def kl_shampoo(
    starts: list[Tensor],
    gradients: list[list[Tensor]],
    *,
    shapes: list[tuple[int, ...]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    every: int,
) -> list[Tensor]:
    """Where parameters come to; covariances are those of the original coordinates."""
    ends = []
    for i, start in enumerate(starts):
        w, shape = start.clone().reshape(shapes[i]), shapes[i]
        k, n, m = len(shape), start.numel(), torch.zeros_like(start).reshape(shapes[i])
        size = gradients[0][i].square().mean() ** (1 / k)
        covariances = [size * torch.eye(d, dtype=torch.float64) for d in shape]
        bases = [torch.eye(d, dtype=torch.float64) for d in shape]

        def inverse_roots(covariances=covariances, bases=bases) -> list[Tensor]:
            roots = []
            for S, Q in zip(covariances, bases, strict=True):
                values = torch.diag(Q.T @ S @ Q)
                values = torch.clamp(values, min=eps * float(values.max()))
                roots.append(Q @ torch.diag(values**-0.5) @ Q.T)
            return roots

        for t in range(1, len(gradients) + 1):
            g, roots = gradients[t - 1][i].reshape(shape), inverse_roots()
            for axis in range(k):
                white = g
                for other in range(k):
                    white = white if other == axis else along(white, roots[other], other)
                fresh = axis_gram(white, axis) * shape[axis] / n
                covariances[axis] = betas[1] * covariances[axis] + (1 - betas[1]) * fresh
            if t == 1:
                bases[:] = [descending(S) for S in covariances]
            elif t % every == 1 or every == 1:
                for axis, (S, Q) in enumerate(zip(covariances, bases, strict=True)):
                    order = torch.argsort(torch.diag(Q.T @ S @ Q), descending=True)
                    bases[axis] = torch.linalg.qr(S @ Q[:, order]).Q
            m = betas[0] * m + (1 - betas[0]) * g
            update = m / (1 - betas[0] ** t)
            for axis, root in enumerate(inverse_roots()):
                update = along(update, root, axis)
            w = w - lr * weight_decay * w
            w = w - lr * update
        ends.append(w.reshape(start.shape))
    return ends
