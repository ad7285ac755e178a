"""Planes through the parameters: the time of a point, over that of loops from point to point.

    python benchmarks/landscapes.py [--quick] [--threads 1,2] [--rounds 3] [--problems mlp,pinn,cnn,resnet]

Writes benchmarks/results/landscapes_cpu.json and prints its table. "plane" is `cv.plane`, all that it does to begin
with included. "one batch" is the fastest loop that is easily written: parameters set in place, all data at once, no
gradients. "loader" is the usual one, over a DataLoader with batches of 64; it does every fifth point. "loss-landscapes"
is `random_plane` of that package, all data at once (`pip install --no-deps loss-landscapes`; left out where it is not).
Contenders take turns, round after round; times and ratios are medians over the rounds, the ratios within each. On one
thread it is the time of the processor; "load" is how many processes wanted one, before and after. All losses are
compared with those of the plane at the same parameters.

A loop with large tensors depends on what its process has done before: until glibc has seen a larger one freed, it takes
their memory from the system page by page, which doubles the time of a convolutional network. The rows of "cnn", and of
"resnet" with two threads, are of processes of their own (`--problems cnn`).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import Clock, machine, rounded
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature as cv
from curvature.assets.data import digits
from curvature.assets.make import TRAINING_DIGITS, initial
from curvature.probes.points import Points

RESULTS = Path(__file__).parent / "results"
PEER = "loss-landscapes"
BATCH, EVERY = 64, 5  # of the loader: examples, and which points
SIDE = 31  # of the grid on which a differential equation is imposed

Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Problem:
    """An objective, the mean loss of its model on some of its data, and how many points the plane has on an axis."""

    objective: cv.Objective
    loss: Loss
    data: tuple[Tensor, ...]
    points: int

    @cached_property
    def directions(self) -> Tensor:
        return cv.random_directions(self.objective, 2)

    @property
    def model(self) -> nn.Module:
        """A copy in evaluation mode, of which no gradients are taken."""
        return copy.deepcopy(self.objective.function.module).eval().requires_grad_(False)

    def rows(self, coordinates: Tensor) -> Tensor:
        """The points of the plane."""
        offsets = torch.cartesian_prod(coordinates, coordinates)
        return self.objective.position + self.objective.space.combine(offsets, self.directions)


def mlp(points: int) -> Problem:
    """The embedded perceptron."""
    return _classifier(cv.demo("digits"), points)


def cnn(points: int) -> Problem:
    """The embedded convolutional network."""
    return _classifier(cv.demo("digits-cnn"), points)


def resnet(points: int) -> Problem:
    """Three residual blocks with batch normalisation, which has seen the digits; the library cuts them as it does."""
    model = initial(_resnet, seed=0)
    pixels, labels = (tensor[:TRAINING_DIGITS] for tensor in digits())
    with torch.no_grad():
        for _ in range(20):
            model.train()(pixels)
    return _classifier(cv.Objective.of(model.eval(), "cross-entropy", (pixels, labels)), points)


def pinn(points: int) -> Problem:
    """Poisson's equation on a grid, imposed on a network by its second derivatives."""
    widths = (2, 32, 32, 32, 1)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = initial(lambda: nn.Sequential(*layers[:-1]), seed=0)
    axis = torch.linspace(0, 1, SIDE)
    grid = torch.cartesian_prod(axis, axis)
    objective = cv.Objective.from_loss(model, lambda m, x: residual(m, (x,)), grid)
    return Problem(objective, residual, (grid,), points)


PROBLEMS: dict[str, tuple[Callable[[int], Problem], int]] = {
    "mlp": (mlp, 51),
    "pinn": (pinn, 51),
    "cnn": (cnn, 21),
    "resnet": (resnet, 21),
}


def residual(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The mean square of u_xx + u_yy + sin(pi x) sin(pi y)."""
    x = batch[0].detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        xx, yy = (torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1))
    return (xx + yy + (torch.pi * x).sin().prod(1)).square().mean()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def loop(problem: Problem, model: nn.Module, rows: Tensor, batches: Iterable[Any]) -> Tensor:
    """The loss at each row, one after another."""
    losses = []
    with torch.no_grad():
        for row in rows:
            for parameter, piece in zip(model.parameters(), problem.objective.space.unflatten(row), strict=True):
                parameter.copy_(piece)
            total, count = 0.0, 0
            for batch in batches:
                total += problem.loss(model, tuple(batch)).item() * len(batch[0])
                count += len(batch[0])
            losses.append(total / count)
    return torch.tensor(losses, dtype=torch.float64)


def by_peer(problem: Problem, steps: int, *, seen: list[Tensor] | None = None) -> Tensor:
    """The plane of loss-landscapes; the parameters of its points are put into `seen`."""
    from loss_landscapes import random_plane
    from loss_landscapes.metrics.metric import Metric

    class MeanLoss(Metric):
        def __call__(self, wrapped: Any) -> float:
            model = wrapped.get_modules()[0]
            if seen is not None:
                seen.append(nn.utils.parameters_to_vector(model.parameters()).clone())
                losses.append(problem.loss(model, problem.data).item())
                return losses[-1]
            return problem.loss(model, problem.data).item()

    losses: list[float] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random_plane(problem.model, MeanLoss(), distance=3, steps=steps, normalization="layer")
    return torch.tensor(losses, dtype=torch.float64)  # in the order of its visits, which is not that of its table


def measured(name: str, points: int, threads: int, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    torch.set_num_threads(threads)
    problem = PROBLEMS[name][0](points)
    plane = cv.plane(problem.objective, problem.directions, points=points)
    rows, some = problem.rows(plane.coordinates), slice(None, None, EVERY)
    model, loader = problem.model, DataLoader(TensorDataset(*problem.data), batch_size=BATCH)
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "plane": (lambda: cv.plane(problem.objective, problem.directions, points=points), points**2),
        "one batch": (lambda: loop(problem, model, rows, [problem.data]), points**2),
        "loader": (lambda: loop(problem, model, rows[some], loader), len(rows[some])),
    }
    flat = plane.loss.flatten()
    differences = {
        "one batch": flat - loop(problem, model, rows, [problem.data]),
        "loader": flat[some] - loop(problem, model, rows[some], loader),
    }
    if find_spec("loss_landscapes"):
        visited: list[Tensor] = []
        losses = by_peer(problem, 5, seen=visited)
        differences[PEER] = Points(problem.objective)(torch.stack(visited))[:, 0] - losses
        contenders[PEER] = (lambda: by_peer(problem, points), points**2)
    clock = Clock(torch.device("cpu"))
    taken = [{key: clock.once(call)[0] / count for key, (call, count) in contenders.items()} for _ in range(rounds)]
    return {
        "problem": name,
        "parameters": problem.objective.space.size,
        "examples": len(problem.data[0]),
        "points": points,
        "threads": threads,
        "seconds_a_point": {key: median(one[key] for one in taken) for key in contenders},
        "ratios": {key: median(one[key] / one["plane"] for one in taken) for key in contenders},
        "largest_difference": {key: float(found.abs().max()) for key, found in differences.items()},
        "largest_loss": float(flat.max()),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Times of a point, and how many times that of the plane they are."""
    contenders = list(dict.fromkeys(key for row in rows for key in row["seconds_a_point"]))
    shown = Table("problem", "points", "threads", *contenders, "difference", title="ms a point (times the plane's)")
    for row in rows:
        cells = [
            f"{1e3 * row['seconds_a_point'][key]:.3g} ({row['ratios'][key]:.2f})" if key in row["ratios"] else ""
            for key in contenders
        ]
        points = f"{row['points']} x {row['points']}"
        shown.add_row(
            row["problem"], points, str(row["threads"]), *cells, f"{max(row['largest_difference'].values()):.1e}"
        )
    return shown


def _classifier(objective: cv.Objective, points: int) -> Problem:
    pixels, labels = digits()
    return Problem(objective, cross_entropy, (pixels[:TRAINING_DIGITS], labels[:TRAINING_DIGITS]), points)


def _resnet() -> nn.Module:
    stem = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class _Block(nn.Module):
    """Two convolutions added to a third of their input, each normalised."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()

        def convolution(channels: int, size: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, outward, size, stride, size // 2, bias=False), nn.BatchNorm2d(outward)
            )

        self.first, self.second = convolution(inward, 3, stride), convolution(outward, 3, 1)
        self.skip = convolution(inward, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="planes of 5 x 5: whether everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "landscapes_cpu.json")
    args = parser.parse_args()
    rows, before = [], os.getloadavg()[0]
    for threads in map(int, args.threads.split(",")):
        for name in args.problems.split(","):
            rows.append(measured(name, 5 if args.quick else PROBLEMS[name][1], threads, args.rounds))
            print(name, threads, rounded(rows[-1]["ratios"]), flush=True)
    peer = version(PEER) if find_spec("loss_landscapes") else None
    load = [round(before, 1), round(os.getloadavg()[0], 1)]
    report = {"machine": machine(torch.device("cpu")), "load": load, PEER: peer, "rounds": args.rounds, "rows": rows}
    args.out.write_text(json.dumps(rounded(report), indent=1) + "\n")
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
