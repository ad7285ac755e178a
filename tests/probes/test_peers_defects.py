"""Defects that other packages for loss landscapes have, as tests that ours has none of them."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest
import torch
from functions import made
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv

CASES = zoo()
CLASSIFIER = next(case for case in CASES if case.name == "classifier")


def normed(batches: int = 1) -> cv.Objective:
    """A convolutional network with batch normalisation whose running variances are small; its data in so many parts."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    x, y = 0.1 * torch.randn(32, 1, 4, 4).double(), torch.randint(0, 3, (32,))
    for _ in range(40):
        net.train()(x)
    return cv.Objective.of(net.eval(), "cross-entropy", list(zip(x.chunk(batches), y.chunk(batches), strict=True)))


@pytest.mark.parametrize("count", [2, 3, 10])
def test_orthogonal_directions_are_orthogonal_and_of_the_length_they_had(count):
    rows = cv.random_directions(CLASSIFIER.objective(), count, seed=count)
    found = cv.orthogonal(rows)
    gram = found @ found.T
    torch.testing.assert_close(gram, torch.diag(rows.square().sum(1)), rtol=0, atol=1e-12)


def test_no_noise_is_added_to_any_loss():
    """To the highest, in particular: all are those of the model, and the same every time."""
    objective = CLASSIFIER.objective()
    directions = cv.random_directions(objective, 2)
    found, again = (cv.plane(objective, directions, points=7, radius=3.0) for _ in range(2))
    assert torch.equal(found.loss, again.loss)
    i, j = divmod(int(found.loss.argmax()), 7)
    place = torch.stack([found.coordinates[i], found.coordinates[j]]) @ directions
    highest = CLASSIFIER.value(objective.position + place)
    assert float(found.loss[i, j]) == pytest.approx(float(highest), rel=1e-12)


def test_what_is_not_a_number_is_not_replaced_by_a_mean():
    root = made(lambda w: w.sqrt().sum(), torch.ones(2).double())
    found = cv.plane(root, torch.eye(2).double(), points=5, radius=2.0)
    negative = found.coordinates < -1
    expected = negative[:, None] | negative[None, :]
    assert torch.equal(found.loss.isnan(), expected) and 0 < int(expected.sum()) < 25


@pytest.mark.parametrize("scale", [None, "filter", "layer"])
def test_directions_are_gaussian_and_point_either_way(scale):
    """Uniform ones between 0 and 1 all share most of their direction."""
    net = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    objective = cv.Objective.of(net, "mse", (torch.zeros(1, 100), torch.zeros(1, 100)))
    rows = cv.random_directions(objective, 4, scale=scale).double()
    rows = rows[:, rows.any(0)]
    z = rows / rows.std(1, keepdim=True)
    bound = 5 / z.shape[1] ** 0.5  # five standard errors of the mean of so many
    assert float(z.mean(1).abs().max()) < bound and float((z < 0).double().mean(1).sub(0.5).abs().max()) < bound / 2
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert float((unit @ unit.T - torch.eye(4).double()).abs().max()) < bound
    if scale is None:
        assert float((z**4).mean(1).sub(3).abs().max()) < bound * 24**0.5


def test_biases_do_not_collapse_to_their_own_size():
    """A filter of a bias is one number: scaled to its norm a direction would be the bias itself, up to its sign."""
    objective = CLASSIFIER.objective()
    for row in cv.random_directions(objective, 3):
        moved = {name for name, piece in objective.space.named(row).items() if piece.any()}
        assert moved == {name for name, p in objective.params.items() if p.ndim > 1}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_middle_is_the_loss_of_the_model(case):
    """Of every kind of model, tied, frozen and recurrent ones included; and the model is as it was."""
    objective = case.objective()
    with untouched(case.module):
        found = cv.plane(objective, cv.random_directions(objective, 2), points=3)
    assert found.coordinates.abs().argmin() == 1 and found.centre == objective.value()
    assert found.centre == pytest.approx(float(case.value(case.flat)), rel=1e-12)


def test_eigenvalues_do_not_grow_with_the_number_of_batches():
    found = torch.stack([cv.eigsh(cv.hessian(normed(batches)), 2, which="both").values for batches in (1, 4, 16)])
    torch.testing.assert_close(found, found[:1].expand(3, 2), rtol=1e-6, atol=1e-12)
    objective = normed()
    dense = torch.autograd.functional.hessian(lambda row: loss_of(objective, row), objective.position)
    extremes = torch.linalg.eigvalsh(dense)[[-1, 0]]
    torch.testing.assert_close(found[0], extremes, rtol=1e-6, atol=1e-12)


def loss_of(objective: cv.Objective, row: Tensor) -> Tensor:
    """As torch has it."""
    ((x, y),) = objective.batches
    named = objective.space.named(row)
    outputs = torch.func.functional_call(objective.function.module, {**named, **objective.buffers}, (x,))
    return nn.functional.cross_entropy(outputs, y)


@pytest.mark.parametrize("norm", ["frozen", "recalibrated", "batch"])
@pytest.mark.parametrize("scale", [None, "filter"])
def test_running_variances_are_no_direction(scale, norm):
    """Were they moved, they would be negative in half the plane, and the loss not a number there."""
    objective = normed()
    assert float(objective.buffers["1.running_var"].max()) < 0.2
    assert not any("running" in name for name in objective.space.names)
    with untouched(objective.function.module):
        found = cv.plane(objective, cv.random_directions(objective, 2, scale=scale), points=5, norm=norm)
    assert found.loss.isfinite().all()


def test_axes_of_the_hessian_work_with_batch_normalisation():
    """Near the middle the loss is that of the gradient and the eigenvalues along them."""
    objective = normed()
    pairs = cv.eigsh(cv.hessian(objective), 2, which="both", rtol=1e-8)
    found = cv.plane(objective, pairs.vectors, points=5, radius=1e-3)
    t, slope = found.coordinates, pairs.vectors @ objective.gradient()
    even, odd = ((found.loss + sign * found.loss.flip(0, 1)) / 2 for sign in (1, -1))
    bend = (pairs.values[0] * t[:, None] ** 2 + pairs.values[1] * t**2) / 2
    torch.testing.assert_close(even - found.centre, bend, rtol=1e-3, atol=1e-4 * float(bend.abs().max()))
    torch.testing.assert_close(odd, slope[0] * t[:, None] + slope[1] * t, rtol=0, atol=1e-4 * float(odd.abs().max()))
    assert pairs.values[0] > 0 > pairs.values[1]


def test_filters_are_scaled_one_by_one():
    """Not the tensor as a whole: the norms of all of its filters come out, whatever they are."""
    net = nn.Conv2d(2, 3, 3, bias=False).double()
    with torch.no_grad():
        net.weight *= torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1, 1)
    objective = cv.Objective.of(net, "mse", (torch.zeros(1, 2, 3, 3).double(), torch.zeros(1, 3, 1, 1).double()))
    (row,) = cv.random_directions(objective, 1)
    norms, own = row.view(3, -1).norm(dim=1), net.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, own)
    whole = cv.random_directions(objective, 1, scale="layer")[0].view(3, -1).norm(dim=1)
    assert float(whole[2] / whole[0]) < 3 and math.isclose(float(whole.norm()), float(own.norm()))


def test_no_version_of_torch_is_pinned():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (torch_line,) = [line for line in project["dependencies"] if line.startswith("torch")]
    assert torch_line.startswith("torch>=") and "," not in torch_line
