"""The table of optimizers: how each is made, what it refuses, and the network and data that all are tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import curvature as cv
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.rules.muon import Muon

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class OptimizerCase:
    """A class with the arguments that it is tried with; `invalid` are arguments that it refuses, with the words.

    `lr` is one at which `Awkward` is learnt. `skips` names tests of the conformance table that do not apply, each with
    the reason.
    """

    kind: Callable[..., PreconditionedOptimizer]
    lr: float
    kwargs: dict[str, Any] = field(default_factory=dict)
    invalid: tuple[tuple[dict[str, Any], str], ...] = ()
    objective: bool = False
    name: str = ""
    skips: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or self.kind.__name__  # pyright: ignore[reportAttributeAccessIssue]

    def make(self, params: Any, **more: Any) -> PreconditionedOptimizer:
        return self.kind(params, **{"lr": self.lr, **self.kwargs, **more})

    def step(self, net: nn.Module, optimizer: PreconditionedOptimizer, batch: Batch) -> float:
        """One step on a batch, as a training loop would make it; the loss before."""
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        if self.objective:
            optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [batch]))
        else:
            optimizer.step()
        return loss.item()

    def train(self, net: nn.Module, optimizer: PreconditionedOptimizer, batches: Iterable[Batch]) -> list[float]:
        return [self.step(net, optimizer, batch) for batch in batches]


CASES = [
    OptimizerCase(
        Muon, 2e-2, invalid=(({"momentum": 1.0}, "less than 1, but got 1.0"), ({"lr": -1.0}, "lr is 0 or more"))
    ),
]


class Awkward(nn.Module):
    """Parameters of all shapes: an embedding, a convolution, normalisations, a tied matrix, a vector and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv2d(3, 4, 2)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.head = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.first(self.embed(tokens).flatten(1))).tanh()
        x = self.conv(x.view(-1, 3, 2, 2)).flatten(1) + self.shift
        x = self.third(self.second(x.tanh()).tanh()).tanh()
        return self.head(x) * self.scale


def awkward(dtype: torch.dtype = torch.float64, seed: int = 0) -> Awkward:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Awkward().to(dtype)


def batches(count: int, size: int = 16, seed: int = 0) -> list[Batch]:
    """Pairs of tokens, whose class is the remainder of their sum by 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 7, (size, 2), generator=generator) for _ in range(count)]
    return [(x, x.sum(1) % 3) for x in tokens]
