"""Damped Newton steps with dense matrices, in float64: from the formulas, one derivative after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]  # of flat parameters


def dense_ggn(outputs: Function, loss: Function, theta: Tensor) -> Tensor:
    """J^T M J, M the Hessian of the mean loss in the outputs."""
    J = torch.autograd.functional.jacobian(outputs, theta).reshape(-1, len(theta))
    f = outputs(theta).detach()
    M = torch.autograd.functional.hessian(loss, f).reshape(f.numel(), f.numel())
    return J.T @ M @ J


def dense_hessian(outputs: Function, loss: Function, theta: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(lambda t: loss(outputs(t)), theta)


@dataclass
class DenseNewton:
    """theta <- (1 - lr wd) theta - lr v / (1 - beta^t), where v averages directions (A + damping I)^-1 g."""

    matrix: Callable[[Function, Function, Tensor], Tensor]
    lr: float
    damping: float
    beta: float
    weight_decay: float
    average: Tensor | None = None
    count: int = 0

    def step(self, theta: Tensor, outputs: Function, loss: Function) -> Tensor:
        g = torch.autograd.functional.jacobian(lambda t: loss(outputs(t)), theta)
        A = self.matrix(outputs, loss, theta)
        d = torch.linalg.solve(A + self.damping * torch.eye(len(theta), dtype=torch.float64), g)
        self.count += 1
        self.average = (1 - self.beta) * d + (0 if self.average is None else self.beta * self.average)
        return theta * (1 - self.lr * self.weight_decay) - self.lr * self.average / (1 - self.beta**self.count)


def conjugate_gradients(A: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """The iterates for A x = b from zero, which is the first."""
    x, r = torch.zeros_like(b), b.clone()
    d, found = r.clone(), [x]
    for _ in range(steps):
        a = (r @ r) / (d @ A @ d)
        x, new = x + a * d, r - a * (A @ d)
        d, r = new + (new @ new) / (r @ r) * d, new
        found.append(x)
    return found
