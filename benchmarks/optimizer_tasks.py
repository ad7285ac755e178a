"""What `optimizers.py` trains: small networks and their data, with a loss that everyone minimises.

autoencoder   digits through eight numbers, 64-32-16-8-16-32-64, tanh and a sigmoid at the end; mean square
cnn           the embedded architecture on digits that are also moved by a pixel; cross-entropy
gpt           the embedded transformer on the characters of Hamlet; cross-entropy
poisson-1d    -u'' = f on (0, 1) with u = sin(pi x), two hidden layers of 32
poisson-2d    the same with -(u_xx + u_yy) on the square, one hidden layer
logistic      1,000 examples of 30 numbers, the scales of which go from 1 to 1/1000; all at once
rotated       the same with the numbers turned by a random rotation, so that no axis is that of a scale
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature as cv
from curvature.assets.data import digits, hamlet, hamlet_vocabulary
from curvature.assets.make import TRAINING_DIGITS, draw, initial, shifted
from curvature.assets.models import char_gpt, digits_cnn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, data for it, and how long it is trained: by how many `steps`, and `few` that each solve a system.

    `measured` is what is called its loss: that on all training data, or on some of them, always the same, minus
    `least`, the smallest there is, where that is known. `judge` is another figure of a trained network. Where `batch`
    is None a step sees all data.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: cv.Loss
    data: Batch
    measured: Batch
    batch: int | None
    steps: int
    few: int
    judge: Callable[[nn.Module], float]
    judged: str
    least: float = 0.0

    def model(self, seed: int) -> nn.Module:
        """The network before training."""
        return initial(self.build, seed=seed)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """A mini-batch for every step, drawn with replacement."""
        inputs, targets = self.data
        if self.batch is None:
            yield from [self.data] * steps
            return
        for rows in draw(len(inputs), steps=steps, batch=self.batch, seed=seed):
            yield inputs[rows], targets[rows]

    def mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a step descends."""
        return CRITERIA[type(self.loss)](model(batch[0]), batch[1])

    def distance(self, model: nn.Module) -> float:
        """The measured loss."""
        with torch.no_grad():
            return float((self.mean_loss(model, self.measured) - self.least).clamp(min=0))

    def objective(self, model: nn.Module, batch: Batch) -> cv.Objective:
        """The mini-batch for optimizers that ask more of it than a gradient."""
        return cv.Objective.of(model, self.loss, [batch])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


CRITERIA: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
    cv.SquaredError: F.mse_loss,
    cv.CrossEntropy: cross_entropy,
    cv.BinaryCrossEntropy: F.binary_cross_entropy_with_logits,
}


def autoencoder(name: str = "autoencoder", hidden: tuple[int, ...] = (32, 16, 8, 16, 32), batch: int = 128) -> Task:
    pixels, _ = digits()
    training, held_out = pixels[:TRAINING_DIGITS], pixels[TRAINING_DIGITS:]

    def build() -> nn.Module:
        widths = (64, *hidden, 64)
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers[:-1], nn.Sigmoid())

    def judge(model: nn.Module) -> float:
        return float(F.mse_loss(model(held_out), held_out).detach())

    pair = training, training
    return Task(name, build, cv.SquaredError(), pair, pair, batch, 600, 30, judge, "held-out loss")


def deeper() -> Task:
    return autoencoder("deeper", (128, 64, 32, 6, 32, 64, 128), 256)


def cnn() -> Task:
    pixels, labels = digits()
    training = shifted(pixels[:TRAINING_DIGITS]), labels[:TRAINING_DIGITS].repeat(9)
    some = training[0][::27], training[1][::27]

    def judge(model: nn.Module) -> float:
        with torch.no_grad():
            guesses = model(pixels[TRAINING_DIGITS:]).argmax(-1)
        return float((guesses == labels[TRAINING_DIGITS:]).double().mean())

    return Task("cnn", digits_cnn, cv.CrossEntropy(), training, some, 64, 150, 20, judge, "held-out accuracy")


def gpt() -> Task:
    training, held_out = hamlet("train"), hamlet("held-out")
    some = training[0][::120], training[1][::120]
    size = len(hamlet_vocabulary())

    def judge(model: nn.Module) -> float:
        with torch.no_grad():
            return float(cross_entropy(model(held_out[0][::4]), held_out[1][::4]))

    loss = cv.CrossEntropy(axis=-1)
    return Task("gpt", lambda: char_gpt(size), loss, training, some, 16, 150, 20, judge, "held-out loss")


class Poisson(nn.Module):
    """The Laplacian of a network at points (N, d) inside, and `weight` times the network at those on the edge: what
    should be -f and zero."""

    def __init__(self, *widths: int, weight: float) -> None:
        super().__init__()
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.u, self.weight = nn.Sequential(*layers[:-1]), weight

    def forward(self, points: Tensor) -> Tensor:
        x = points.detach().requires_grad_()
        with torch.enable_grad():
            u = self.u(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            bends = [torch.autograd.grad(s.sum(), x, create_graph=True)[0][:, i] for i, s in enumerate(slope.unbind(1))]
        return torch.where(edge(points), self.weight * u[:, 0], sum(bends, torch.zeros(())))


def edge(points: Tensor) -> Tensor:
    """Which points of the cube are on its boundary."""
    return ((points == 0) | (points == 1)).any(1)


def poisson(name: str, waves: tuple[int, ...], side: int, hidden: tuple[int, ...], steps: tuple[int, int]) -> Task:
    """u is the sum over `waves` k of prod_i sin(k pi x_i) / k, in as many dimensions as the name says."""
    dimensions = int(name[-2])
    axis = torch.linspace(0, 1, side, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    finer = torch.linspace(0, 1, 3 * side, dtype=torch.float64)
    probes = torch.cartesian_prod(*[finer] * dimensions).view(-1, dimensions)

    def parts(x: Tensor) -> list[Tensor]:
        return [(k * math.pi * x).sin().prod(1) / k for k in waves]

    truth = sum(parts(probes), torch.zeros(()))
    forces = [dimensions * (k * math.pi) ** 2 * part for k, part in zip(waves, parts(points), strict=True)]
    rim = edge(points)
    weight = float((~rim).sum() / rim.sum()) ** 0.5  # so that the mean squares inside and on the edge count the same
    targets = torch.where(rim, 0.0, -sum(forces, torch.zeros(())))
    pair = points, targets

    def build() -> nn.Module:
        return Poisson(dimensions, *hidden, 1, weight=weight).double()

    def judge(model: nn.Module) -> float:
        assert isinstance(model, Poisson)
        with torch.no_grad():
            return float((model.u(probes)[:, 0] - truth).norm() / truth.norm())

    return Task(name, build, cv.SquaredError(), pair, pair, None, *steps, judge, "relative L2 error of u")


def poisson_1d() -> Task:
    return poisson("poisson-1d", (1,), 102, (32, 32), (3000, 100))


def poisson_2d() -> Task:
    return poisson("poisson-2d", (1,), 13, (64,), (3000, 100))


def logistic(rotated: bool = False) -> Task:
    examples, columns = 1000, 30
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(examples, columns, dtype=torch.float64, generator=generator)
    weights = torch.randn(columns, dtype=torch.float64, generator=generator) * 2 / columns**0.5
    labels = torch.bernoulli((draws @ weights).sigmoid(), generator=generator)
    inputs = draws * torch.logspace(0, -3, columns, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator)).Q
    pair = (inputs @ turn if rotated else inputs), labels

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(columns, 1, dtype=torch.float64), nn.Flatten(0))

    def judge(model: nn.Module) -> float:
        grads = torch.autograd.grad(task.mean_loss(model, pair), list(model.parameters()))
        return float(sum(g.square().sum() for g in grads)) ** 0.5

    name = "rotated" if rotated else "logistic"
    task = Task(name, build, cv.BinaryCrossEntropy(), pair, pair, None, 1000, 40, judge, "gradient norm")
    return replace(task, least=smallest(draws, labels))


def smallest(inputs: Tensor, labels: Tensor) -> float:
    """The least loss of a logistic regression, by Newton's method; scales and rotations of columns do not change it."""
    x = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(50):
        p = (x @ w).sigmoid()
        w -= torch.linalg.solve((x.T * (p * (1 - p))) @ x, x.T @ (p - labels))
    return float(F.binary_cross_entropy_with_logits(x @ w, labels))


TASKS: dict[str, Callable[[], Task]] = {
    "autoencoder": autoencoder,
    "deeper": deeper,
    "cnn": cnn,
    "gpt": gpt,
    "poisson-1d": poisson_1d,
    "poisson-2d": poisson_2d,
    "logistic": logistic,
    "rotated": lambda: logistic(rotated=True),
}
