"""Residuals: gradients of the loss in the outputs, whose outer products make up the Fisher matrices.

All kinds are functions of a batch: its number in the pass, the outputs and the targets. They give tensors r shaped like
the outputs such that the sum over them of r r^T, within each term of the data, is the map M of a matrix J^T M J.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curvature.distributed import place
from curvature.linalg.deflation import derived
from curvature.objective.losses import Likelihood, Loss, lacking
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
            return Sampled(loss, name, samples, _of_process(objective, seed))
        case "empirical":
            return Observed(loss)
        case _:
            also = ", or 'input-only'" if name == "kfac" else ""
            raise ValueError(f"fisher is 'type-2', 'sampled' or 'empirical'{also}, but got {kind!r}.")


def signed(objective: Objective, name: str, kind: FisherKind, *, samples: int = 1, seed: int = 0) -> Residuals:
    """The same for all terms of an example at once, whose products then average to zero: with random signs."""
    residuals = residuals_of(objective, name, kind, samples=samples, seed=seed)
    return (
        residuals if kind == "sampled" else Signed(residuals, likelihood(objective, name), _of_process(objective, seed))
    )


def _of_process(objective: Objective, seed: int) -> int:
    """A seed of its own for each process that has a share of the data: draws for different terms are independent."""
    rank, _ = place(objective.group)
    return derived(seed + rank) if rank else seed


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


@dataclass(frozen=True)
class Slope:
    """The gradient of the loss itself, of any loss of outputs."""

    loss: Loss

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        outputs = outputs.detach().requires_grad_()
        yield torch.autograd.grad(self.loss.total(outputs, targets), outputs)[0]


class Sampled:
    """Those at `samples` targets drawn from the model, in the order of the examples, however they are batched."""

    def __init__(self, loss: Likelihood, name: str, samples: int, seed: int) -> None:
        if samples < 1:
            raise ValueError(f"A sampled {name} needs at least one sample, but got samples={samples}.")
        self.loss, self.samples, self.streams = loss, samples, Streams(seed)

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        for stream in islice(self.streams.at(index), self.samples):
            uniform = partial(_uniform, stream, outputs.device)
            yield self.loss.sample(outputs, targets, uniform) / self.samples**0.5


class Signed:
    """Other residuals with random signs, own ones for each residual and term: products of different terms, all of which
    are pulled back at once and meet in the layers, then average to zero."""

    def __init__(self, residuals: Residuals, loss: Likelihood, seed: int) -> None:
        self.residuals, self.loss, self.streams = residuals, loss, Streams(seed)

    def __call__(self, index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        shape = _terms(self.loss, outputs, targets)
        for residual, stream in zip(self.residuals(index, outputs, targets), self.streams.at(index), strict=False):
            signs = (_uniform(stream, outputs.device, shape) < 0.5).to(outputs.dtype) * 2 - 1
            yield signs * residual


def one_term_each(
    residuals: Iterator[Tensor], loss: Likelihood, outputs: Tensor, targets: Any, examples: int
) -> Iterator[Tensor]:
    """The residuals of one term of each example at a time: as many more as an example has terms."""
    rows, *shape = _terms(loss, outputs, targets)
    places = torch.arange(rows // examples * math.prod(shape), device=outputs.device)
    place = places.view(-1, *shape).repeat(examples, *[1] * len(shape))
    for residual in residuals:
        for number in places:
            yield residual * (place == number)


class Streams:
    """Random number generators, as many as are asked for, that run through the examples of a pass however they are
    batched, and begin anew with each pass."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seeds, self.last = torch.Generator(), math.inf
        self.generators: list[torch.Generator] = []

    def at(self, index: int) -> Iterator[torch.Generator]:
        """The generators, for the batch of that number."""
        if index <= self.last:  # a new pass; its first batches may have no terms, and not come here
            self.seeds.manual_seed(self.seed)
            self.generators = []
        self.last = index
        for number in count():
            if number == len(self.generators):
                draw = int(torch.randint(2**62, (), generator=self.seeds))
                self.generators.append(torch.Generator().manual_seed(draw))
            yield self.generators[number]


def _terms(loss: Likelihood, outputs: Tensor, targets: Any) -> tuple[int, ...]:
    """The shape of the outputs with 1 for the axes within a term."""
    within = {axis % outputs.ndim for axis in loss.event(outputs, targets)}
    return tuple(1 if axis in within else length for axis, length in enumerate(outputs.shape))


def _uniform(generator: torch.Generator, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
