"""How much of a spectrum is negative."""

from __future__ import annotations

import pytest
import torch
from matrices import free, linspace, rotated, scaling, tensor

import curvature as cv
from curvature.probes.spectral_criteria import spectral_criteria


def density(values, probes=5, steps=30, seed=0):
    return cv.spectral_density(free(rotated(values)), probes=probes, steps=steps, seed=seed)


def test_of_two_eigenvalues_they_are_what_the_formulas_say():
    found = spectral_criteria(density(tensor(-1, 4)))
    torch.testing.assert_close(found.value, tensor(0.25, 0.5, 0.25), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        spectral_criteria(density(tensor(-1, 4)), n=0.25).value, tensor(0.25, 0.25**0.25, 0.25), rtol=1e-12, atol=0
    )
    assert found.dof == 0 and found.names == ("r_e", "K_H", "K_1") and "r_e" in found.summary()


@pytest.mark.parametrize(
    "values", [linspace(0, 3, 40), linspace(1, 3, 40), torch.cat([torch.zeros(30), torch.ones(10)])]
)
def test_of_a_psd_matrix_they_are_zero(values):
    """Up to rounding, by some eps of the largest, of an eigenvalue that is zero; K_H takes its root."""
    found = spectral_criteria(density(values.double(), steps=12)).value
    assert (found <= tensor(1e-15, 1e-8, 1e-15)).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_they_do_not_depend_on_the_unit_of_the_loss(scale):
    values = linspace(-1, 4, 30)
    found, other = (spectral_criteria(density(v, steps=4)).value for v in (values, scale * values))
    torch.testing.assert_close(found, other, rtol=1e-8, atol=0)


def test_the_ratio_of_traces_is_right_as_often_as_it_says():
    values = torch.cat([linspace(-1, 0, 80), linspace(0, 3, 120), tensor(10, 8)])
    truth = -float(values[values < 0].sum() / values[values > 0].sum())
    inside, errors, misses, seeds = 0, [], [], 50
    for seed in range(seeds):
        found = spectral_criteria(cv.spectral_density(scaling(values), probes=5, steps=14, seed=seed))
        low, high = found.interval(0.9)
        inside += bool(low[2] <= truth <= high[2])
        errors.append(float(found.stderr[2]))
        misses.append(float(found.value[2]) - truth)
    assert 0.77 <= inside / seeds <= 1  # three binomial standard deviations
    assert sum(e * e for e in errors) / seeds == pytest.approx(float(torch.tensor(misses).square().mean()), rel=0.35)


def test_the_floor_of_the_extremes_holds():
    values = linspace(-1, 4, 400)
    for seed in range(10):
        low, high = spectral_criteria(density(values, steps=6, seed=seed)).interval()
        assert low[0] <= 0.25 <= high[0] and high[0] - low[0] < 0.25


def test_mainly_negative_spectra_are_refused():
    for values in (tensor(-4, 1, 2), tensor(-1, -2), tensor(0, 0)):
        with pytest.raises(ValueError, match="mainly negative"):
            spectral_criteria(density(values))
    for n in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="n is a power"):
            spectral_criteria(density(tensor(-1, 4)), n=n)
