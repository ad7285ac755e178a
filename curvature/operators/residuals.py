"""Residuals: gradients of the loss in the outputs, whose outer products make up the Fisher matrices.

All kinds are functions of a batch: its number in the pass, the outputs and the targets. They give tensors r shaped like
the outputs such that the sum over them of r r^T, within each term of the data, is the map M of a matrix J^T M J.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curvature.objective.losses import Likelihood, lacking
from curvature.objective.objective import Objective

FisherKind = Literal["type-2", "sampled", "empirical"]


class Residuals(Protocol):
    """The residuals of a batch, given its number, the outputs and the targets."""

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]: ...


def residuals_of(objective: Objective, name: str, kind: FisherKind, *, samples: int = 1, seed: int = 0) -> Residuals:
    """Those of a Fisher matrix called `name`: exact ("type-2"), at `samples` targets drawn from the model, at the real
    ones ("empirical")."""
    loss = likelihood(objective, name)
    match kind:
        case "type-2":
            return Expected(loss)
        case "sampled":
            return Sampled(loss, name, samples, seed)
        case "empirical":
            return Observed(loss)
        case _:
            raise ValueError(f"fisher is 'type-2', 'sampled' or 'empirical', but got {kind!r}.")


def likelihood(objective: Objective, name: str) -> Likelihood:
    """The loss, which must be a negative log-likelihood for a matrix of that name."""
    loss = objective.loss
    if "sample" in loss.offers and isinstance(loss, Likelihood):
        return loss
    raise lacking(loss, name)


@dataclass(frozen=True)
class Expected:
    """All that may be drawn, by their probability: M is the Hessian of the loss, or its expectation."""

    loss: Likelihood

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        return self.loss.root(outputs, targets)


@dataclass(frozen=True)
class Observed:
    """The one at the real targets."""

    loss: Likelihood

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        yield self.loss.residual(outputs, targets)


class Sampled:
    """Those at `samples` targets drawn from the model, in the order of the examples, however they are batched."""

    def __init__(self, loss: Likelihood, name: str, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"A sampled {name} needs at least one sample, but got samples={samples}.")
        self.loss, self.streams = loss, Streams(samples, seed)

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        streams = self.streams.at(index)
        for stream in streams:
            uniform = partial(_uniform, stream, outputs.device)
            yield self.loss.sample(outputs, targets, uniform) / len(streams) ** 0.5


class Signed:
    """Other residuals with a random sign for each term, so that products of different terms average to zero.

    Residuals of all terms are pulled back at once, and those of one example (its tokens) meet in the layers.
    """

    def __init__(self, residuals: Residuals, loss: Likelihood, seed: int) -> None:
        self.residuals, self.loss, self.streams = residuals, loss, Streams(1, seed)

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        (stream,) = self.streams.at(index)
        drawn = _uniform(stream, outputs.device, _terms(self.loss, outputs, targets))
        signs = (drawn < 0.5).to(outputs.dtype) * 2 - 1
        return (signs * residual for residual in self.residuals(index, outputs, targets))


@dataclass(frozen=True)
class Apart:
    """Other residuals, of one term of each example at a time: as many more as an example has terms."""

    residuals: Residuals
    loss: Likelihood

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        shape = (1, *_terms(self.loss, outputs, targets)[1:])
        for residual in self.residuals(index, outputs, targets):
            for place in range(math.prod(shape)):
                alone = torch.zeros(math.prod(shape), dtype=outputs.dtype, device=outputs.device)
                alone[place] = 1
                yield residual * alone.view(shape)


class Streams:
    """Random number generators that run through the examples of a pass, and begin anew with each pass."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.generators: list[torch.Generator] = []

    def at(self, index: int) -> list[torch.Generator]:
        """The generators, for the batch of that number."""
        if index == 0:
            seeds = torch.Generator().manual_seed(self.seed)
            draws = torch.randint(2**62, (self.count,), generator=seeds).tolist()
            self.generators = [torch.Generator().manual_seed(draw) for draw in draws]
        return self.generators


def _terms(loss: Likelihood, outputs: Tensor, targets: Any) -> tuple[int, ...]:
    """The shape of the outputs with 1 for the axes within a term."""
    within = {axis % outputs.ndim for axis in loss.event(outputs, targets)}
    return tuple(1 if axis in within else length for axis, length in enumerate(outputs.shape))


def _uniform(generator: torch.Generator, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
