"""The Roughness Index: what it is on functions whose profiles are known, its error bar, and what is left as it was."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from functions import made
from matrices import Stopping, linspace, rotated, tensor
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes.roughness import Roughness, _Lines, roughness, total_variation

CASES = [case for case in zoo() if case.name in ("classifier", "regression", "convolution", "attention", "lstm")]


def quadratic(values: Tensor, height: float = 1.0) -> cv.Objective:
    """theta.A theta / 2 + height, at the ones."""
    matrix = rotated(values)
    return made(lambda w: w @ matrix.to(w) @ w / 2 + height, torch.ones_like(values))


def obvious(objective: cv.Objective, directions: Tensor, radius: float, steps: int) -> tuple[list[list[float]], float]:
    """Every profile point by point, and the index of their variations."""
    s = [radius * (2 * j / steps - 1) for j in range(steps + 1)]
    profiles = [[objective.at(objective.position + t * v).value() for t in s] for v in directions]
    variations = [
        sum(abs(b - a) for a, b in itertools.pairwise(f)) / (2 * radius * (max(f) - min(f))) for f in profiles
    ]
    return profiles, statistics.stdev(variations) / statistics.mean(variations)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_index_of_the_paper(case):
    objective = case.objective((4, len(case.inputs) - 4), l2=0.1)
    found = roughness(objective, directions=7, radius=0.5, steps=8, seed=3)
    profiles, index = obvious(objective, cv.random_directions(objective, 7, seed=3), 0.5, 8)
    torch.testing.assert_close(found.profiles, torch.tensor(profiles, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert float(found) == pytest.approx(index, rel=1e-9)
    assert (found.profiles[:, 4] == objective.value()).all() and found.coordinates[4] == 0
    assert found.cost.passes > 0 and found.origin.seed == 3


def test_at_the_minimum_of_a_quadratic_every_profile_goes_down_and_up_once():
    objective = quadratic(linspace(0.1, 5, 12))
    found = roughness(objective.at(torch.zeros(12).double()), scale=None, directions=20)
    torch.testing.assert_close(found.oscillation, torch.full((20,), 2.0).double(), rtol=0, atol=1e-10)
    assert float(found) < 1e-10 and float(found.stderr) < 1e-10
    bare = roughness(quadratic(linspace(0.1, 5, 12), 0.0).at(torch.zeros(12).double()), scale=None)
    torch.testing.assert_close(bare.oscillation, torch.full((50,), 2.0).double(), rtol=0, atol=1e-12)
    assert float(bare) < 1e-12  # without a height there is nothing that rounds


def test_far_from_the_minimum_every_profile_goes_one_way():
    far = 1e4 * torch.ones(12).double()
    found = roughness(quadratic(linspace(0.1, 5, 12)).at(far), scale=None)
    torch.testing.assert_close(found.oscillation, torch.ones(50).double(), rtol=0, atol=1e-9)
    assert float(found) < 1e-9
    torch.testing.assert_close(found.variations, found.oscillation / 0.02)


def test_in_between_directions_differ():
    found = roughness(quadratic(linspace(0.1, 5, 12)).at(0.01 * torch.ones(12).double()), scale=None, steps=100)
    assert found.oscillation.min() >= 1 and found.oscillation.max() <= 2 + 1e-9
    assert 0.1 < float(found) < 0.5


def test_every_further_oscillation_counts():
    """Whole periods of a cosine: up and down once each."""
    wave = made(lambda w: (math.pi * w).cos().sum(), torch.zeros(1).double())
    found = roughness(wave, directions=tensor(1, 2, 3).unsqueeze(1), radius=1.0, steps=24)
    torch.testing.assert_close(found.oscillation, tensor(2, 4, 6))
    assert float(found) == pytest.approx(0.5) and "67% above 2" in str(found)


def test_the_total_variation_of_values_is_over_their_last_axis():
    torch.testing.assert_close(total_variation(tensor(1, 3, 2, 2, 5)), tensor(6)[0])
    assert total_variation(torch.zeros(2, 3, 4)).shape == (2, 3)


def test_the_coarse_index_is_that_of_half_as_many_steps():
    objective = CASES[0].objective()
    fine, half = (roughness(objective, directions=6, radius=2.0, steps=steps) for steps in (20, 10))
    assert float(fine.coarse) == pytest.approx(float(half), rel=1e-9)
    assert float(fine.coarse) != float(fine) and "half as many steps" in str(fine)


def test_the_error_is_that_of_the_jackknife():
    found = roughness(CASES[0].objective(), directions=9)
    T = found.variations.tolist()
    others = [T[:i] + T[i + 1 :] for i in range(9)]
    indices = [statistics.stdev(other) / statistics.mean(other) for other in others]
    middle = statistics.mean(indices)
    assert float(found.stderr) == pytest.approx((8 / 9 * sum((i - middle) ** 2 for i in indices)) ** 0.5, rel=1e-9)
    assert found.samples == 9


@pytest.mark.parametrize(
    ("where", "seeds"), [(0.1, 25), *(pytest.param(where, 100, marks=pytest.mark.slow) for where in (0.003, 0.01, 0.1))]
)
def test_the_error_bar_is_honest(where, seeds):
    """At 0.1 one direction in ten or so turns at all: with as many degrees of freedom as directions it would not be."""
    objective = quadratic(linspace(0.1, 5, 12)).at(where * torch.ones(12).double())
    truth = float(roughness(objective, scale=None, directions=200 * seeds, seed=999))
    found = [roughness(objective, scale=None, seed=seed) for seed in range(seeds)]
    errors = torch.tensor([float(one) - truth for one in found])
    inside = sum(float(low) <= truth <= float(high) for low, high in (one.interval() for one in found))
    stderr = statistics.median(float(one.stderr) for one in found)
    assert inside >= 0.91 * seeds and stderr < 1.3 * float(errors.square().mean().sqrt())


def test_the_degrees_of_freedom_are_those_of_the_directions_that_differ():
    objective = quadratic(tensor(1, 1)).at(tensor(0.005, 0))
    one, other = tensor(1, 0).unsqueeze(0), tensor(0, 1).unsqueeze(0)
    few = roughness(objective, directions=torch.cat([one.expand(2, 2), other.expand(40, 2)]))
    assert 1 <= few.dof < 2 and "2 of 42 directions or so" in str(few)
    half = roughness(objective, directions=torch.cat([one.expand(21, 2), other.expand(21, 2)]))
    assert half.dof == pytest.approx(41) and "rests on" not in str(half)


@pytest.mark.parametrize("block", [None, 1], ids=["together", "one by one"])
def test_drawn_directions_are_those_of_random_directions(block, monkeypatch):
    """Also where so little is held at once that they are drawn on the way."""
    objective = CASES[2].objective()
    given = roughness(objective, directions=cv.random_directions(objective, 5, seed=2))
    if block is not None:
        monkeypatch.setattr("curvature.probes.points.BLOCK", block)
    drawn = roughness(objective, directions=5, seed=2)
    torch.testing.assert_close(drawn.profiles, given.profiles, rtol=1e-13, atol=0)
    assert given.origin.seed is None
    assert torch.equal(drawn.profiles, roughness(objective, directions=5, seed=2).profiles)
    assert not torch.equal(drawn.profiles, roughness(objective, directions=5, seed=3).profiles)


def test_no_more_directions_are_held_than_points_are_on():
    objective, offsets = CASES[0].objective(), tensor(-1, -0.5, 0.5, 1)
    rows = cv.random_directions(objective, 9)
    lines = _Lines(objective, iter(rows), offsets)
    for some, held in ((slice(0, 3), [0]), (slice(3, 9), [0, 1, 2]), (slice(30, 31), [7]), (slice(31, 36), [7, 8])):
        expected = [objective.position + offsets[i % 4] * rows[i // 4] for i in range(some.start, some.stop)]
        assert torch.equal(lines(some), torch.stack(expected)) and list(lines.held) == held


@pytest.mark.parametrize(("scale", "changes"), [("filter", False), ("layer", False), ("weight", False), (None, True)])
def test_rescaled_layers_around_a_relu_are_as_rough(scale, changes):
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    objective = cv.Objective.of(net, "cross-entropy", (torch.randn(10, 4).double(), torch.randint(0, 3, (10,))))
    scaled = objective.at({"0.weight": 3 * objective.params["0.weight"], "2.weight": objective.params["2.weight"] / 3})
    one, other = (roughness(o, directions=10, radius=0.3, scale=scale).profiles for o in (objective, scaled))
    assert (float((one - other).abs().max()) > 1e-2) == changes
    assert changes or float((one - other).abs().max()) < 1e-12


def test_a_constant_profile_has_no_variation_and_the_index_is_not_a_number():
    objective = quadratic(tensor(1, 0, 2))
    directions = torch.cat([rotated(tensor(1, 0, 2)) @ torch.randn(3, 3).double(), torch.zeros(1, 3).double()])
    found = roughness(objective, directions=directions)
    assert found.oscillation.isnan().tolist() == [False, False, False, True]
    assert math.isnan(float(found)) and math.isnan(float(found.stderr)) and found.faint.tolist()[-1]
    assert "1 of 4 profiles are constant" in str(found)


def test_what_is_not_finite_is_kept():
    steep = made(lambda w: (60 * w).exp().sum(), torch.zeros(1))
    found = roughness(steep, directions=torch.tensor([[1.0], [0.1], [0.2]]), radius=2.0)
    assert torch.isinf(found.profiles[0, -1]) and math.isnan(float(found))
    assert found.oscillation.isnan().tolist() == [True, False, False]


def test_a_profile_within_rounding_is_marked():
    coarse = quadratic(linspace(0.1, 5, 12)).to(dtype=torch.float32).at(1e-3 * torch.ones(12))
    found = roughness(coarse, directions=5, scale=None, radius=1e-4)
    assert found.faint.all() and "5 of 5 profiles: take a larger radius" in str(found)
    fine = roughness(coarse.to(dtype=torch.float64), directions=5, scale=None, radius=1e-4)
    assert not fine.faint.any() and "rounding" not in str(fine)
    assert not roughness(coarse, directions=5, scale=None, radius=1e3).faint.any()


@pytest.mark.parametrize("norm", ["frozen", "recalibrated", "batch"])
def test_the_model_never_notices(norm):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    objective = cv.Objective.of(net, "mse", (torch.randn(8, 3).double(), torch.randn(8, 2).double()))
    with untouched(net):
        found = roughness(objective, directions=3, norm=norm)
    assert found.origin.options["norm"] == norm and torch.isfinite(found.value)


def test_it_goes_on_where_it_was_and_returns_what_it_has(tmp_path):
    objective, path = CASES[0].objective(), tmp_path / "roughness.ckpt"
    whole = roughness(objective, directions=30)
    with pytest.raises(cv.Interrupted) as caught:
        roughness(objective, directions=30, run=cv.Run(progress=Stopping(1), checkpoint=path))
    part = caught.value.result
    assert not part.complete and part.samples == 12  # 128 points of ten a profile
    assert torch.equal(part.profiles, whole.profiles[:12])
    resumed = roughness(objective, directions=30, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.profiles, whole.profiles) and torch.equal(resumed.value, whole.value)
    with pytest.raises(cv.BadFile):
        roughness(objective, directions=30, seed=1, run=cv.Run(checkpoint=path))
    with pytest.raises(KeyboardInterrupt) as early:
        roughness(objective, directions=3, run=cv.Run(progress=Stopping(0), checkpoint=None), steps=200)
    assert not isinstance(early.value, cv.Interrupted)


def test_it_is_saved(tmp_path):
    found = roughness(CASES[0].objective(), directions=4)
    loaded = Roughness.load(found.save(tmp_path))
    assert str(loaded) == str(found) and torch.equal(loaded.faint, found.faint)


def test_bad_input_is_refused():
    objective = CASES[0].objective()
    for options, message in (
        ({"directions": 2}, "3 directions at least, but got 2"),
        ({"directions": torch.zeros(4, 3)}, r"Expected directions \(k, "),
        ({"steps": 5}, "steps is even"),
        ({"steps": 2}, "4 at least"),
        ({"radius": 0.0}, "radius is positive"),
        ({"radius": math.inf}, "radius is positive"),
        ({"scale": "norm"}, "scale is None, 'filter'"),
        ({"norm": "off"}, "norm is"),
    ):
        with pytest.raises(ValueError, match=message):
            roughness(objective, **options)
    assert objective.meter.passes == 0
    with pytest.raises(TypeError, match="takes an Objective"):
        roughness(nn.Linear(2, 1))  # pyright: ignore[reportArgumentType]
