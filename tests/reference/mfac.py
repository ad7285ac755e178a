"""M-FAC and EFCP with the dense matrix, in float64: from the formulas, one gradient and one entry after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Whole:
    """Gradients as they are."""

    def keep(self, g: Tensor) -> Tensor:
        return g


@dataclass
class Largest:
    """The `count` largest entries of the error and the gradient; of equal ones the first."""

    count: int
    error: Tensor | None = None

    def keep(self, g: Tensor) -> Tensor:
        a = g if self.error is None else self.error + g
        order = sorted(range(len(a)), key=lambda i: (-abs(float(a[i])), i))
        c = torch.zeros_like(a)
        for i in order[: self.count]:
            c[i] = a[i]
        self.error = a - c
        return c


@dataclass
class Projected:
    """Each matrix by its projection on the range of A Q^T, Q the rows of the step before; `starts` are the first."""

    shapes: list[tuple[int, ...]]
    starts: dict[int, Tensor]
    error: Tensor | None = None

    def keep(self, g: Tensor) -> Tensor:
        a = g if self.error is None else self.error + g
        kept, place = [], 0
        for index, shape in enumerate(self.shapes):
            size = int(torch.tensor(shape).prod())
            A = a[place : place + size]
            place += size
            if index in self.starts:
                matrix = A.view(shape[0], -1)
                left, values, _ = torch.linalg.svd(matrix @ self.starts[index].T, full_matrices=False)
                basis = left[:, values > 1e-12 * values[0]]
                self.starts[index] = basis.T @ matrix
                A = (basis @ self.starts[index]).flatten()
            kept.append(A)
        c = torch.cat(kept)
        self.error = a - c
        return c


@dataclass
class DenseMFAC:
    """theta <- (1 - lr decay) theta - lr u, with u made of (damping I + mean of c c^T)^-1 c.

    `momentum` is of the gradients before ("before"), or an average ("ema") or sum ("sum") of directions. With `graft`
    u is as long as the direction of Adam.
    """

    keeper: Whole | Largest | Projected
    window: int
    damping: float
    lr: float
    decay: float = 0.0
    beta: float = 0.0
    momentum: str = "ema"
    graft: bool = False
    rows: list[Tensor] = field(default_factory=list)
    t: int = 0

    def step(self, theta: Tensor, g: Tensor) -> Tensor:
        if self.t == 0:
            self.v, self.square = torch.zeros_like(g), torch.zeros_like(g)
        self.t += 1
        c = self.keeper.keep(g)
        self.rows = [*self.rows, c][-self.window :]
        F = self.damping * torch.eye(len(g), dtype=g.dtype)
        for row in self.rows:
            F += torch.outer(row, row) / len(self.rows)
        if self.momentum == "before":
            self.v = self.beta * self.v + (1 - self.beta) * g
            adam = x = self.v / (1 - self.beta**self.t)
        else:
            adam, x = g, c
        u = torch.linalg.solve(F, x)
        if self.momentum == "ema":
            u = self.v = self.beta * self.v + (1 - self.beta) * u
        if self.momentum == "sum":
            u = self.v = self.beta * self.v + u
        if self.graft:
            self.square = 0.999 * self.square + 0.001 * g * g
            other = adam / ((self.square / (1 - 0.999**self.t)).sqrt() + 1e-8)
            u = u * other.norm() / u.norm()
        return (1 - self.lr * self.decay) * theta - self.lr * u
