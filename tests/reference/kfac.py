"""K-FAC and EKFAC of networks of linear layers, in float64: from the formulas, one example and one residual after
another, with the whole matrix of each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = list[Tensor]  # [W | b] of each layer, (out, in + 1)


def forward(weights: Weights, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into each layer, with a 1, and what comes out: tanh in between."""
    inputs, outputs = [], []
    for W in weights:
        a = torch.cat([x, torch.ones(1, dtype=torch.float64)])
        s = W @ a
        inputs.append(a)
        outputs.append(s)
        x = torch.tanh(s)
    return inputs, outputs


def roots(kind: str, f: Tensor, target: Tensor) -> list[Tensor]:
    """r with sum r r^T = the Hessian of the loss of an example in its outputs f, or at the target instead ("empirical").

    The mean of m squared errors is 1/m of -log p, p the normal density of variance 1/2 around f: the Hessian is 2/m I,
    and its estimate at the target 1/m of the square of the gradient of log p.
    """
    if kind == "squares, type-2":
        return list((2 / len(f)) ** 0.5 * torch.eye(len(f), dtype=torch.float64))
    if kind == "squares, empirical":
        return [2 / len(f) ** 0.5 * (f - target)]
    p = torch.softmax(f, 0)
    unit = torch.eye(len(f), dtype=torch.float64)
    if kind == "classes, type-2":  # the mean over labels of (p - e)(p - e)^T is diag(p) - p p^T
        return [p[label].sqrt() * (p - unit[label]) for label in range(len(f))]
    return [p - unit[int(target)]]


def gradients(weights: Weights, x: Tensor, target: Tensor, kind: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each residual: the inputs of all layers and the gradients of what comes out of them."""
    found = []
    inputs, outputs = forward(weights, x)
    for r in roots(kind, outputs[-1], target):
        g, back = r, []
        for layer in reversed(range(len(weights))):
            back.insert(0, g)
            if layer:
                g = (weights[layer][:, :-1].T @ g) * (1 - torch.tanh(outputs[layer - 1]) ** 2)
        found.append((inputs, back))
    return found


@dataclass
class DenseKFAC:
    """W <- (1 - lr wd) W - lr (F + damping I)^-1 m with F = G ⊗ A, or with the second moments along the eigenvectors
    of G and A in place of the eigenvalues where `corrected`.

    With `factored`, F + damping I is (G + sqrt(damping) / pi I) ⊗ (A + pi sqrt(damping) I) with
    pi = sqrt((tr A / dim A) / (tr G / dim G)) (Martens & Grosse 2015, section 6.3).
    """

    kind: str
    lr: float
    damping: float
    beta: float
    momentum: float
    weight_decay: float
    refresh: int
    corrected: bool
    factored: bool = False
    count: int = 0
    G: list[Tensor] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    inverted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)
    average: list[Tensor] = field(default_factory=list)

    def step(self, weights: Weights, X: Tensor, Y: Tensor, grads: Weights) -> Weights:
        self.count += 1
        rho = min(1 - 1 / self.count, self.beta)
        seen = [pair for x, y in zip(X, Y, strict=True) for pair in gradients(weights, x, y, self.kind)]

        def mean(tensors: list[Tensor]) -> Tensor:
            return sum(tensors, torch.zeros(())) / len(X)

        layers = range(len(weights))
        inputs = [forward(weights, x)[0] for x in X]
        A = [mean([a[i].outer(a[i]) for a in inputs]) for i in layers]
        G = [mean([g[i].outer(g[i]) for _, g in seen]) for i in layers]
        self.A = [rho * old + (1 - rho) * new for old, new in zip(self.A or A, A, strict=True)]
        self.G = [rho * old + (1 - rho) * new for old, new in zip(self.G or G, G, strict=True)]
        if (self.count - 1) % self.refresh == 0 or self.count in (1, 2, 4, 8, 16):
            before, self.bases, self.values = self.bases, [], []
            self.inverted = [(G.clone(), A.clone()) for G, A in zip(self.G, self.A, strict=True)]
            for i in layers:
                (left, U), (right, V) = torch.linalg.eigh(self.G[i]), torch.linalg.eigh(self.A[i])
                self.bases.append(torch.kron(U, V))
                self.values.append(torch.kron(left, right))
                if self.moments:
                    turned = self.bases[i].T @ before[i] @ torch.diag(self.moments[i]) @ before[i].T @ self.bases[i]
                    self.moments[i] = turned.diagonal()
        if self.corrected:
            new = [mean([(self.bases[i].T @ g[i].outer(a[i]).flatten()) ** 2 for a, g in seen]) for i in layers]
            self.moments = [rho * old + (1 - rho) * m for old, m in zip(self.moments or new, new, strict=True)]
        self.average = [
            self.momentum * old + (1 - self.momentum) * g
            for old, g in zip(self.average or [torch.zeros_like(g) for g in grads], grads, strict=True)
        ]
        moved = []
        for i, W in enumerate(weights):
            m = self.average[i].flatten() / (1 - self.momentum**self.count)
            values = self.moments[i] if self.corrected else self.values[i]
            F = self.bases[i] @ torch.diag(values) @ self.bases[i].T + self.damping * torch.eye(len(m)).double()
            if self.factored:
                G, A = self.inverted[i]
                pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
                G = G + self.damping**0.5 / pi * torch.eye(len(G)).double()
                F = torch.kron(G, A + pi * self.damping**0.5 * torch.eye(len(A)).double())
            d = torch.linalg.solve(F, m)
            moved.append(W * (1 - self.lr * self.weight_decay) - self.lr * d.view_as(W))
        return moved
