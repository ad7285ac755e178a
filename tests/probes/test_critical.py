"""The first step at which the loss is higher than where it began."""

from __future__ import annotations

import math

import pytest
import torch
from functions import made
from matrices import Stopping, rotated, tensor
from objectives import zoo
from untouched import untouched

import curvature as cv
from curvature.probes.critical import critical_sharpness

VALUES = tensor(9, 4, 1, 0.5)
WHERE = tensor(0.3, -0.5, 0.2, 1.1)
MATRIX = rotated(VALUES)


def parabola(theta=WHERE):
    return made(lambda t: t @ (MATRIX @ t) / 2, theta)


@pytest.mark.parametrize("rtol", [0.5, 0.05, 1e-6])
@pytest.mark.parametrize("start", [None, 1e-9, 0.3, 1e9])
def test_on_a_quadratic_it_is_the_curvature_along_the_gradient(rtol, start):
    objective = parabola()
    g = MATRIX @ WHERE
    expected = float(g @ (MATRIX @ g) / g.square().sum())
    found = critical_sharpness(objective, start=start, rtol=rtol)
    assert float(found.value) == pytest.approx(expected, rel=rtol) and expected <= 9
    assert found.step == pytest.approx(2 / expected, rel=rtol) and found.slope == pytest.approx(float(g @ g))
    d = tensor(1, 2, -1, 4)
    found = critical_sharpness(objective, d, start=start, rtol=rtol)
    assert float(found.value) == pytest.approx(float(d @ (MATRIX @ d) / (g @ d)), rel=rtol)


@pytest.mark.parametrize("case", [c for c in zoo() if c.name in ("classifier", "convolution", "attention")], ids=str)
def test_the_loss_is_lower_before_and_higher_after(case):
    objective = case.objective((3, len(case.inputs) - 3))
    with untouched(objective.function.module):
        found = critical_sharpness(objective, rtol=1e-3)
    theta, g = objective.position, objective.gradient()
    assert objective.at(theta - 1.01 * found.step * g).value() > objective.value()
    for share in torch.linspace(0.02, 0.99, 30).tolist():
        assert objective.at(theta - share * found.step * g).value() < objective.value()
    again = critical_sharpness(objective, start=found.step, rtol=1e-3)
    assert again.step == pytest.approx(found.step, rel=2e-3) and len(again.steps) < len(found.steps)
    assert torch.equal(found.steps, found.steps.sort().values) and found.steps[0] == 0


def test_the_first_crossing_is_found_where_the_loss_falls_again():
    """After 1 the loss is higher, after 3 lower again, and after 12 higher."""

    def wavy(t):
        s = -t.sum()  # how far the step went
        return s * (s - 1) * (s - 3) * (s - 12)

    for start in (1e-3, 8.0):
        found = critical_sharpness(made(wavy, tensor(0)), tensor(1), start=start, rtol=1e-3)
        assert found.step == pytest.approx(1, rel=1e-3)


def test_up_is_no_direction_of_descent():
    for direction in (-parabola().gradient(), torch.zeros(4).double()):
        found = critical_sharpness(parabola(), direction)
        assert math.isnan(float(found.value)) and "no direction of descent" in str(found)
    assert math.isnan(float(critical_sharpness(parabola(torch.zeros(4).double())).value))  # nor is there one here


def test_a_loss_that_never_rises_has_none_and_one_that_overflows_has_risen():
    assert float(critical_sharpness(made(lambda t: t.sum(), tensor(1, 2))).value) == 0
    wall = made(lambda t: t.sum() + t.sum().log(), tensor(1))  # not a number below 0
    found = critical_sharpness(wall, tensor(1), rtol=1e-4)
    assert found.step == pytest.approx(1, rel=1e-3) and not found.losses.isfinite().all()


def test_what_is_less_than_rounding_is_not_called_a_crossing():
    far = made(lambda t: t.square().sum() + 1e9, tensor(1e-4))
    found = critical_sharpness(far)
    assert math.isnan(float(found.value)) and "less than rounding" in str(found)


def test_one_task_along_the_updates_of_another():
    second = made(lambda t: t @ t / 2, WHERE)
    g = parabola().gradient()
    found = critical_sharpness(second, g, rtol=1e-4)
    assert float(found.value) == pytest.approx(float(g @ g / (WHERE @ g)), rel=1e-4)


def test_it_goes_on_where_it_was(tmp_path):
    whole, path = critical_sharpness(parabola()), tmp_path / "critical.ckpt"
    with pytest.raises(KeyboardInterrupt):
        critical_sharpness(parabola(), run=cv.Run(progress=Stopping(3), checkpoint=path))
    resumed = critical_sharpness(parabola(), run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.losses, whole.losses) and resumed.step == whole.step
    with pytest.raises(cv.BadFile):
        critical_sharpness(parabola(), torch.ones(4).double(), run=cv.Run(checkpoint=path))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"Expected a direction \(4,\)"):
        critical_sharpness(parabola(), torch.ones(3).double())
    for options in ({"rtol": 0.0}, {"rtol": 1.0}, {"start": 0.0}, {"start": math.inf}):
        with pytest.raises(ValueError, match="positive start or None"):
            critical_sharpness(parabola(), **options)
    with pytest.raises(TypeError, match="takes an Objective"):
        critical_sharpness(torch.nn.Linear(2, 1))  # pyright: ignore[reportArgumentType]
