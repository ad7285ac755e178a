"""Directions: drawn again by their seed, as long as the weights are, at right angles, and those of a run."""

from __future__ import annotations

import pytest
import torch
from objectives import zoo
from torch import nn

import curvature as cv

CASE = next(case for case in zoo() if case.name == "convolution")
OBJECTIVE = CASE.objective()


def test_a_seed_gives_the_same_directions_and_another_does_not():
    first, again, other = (cv.random_directions(OBJECTIVE, 2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_filters_have_the_length_of_those_of_the_parameters():
    rows = cv.random_directions(OBJECTIVE, 3)
    for row in rows:
        for name, piece in OBJECTIVE.space.named(row).items():
            parameter = OBJECTIVE.params[name]
            if parameter.ndim < 2:
                assert not piece.any()
            else:
                torch.testing.assert_close(piece.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1))


@pytest.mark.parametrize("scale", ["layer", "weight"])
def test_other_scales(scale):
    drawn = cv.random_directions(OBJECTIVE, 1, scale=None, seed=1)
    row = cv.to_scale(OBJECTIVE, drawn, scale)[0]
    for name, piece in OBJECTIVE.space.named(row).items():
        parameter, own = OBJECTIVE.params[name], OBJECTIVE.space.named(drawn[0])[name]
        if parameter.ndim < 2:
            assert not piece.any()
        elif scale == "layer":
            torch.testing.assert_close(piece, own / own.norm() * parameter.norm())
        else:
            torch.testing.assert_close(piece, own * parameter)


def test_curvature_along_scaled_directions_does_not_change_when_layers_are_rescaled():
    """Two layers around a ReLU, one three times as large and the other a third: the same function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(10, 4).double(), torch.randint(0, 3, (10,))
    objective = cv.Objective.of(net, "cross-entropy", [(x, y)])
    scaled = objective.at({"0.weight": 3 * objective.params["0.weight"], "2.weight": objective.params["2.weight"] / 3})
    lines = [cv.line(o, cv.random_directions(o, 1, seed=5)[0], points=5).loss for o in (objective, scaled)]
    torch.testing.assert_close(*lines, rtol=1e-10, atol=1e-12)
    plain = [cv.line(o, cv.random_directions(o, 1, scale=None, seed=5)[0], points=5).loss for o in (objective, scaled)]
    assert float((plain[0] - plain[1]).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_directions_are_at_right_angles_and_as_long_as_before(dtype):
    rows = torch.randn(4, 500, dtype=dtype) * torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=dtype).unsqueeze(1)
    rows[1] += 5 * rows[0]
    made = cv.orthogonal(rows)
    torch.testing.assert_close(made.norm(dim=1), rows.norm(dim=1))
    unit = made.double() / made.double().norm(dim=1, keepdim=True)
    cosines = unit @ unit.T - torch.eye(4, dtype=torch.float64)
    assert float(cosines.abs().max()) < (1e-12 if dtype == torch.float64 else 1e-7)
    torch.testing.assert_close(made[0], rows[0])
    with pytest.raises(ValueError, match="Direction 1 is a combination"):
        cv.orthogonal(torch.ones(2, 5))


def test_the_momentum_of_an_optimizer():
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    objective = cv.Objective.of(net, "mse", [(torch.randn(4, 3), torch.randn(4, 2))])
    with pytest.raises(ValueError, match="no 'exp_avg'"):
        cv.from_optimizer(objective, optimizer)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    expected = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in net.parameters()])
    torch.testing.assert_close(cv.from_optimizer(objective, optimizer), expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scale is"):
        cv.to_scale(OBJECTIVE, torch.ones(1, OBJECTIVE.space.size), "norm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Expected directions"):
        cv.to_scale(OBJECTIVE, torch.ones(1, 3))
