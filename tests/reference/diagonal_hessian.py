"""Sophia and AdaHessian by the dense Hessian, in float64: from the formulas, one entry and one label after another.

Random numbers are those that the package draws: signs and labels from generators seeded by optimizer and step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def seed_of(seed: int, step: int) -> int:
    """The seed of a step, the first being 0."""
    return int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(seed + step)))


def signs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8).double() * 2 - 1


def labels(probabilities: Tensor, seed: int) -> list[int]:
    """A class for each row, drawn from it."""
    stream = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
    uniform = torch.rand(len(probabilities), generator=torch.Generator().manual_seed(stream), dtype=torch.float64)
    drawn = []
    for u, row in zip(uniform.tolist(), probabilities.tolist(), strict=True):
        total, label = 0.0, 0
        for label, p in enumerate(row):  # noqa: B007
            total += p
            if u < total:
                break
        drawn.append(label)
    return drawn


def hutchinson(loss: Callable[[Tensor], Tensor], theta: Tensor, seed: int) -> Tensor:
    z = signs(len(theta), seed)
    return z * (torch.autograd.functional.hessian(loss, theta) @ z)


def bartlett(logits: Callable[[Tensor], Tensor], theta: Tensor, seed: int) -> Tensor:
    """B times the squared gradient of the mean of -log p of B sampled labels."""
    leaf = theta.clone().requires_grad_()
    rows = logits(leaf).log_softmax(1)
    drawn = labels(rows.detach().exp(), seed)
    mean = -sum(row[label] for row, label in zip(rows, drawn, strict=True)) / len(rows)
    return len(rows) * torch.autograd.grad(mean, leaf)[0] ** 2


def smoothed(diagonal: Tensor, shapes: list[tuple[int, ...]], run: int | None, sizes: bool) -> Tensor:
    """Each entry as the mean over its kernel or its run, of sizes or of the entries themselves."""
    out, start = diagonal.clone(), 0
    for shape in shapes:
        count = 1
        for length in shape:
            count *= length
        width = run
        if run is None:
            width = 1
            for length in shape[2:]:
                width *= length
        for left in range(start, start + count, width):
            piece = diagonal[left : min(left + width, start + count)]
            out[left : left + len(piece)] = (piece.abs() if sizes else piece).mean()
        start += count
    return out


class Sophia:
    def __init__(self, lr: float, betas: tuple[float, float], rho: float, eps: float, decay: float, every: int):
        self.lr, self.betas, self.rho, self.eps, self.decay, self.every = lr, betas, rho, eps, decay, every
        self.t, self.m, self.h = 0, 0.0, 0.0

    def step(self, theta: Tensor, g: Tensor, estimate: Callable[[int], Tensor]) -> Tensor:
        """`estimate` of a seed is h hat at theta."""
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        if self.t % self.every == 0:
            self.h = self.betas[1] * self.h + (1 - self.betas[1]) * estimate(seed_of(0, self.t))
        self.t += 1
        step = []
        for m, h in zip(self.m.tolist(), self.h.tolist(), strict=True):
            step.append(min(1.0, max(-1.0, m / max(self.rho * h, self.eps))))
        return (1 - self.lr * self.decay) * theta - self.lr * torch.tensor(step, dtype=theta.dtype)


class AdaHessian:
    def __init__(self, lr: float, betas: tuple[float, float], eps: float, power: float, decay: float, every: int):
        self.lr, self.betas, self.eps, self.power, self.decay, self.every = lr, betas, eps, power, decay, every
        self.t, self.seen, self.m, self.v = 0, 0, 0.0, 0.0

    def step(self, theta: Tensor, g: Tensor, estimate: Callable[[int], Tensor]) -> Tensor:
        """`estimate` of a seed is the smoothed diagonal at theta."""
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        if self.t % self.every == 0:
            self.v = self.betas[1] * self.v + (1 - self.betas[1]) * estimate(seed_of(0, self.t)) ** 2
            self.seen += 1
        self.t += 1
        mean = self.m / (1 - self.betas[0] ** self.t)
        root = (self.v / (1 - self.betas[1] ** self.seen)).sqrt()
        return theta - self.lr * (mean / (root**self.power + self.eps) + self.decay * theta)
