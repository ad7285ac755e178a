"""PSGD from its formulas, a parameter at a time and with dense matrices; random numbers are drawn in the rule's order."""

from __future__ import annotations

import torch
from torch import Tensor

I = torch.eye


def length_of(A: Tensor, generator: torch.Generator) -> Tensor:
    """The estimate of |A|: 32 random vectors, turned to the longest row and added to it, times A four times."""
    scale = A.abs().max()
    if scale == 0:
        torch.randn(32, len(A), generator=generator, dtype=A.dtype)
        return scale
    A = A / scale
    longest = A[A.norm(dim=1).argmax()]
    best = torch.zeros((), dtype=A.dtype)
    for z in torch.randn(32, len(A), generator=generator, dtype=A.dtype):
        x = longest + torch.sign(z @ longest) * z
        for _ in range(2):
            x = A.T @ x
            x = A.T @ (x / x.norm())
        best = max(best, x.norm())
    return best * scale


def finished(u: Tensor) -> Tensor:
    u = u * min(1.0, float(2 / u.square().mean().sqrt()))
    return u.clamp(-10, 10)


class Kronecker:
    """Of one parameter; `dense` says which sides have a full factor."""

    def __init__(
        self, matrix: tuple[int, int], dense: tuple[bool, bool], *, rate: float = 0.1, eps: float = 1e-9
    ) -> None:
        self.matrix, self.dense, self.rate, self.eps = matrix, dense, rate, eps
        self.Q: list[Tensor] | None = None
        self.L = [0.0, 0.0]

    @property
    def P(self) -> Tensor:
        assert self.Q is not None
        return torch.kron(self.Q[0].T @ self.Q[0], self.Q[1].T @ self.Q[1])

    def fit(self, h: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        numel = h.numel()
        if self.Q is None:
            scale = (h.pow(4).mean() + self.eps**4) ** (-1 / 8)
            self.Q = [scale**0.5 * I(d, dtype=h.dtype) for d in self.matrix]
        PhhP = torch.outer(self.P @ h.flatten(), self.P @ h.flatten()) + self.eps**2 * self.P @ self.P
        PhhP = PhhP.view(*self.matrix, *self.matrix)
        T = [torch.einsum("ikjk->ij", PhhP), torch.einsum("kikj->ij", PhhP)]  # partial traces
        for j, d in enumerate(self.matrix):
            t1, t2 = T[j], numel / d * I(d, dtype=h.dtype)
            if not self.dense[j]:
                t1 = t1.diag().diag()
            ell = length_of(t1 + t2, generator) if self.dense[j] else (t1 + t2).max()
            self.L[j] = float(max(0.9 * self.L[j] + 0.1 * ell, ell))
            left = I(d, dtype=h.dtype) - self.rate / self.L[j] / 2 * (t1 - t2)
            self.Q[j] = left @ self.Q[j] @ left
        sizes = [q.abs().max() for q in self.Q]
        self.Q = [q * (sizes[0] * sizes[1]).sqrt() / s for q, s in zip(self.Q, sizes, strict=True)]


class LowRank:
    """Of all parameters, one after another."""

    def __init__(self, n: int, rank: int, *, rate: float = 0.1, eps: float = 1e-9) -> None:
        self.rate, self.eps = rate, eps
        generator = torch.Generator().manual_seed(0)
        start = torch.stack([torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2 * rank)]).T
        self.U, self.V = (X * (0.1**0.5 / X.norm()) for X in (start[:, :rank], start[:, rank:]))
        self.d: Tensor | None = None
        self.L = [0.0, 0.0, 0.0]

    @property
    def Q(self) -> Tensor:
        assert self.d is not None
        return (I(len(self.d), dtype=self.d.dtype) + self.U @ self.V.T) @ self.d.diag()

    @property
    def P(self) -> Tensor:
        return self.Q.T @ self.Q

    def fit(self, h: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        if self.d is None:
            self.d = (h.pow(4).mean() + self.eps**4) ** (-1 / 8) * torch.ones_like(h)
        h = h + (self.eps + torch.finfo(h.dtype).eps * h.abs()) * torch.randn(
            len(h), generator=generator, dtype=h.dtype
        )
        v = torch.randn(len(h), generator=generator, dtype=h.dtype)
        Q, P = self.Q, self.P
        a, b = Q @ h, torch.linalg.inv(Q).T @ v
        Ph, Pv = P @ h, torch.linalg.inv(P) @ v
        U, V, one = self.U, self.V, I(self.U.shape[1], dtype=h.dtype)
        self.bound(0, (h * Ph).abs().max() + (v * Pv).abs().max())
        self.d = self.d - self.rate / self.L[0] * (h * Ph - v * Pv) * self.d
        difference = torch.outer(a, a) - torch.outer(b, b)
        if seed % 2 == 0:
            self.bound(1, a.norm() * (V @ V.T @ a).norm() + b.norm() * (V @ V.T @ b).norm())
            self.U = U - self.rate / self.L[1] * difference @ V @ (one + V.T @ U)
        else:
            self.bound(2, a.norm() * (U @ U.T @ a).norm() + b.norm() * (U @ U.T @ b).norm())
            self.V = V - self.rate / self.L[2] * (I(len(h), dtype=h.dtype) + V @ U.T) @ difference @ U
        ratio = (self.U.norm() / self.V.norm()).sqrt()
        self.U, self.V = self.U / ratio, self.V * ratio

    def bound(self, i: int, ell: Tensor) -> None:
        self.L[i] = float(max(0.9 * self.L[i] + 0.1 * ell, ell))


def steps(
    start: Tensor,
    grads: list[Tensor],
    fit: Kronecker | LowRank,
    seeds: list[int],
    *,
    lr: float,
    beta: float,
    decay: float,
    of: str,
) -> list[Tensor]:
    """Where a parameter is after each step; it is a vector of all of them for LowRank."""
    w, m, path = start.clone(), torch.zeros_like(start), []
    for t, (g, seed) in enumerate(zip(grads, seeds, strict=True), start=1):
        m = beta * m + (1 - beta) * g
        average = m / (1 - beta**t)
        fit.fit(average if of == "momentum" else g, seed)
        u = finished((fit.P @ average.flatten()).view_as(w))
        w = (1 - lr * decay) * w - lr * u
        path.append(w)
    return path
