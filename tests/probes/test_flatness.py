"""Averages over random changes: closed forms, and error bars that hold."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from functions import made
from matrices import Stopping, linspace, rotated, tensor
from objectives import zoo
from torch import nn
from untouched import untouched

import curvature as cv
from curvature.probes.flatness import PacBayes, average_sharpness, pac_bayes_flatness

CASES = [case for case in zoo() if case.name in ("classifier", "regression", "convolution", "attention", "lstm")]
MATRIX = rotated(torch.cat([tensor(9, 5), linspace(-1, 2, 18)]))
WHERE = linspace(-1, 2, 20)
# so many intervals at 90 %, of which so many hold: three binomial standard deviations; and how near their errors are
SEEDS = pytest.mark.parametrize(
    ("seeds", "fewest", "most", "near"),
    [(80, 64, 80, 0.25), pytest.param(200, 167, 193, 0.15, marks=pytest.mark.slow)],
)


def parabola() -> cv.Objective:
    return made(lambda t: t @ (MATRIX @ t) / 2, WHERE)


def coin(margin: float) -> cv.Objective:
    """A classifier whose only answer is right as long as one weight is larger than the other, by `margin` here."""
    net = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(tensor(margin, 0.0)[:, None])
    return cv.Objective.of(net, "cross-entropy", (torch.ones(1, 1).double(), torch.tensor([0])))


@SEEDS
@pytest.mark.parametrize("relative", [False, True])
def test_on_a_quadratic_the_average_is_half_the_trace_as_often_as_it_says(relative, seeds, fewest, most, near):
    d = WHERE.abs() if relative else torch.ones(20).double()
    truth = 0.3**2 / 2 * float((d * MATRIX * d[:, None]).trace())
    inside, errors, misses = 0, [], []
    for seed in range(seeds):
        found = average_sharpness(parabola(), 0.3, relative=relative, samples=24, seed=seed)
        low, high = found.interval(0.9)
        inside += bool(low <= truth <= high)
        errors.append(float(found.stderr))
        misses.append(float(found.value) - truth)
    assert fewest <= inside <= most
    assert math.sqrt(sum(e * e for e in errors) / seeds) == pytest.approx(float(torch.tensor(misses).std()), rel=near)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_average_is_that_of_pairs_of_points(case):
    objective = case.objective((3, len(case.inputs) - 3), l2=0.1)
    with untouched(objective.function.module):
        found = average_sharpness(objective, 0.1, samples=5, seed=2)
    theta = objective.position
    seeds = torch.randint(2**32, (5,), generator=torch.Generator().manual_seed(2)).tolist()
    draws = [objective.space.draw(1, seed=seed, kind="normal")[0] for seed in seeds]
    pairs = [sum(objective.at(theta + s * 0.1 * u).value() for s in (1, -1)) / 2 - objective.value() for u in draws]
    assert float(found.value) == pytest.approx(sum(pairs) / 5, rel=1e-9)
    assert float(found.stderr) == pytest.approx(float(torch.tensor(pairs).std()) / 5**0.5, rel=1e-5)
    coarse = average_sharpness(case.objective(dtype=torch.float32), 0.1, samples=5, seed=2)
    fine = average_sharpness(case.objective(), 0.1, samples=5, seed=2)
    assert float(coarse.value) == pytest.approx(float(fine.value), abs=float(coarse.floor) + 1e-6)


def test_more_samples_begin_with_the_same():
    few, many = (average_sharpness(parabola(), samples=samples, seed=1) for samples in (40, 80))
    assert float(many.stderr) == pytest.approx(float(few.stderr) / 2**0.5, rel=0.3)
    assert average_sharpness(parabola(), samples=40, seed=2).value != few.value


def test_what_is_not_finite_stays_so():
    wall = made(lambda t: (t.sum() + 1e-9).sqrt(), tensor(0))
    assert not average_sharpness(wall).value.isfinite() and not average_sharpness(wall).stderr.isfinite()


@SEEDS
@pytest.mark.parametrize("relative", [False, True])
def test_the_sigma_of_a_quadratic_is_right_as_often_as_it_says(relative, seeds, fewest, most, near):
    d = WHERE.abs() if relative else torch.ones(20).double()
    truth = math.sqrt(2 * 0.5 / float((d * MATRIX * d[:, None]).trace()))
    inside, misses, errors = 0, [], []
    flat = made(lambda t: (t - WHERE) @ (MATRIX @ (t - WHERE)) / 2, WHERE)  # at its stationary point
    for seed in range(seeds):
        found = pac_bayes_flatness(flat, 0.5, relative=relative, samples=40, seed=seed)
        low, high = found.interval(0.9)
        inside += bool(low <= truth <= high)
        misses.append(float(found.value) - truth)
        errors.append(float(found.stderr))
    assert fewest <= inside <= most
    assert math.sqrt(sum(e * e for e in errors) / seeds) == pytest.approx(float(torch.tensor(misses).std()), rel=near)


def test_the_sigma_is_the_root_for_its_draws():
    found = pac_bayes_flatness(parabola(), 0.5, rtol=1e-3, samples=7, seed=4)
    again = pac_bayes_flatness(parabola(), 0.5, rtol=0.5, samples=7, seed=4)
    sigma = float(found.value)
    seeds = torch.randint(2**32, (7,), generator=torch.Generator().manual_seed(4)).tolist()
    draws = [parabola().space.draw(1, seed=seed, kind="normal")[0] for seed in seeds]
    rise = sum(parabola().at(WHERE + sigma * u).value() - parabola().value() for u in draws) / 7
    assert rise == pytest.approx(0.5, rel=1e-3)
    assert float(again.value) == pytest.approx(sigma, rel=0.1) and len(again.sigmas) < len(found.sigmas)
    assert float(found.sharpness.value) == pytest.approx(1 / sigma**2)
    assert float(found.sharpness.stderr / found.sharpness.value) == pytest.approx(2 * float(found.stderr) / sigma)


def test_the_error_of_a_coin_has_a_closed_form():
    for margin in (0.5, 3.0):
        found = pac_bayes_flatness(coin(margin), 0.1, samples=2000, rtol=1e-2)
        truth = -margin / (2**0.5 * scipy.stats.norm.ppf(0.1))
        low, high = found.interval(0.999)
        assert low < truth < high and high - low < 0.5 * truth and found.quantity == "error"


def test_what_never_rises_bears_everything_and_what_rises_at_once_nothing():
    still = pac_bayes_flatness(made(lambda t: 0 * t.sum(), tensor(1, 2)))
    assert float(still.value) == math.inf and float(still.sharpness.value) == 0
    jump = pac_bayes_flatness(made(lambda t: (t[0] != 1).double() + 0 * t.sum(), tensor(1, 2)))
    assert float(jump.value) == 0 and len(jump.sigmas) > 20


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_model_has_a_sigma_and_never_notices(case, tmp_path):
    objective = case.objective((3, len(case.inputs) - 3))
    with untouched(objective.function.module):
        found = pac_bayes_flatness(objective, 0.2, samples=6, relative=True)
    assert found.quantity == ("loss" if case.name in ("regression", "lstm") else "error")
    assert float(found.value) > 0 and found.rises.shape == (len(found.sigmas), 6)
    loaded = PacBayes.load(found.save(tmp_path))
    assert str(loaded) == str(found) and torch.equal(loaded.rises, found.rises)


def test_it_goes_on_where_it_was_and_returns_what_it_has(tmp_path):
    objective = CASES[0].objective()
    whole, path = average_sharpness(objective, samples=100), tmp_path / "average.ckpt"
    with pytest.raises(cv.Interrupted) as caught:
        average_sharpness(objective, samples=100, run=cv.Run(progress=Stopping(1), checkpoint=path))
    part = caught.value.result
    assert not part.complete and part.samples == 64
    resumed = average_sharpness(objective, samples=100, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.value, whole.value) and torch.equal(resumed.stderr, whole.stderr)
    whole, path = pac_bayes_flatness(objective), tmp_path / "pac_bayes.ckpt"
    with pytest.raises(KeyboardInterrupt):
        pac_bayes_flatness(objective, run=cv.Run(progress=Stopping(3), checkpoint=path))
    resumed = pac_bayes_flatness(objective, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.rises, whole.rises) and resumed.value == whole.value


def test_bad_input_is_refused():
    for options in ({"sigma": 0.0}, {"sigma": math.inf}, {"samples": 1}):
        with pytest.raises(ValueError, match="positive sigma and samples >= 2"):
            average_sharpness(parabola(), **options)
    for options in ({"tolerance": 0.0}, {"samples": 1}, {"rtol": 0.0}, {"tolerance": math.nan}):
        with pytest.raises(ValueError, match="positive tolerance, samples >= 2 and rtol"):
            pac_bayes_flatness(parabola(), **options)
    for ask in (average_sharpness, pac_bayes_flatness):
        with pytest.raises(TypeError, match="takes an Objective"):
            ask(nn.Linear(2, 1))
