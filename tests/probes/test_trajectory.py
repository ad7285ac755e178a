"""Principal components of runs: what they are, and what a random walk makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes.directions import positions
from curvature.probes.trajectory import trajectory


def model(width: int = 8) -> tuple[nn.Module, cv.Objective]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).double()
    return net, cv.Objective.of(net, "mse", (torch.randn(9, 4).double(), torch.randn(9, 2).double()))


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("about", ["end", "mean"])
def test_components_are_those_of_the_singular_value_decomposition(about):
    _, objective = model()
    run = rows(7, objective.space.size).cumsum(0)
    found = trajectory(objective, run, count=3, about=about)
    away = run - (run[-1] if about == "end" else run.mean(0))
    _, singular, axes = torch.linalg.svd(away, full_matrices=False)
    torch.testing.assert_close(found.explained, singular.square() / singular.square().sum(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close((found.directions @ axes[:3].T).abs(), torch.eye(3).double(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.coordinates, away @ found.directions.T)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("about", ["end", "mean"])
@pytest.mark.parametrize("steps", [range(1, 41), [1, 2, 4, 8, 16, 32, 64, 128]])
def test_the_walk_is_what_random_steps_of_many_dimensions_show(about, steps, momentum):
    _, objective = model(1000)
    velocity, place, seen = torch.zeros(1), torch.zeros(1), []
    for step, draw in enumerate(rows(max(steps), objective.space.size, seed=3), 1):
        velocity = momentum * velocity + draw
        place = place + velocity
        if step in steps:
            seen.append(place)
    found = trajectory(objective, seen, about=about, steps=steps, momentum=momentum)
    torch.testing.assert_close(found.explained[:4], found.walk[:4], rtol=0.1, atol=3e-3)


def test_the_walk_has_the_shares_that_are_known():
    _, objective = model()
    run = rows(500, objective.space.size)
    k = torch.arange(1.0, 4.0, dtype=torch.float64)
    by_end, by_mean = (trajectory(objective, run, about=about).walk[:3] for about in ("end", "mean"))
    torch.testing.assert_close(by_end, 8 / (torch.pi * (2 * k - 1)) ** 2, rtol=5e-3, atol=0)
    torch.testing.assert_close(by_mean, 6 / (torch.pi * k) ** 2, rtol=5e-3, atol=0)


def test_a_run_to_a_minimum_is_told_from_a_walk():
    net, objective = model()
    optimizer, states = torch.optim.SGD(net.parameters(), lr=0.05), []
    for _ in range(30):
        states.append(copy.deepcopy(net.state_dict()))
        optimizer.zero_grad()
        x, y = next(iter(objective.batches))
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    with untouched(net):
        found = trajectory(objective, states)
    assert found.explained[:1].sum() > 0.9 > found.walk[0]
    assert "a random walk" in found.summary()


def test_checkpoints_are_state_dicts_objectives_or_vectors():
    net, objective = model()
    expected = objective.position + 1
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    places = (net.state_dict(), objective.with_state(net.state_dict()), expected)
    for row in positions(objective, places):
        torch.testing.assert_close(row, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": "start"}, "about is 'end' or 'mean', but got 'start'"),
        ({"count": 0}, "at least 3 checkpoints and fewer components, but got 5 and 0"),
        ({"count": 5}, "at least 3 checkpoints and fewer components, but got 5 and 5"),
        ({"steps": [1, 2]}, "rising number of steps for each of 5 checkpoints, but got"),
        ({"steps": [1, 2, 3, 5, 4]}, "rising number of steps"),
        ({"momentum": 1.0}, "momentum is at least 0 and less than 1, but got 1.0"),
    ],
)
def test_misuse_is_refused(change, message):
    _, objective = model()
    with pytest.raises(ValueError, match=message):
        trajectory(objective, rows(5, objective.space.size), **change)


def test_a_run_that_does_not_move_is_refused():
    _, objective = model()
    still = objective.position.expand(5, -1)
    with pytest.raises(ValueError, match="The checkpoints do not move in 2 directions"):
        trajectory(objective, still)
    with pytest.raises(ValueError, match=r"Expected an objective of 58 parameters.*but got \(3,\)"):
        trajectory(objective, [torch.zeros(3)] * 5)
    with pytest.raises(ValueError, match="but got int"):
        trajectory(objective, [1, 2, 3])
