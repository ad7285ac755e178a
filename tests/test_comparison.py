"""Comparisons: equal matrices are called different as often as is said, and every number is that of its formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from matrices import free, linspace, rotated, tensor

import curvature as cv
from curvature.comparison import _adjusted
from curvature.plots import save_picture

MATRIX = rotated(torch.cat([tensor(9, 4), linspace(-1, 1, 28)]))


def traced(matrix: torch.Tensor, seed: int, method: str = "hutchinson") -> cv.Estimate:
    return cv.trace(free(matrix), products=12, method=method, seed=seed)


@pytest.mark.parametrize("method", ["hutchinson", pytest.param("krylov", marks=pytest.mark.slow)])
def test_equal_matrices_with_other_seeds_are_different_in_one_of_twenty_cases(method):
    found = [cv.compare(traced(MATRIX, 2 * i, method), traced(MATRIX, 2 * i + 1, method)) for i in range(150)]
    wrong = sum(c["trace"].different for c in found)
    low, high = scipy.stats.binom.interval(0.999, 150, 0.05)
    assert wrong <= high
    assert method == "krylov" or wrong >= low  # krylov's error is said to be a bit larger than it is


@pytest.mark.slow
def test_several_numbers_are_called_different_in_one_of_twenty_cases_together():
    A = free(rotated(linspace(-1, 2, 40)))
    densities = [cv.spectral_density(A, probes=4, steps=5, seed=seed) for seed in range(200)]
    found = [cv.compare(*pair).different for pair in zip(densities[::2], densities[1::2], strict=True)]
    assert sum(map(bool, found)) <= scipy.stats.binom.isf(0.001, 100, 0.05)


def test_a_shared_seed_makes_the_test_careful_and_is_said():
    pairs = [(traced(MATRIX, i), traced(1.02 * MATRIX, i)) for i in range(20)]
    found = [cv.compare(*pair) for pair in pairs]
    assert not any(c.different for c in found)
    assert all("cancel" in c.summary()["seed"] for c in found)
    assert "seed" not in cv.compare(traced(MATRIX, 0), traced(MATRIX, 1)).summary()


def test_the_probability_is_that_of_welchs_test():
    first, second = traced(MATRIX, 0), cv.trace(free(1.5 * MATRIX), products=20, method="hutchinson", seed=1)
    found = cv.compare(first, second)
    row = found["trace"]
    counts = [e.dof + 1 for e in (first, second)]  # skewed samples count for fewer than they are
    deviations = [float(e.stderr) * count**0.5 for e, count in zip((first, second), counts, strict=True)]
    columns = zip((first, second), deviations, counts, strict=True)
    args = [x for e, deviation, count in columns for x in (float(e), deviation, count)]
    expected = scipy.stats.ttest_ind_from_stats(*args, equal_var=False)
    assert row.p == pytest.approx(expected.pvalue, rel=1e-4)  # but for the rounding floor
    a, b = (float(e.stderr) ** 2 for e in (first, second))
    assert row.dof == pytest.approx((a + b) ** 2 / (a**2 / first.dof + b**2 / second.dof), rel=1e-9)
    assert row.quantity.value == float(second) - float(first)
    assert found.quantities() == {"trace": row.quantity}


def test_holms_method():
    found = _adjusted({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert _adjusted({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_bounds_decide_where_nothing_is_random():
    near, far = (cv.eigsh(free(scale * MATRIX), 1, seed=1) for scale in (1.0, 1.1))
    again = cv.eigsh(free(MATRIX), 1, seed=2)
    assert cv.compare(near, again).different == ()
    found = cv.compare(near, far)
    assert found.different == ("lambda_max", "eigenvalue_1") and found["lambda_max"].p == 0
    rough = replace(far, residuals=far.residuals + 1)  # which may be anywhere within
    assert cv.compare(near, rough)["lambda_max"].p == 1
    one, other = (cv.trace(cv.Diagonal(tensor(1, x))) for x in (2, 3))
    assert cv.compare(one, other).different == ("trace",) and cv.compare(one, one).different == ()


def test_numbers_without_an_error_are_shown_and_not_judged():
    objective = cv.demo("digits").first(20)
    found = cv.compare(
        *(cv.line(o, objective.position, points=3) for o in (objective, objective.at(-objective.position)))
    )
    assert found["loss"].p is None and found["loss"].different is None and not found.different
    assert "no error is known" in str(found) and "0 of 0 numbers" in str(found)


def test_what_was_set_differently_is_named_and_it_is_saved(tmp_path):
    first, second = traced(MATRIX, 0), traced(2 * MATRIX, 1, "krylov")
    second = replace(second, origin=replace(second.origin, threads=99, versions={"torch": "9"}))
    found = cv.compare(first, second, labels=("old", "new"))
    named = {setting.name: (setting.first, setting.second) for setting in found.settings}
    assert named["seed"] == ("0", "1") and named["options.method"] == ("hutchinson", "krylov")
    assert named["threads"][1] == "99" and named["versions.torch"][1] == "9"
    assert "options.products" not in named
    loaded = cv.Comparison.load(found.save(tmp_path))
    assert str(loaded) == str(found) and loaded.rows == found.rows and loaded.settings == found.settings
    assert "new - old" in str(found) and torch.equal(loaded.results[1].value, second.value)


def test_numbers_of_one_only_are_left_out():
    density, trace = cv.spectral_density(free(MATRIX), probes=3, steps=5), traced(MATRIX, 3)
    found = cv.compare(density, trace)
    assert [row.name for row in found.rows] == ["trace"]
    assert found.left_out == ("lambda_max", "lambda_min", "negative_share", "outliers")
    assert "in one result only" in found.summary()["left out"]
    with pytest.raises(KeyError, match="There is no 'lambda_max' among trace"):
        found["lambda_max"]


def test_bad_input_is_refused():
    estimate, pairs = traced(MATRIX, 0), cv.eigsh(free(MATRIX), 1)
    with pytest.raises(ValueError, match="share no number: a Estimate of trace, and a Eigenpairs of lambda_max"):
        cv.compare(estimate, pairs)
    with pytest.raises(ValueError, match="between 0 and 1, but got 1"):
        cv.compare(estimate, estimate, level=1)
    with pytest.raises(ValueError, match="labels are two names"):
        cv.compare(estimate, estimate, labels=("a", "a"))
    with pytest.raises(ValueError, match="itself a comparison"):
        cv.compare(estimate, cv.compare(estimate, estimate))


def test_not_a_number_is_not_judged():
    estimate = traced(MATRIX, 0)
    row = cv.compare(estimate, replace(estimate, value=tensor(math.nan)[0]))["trace"]
    assert row.p is None and row.different is None


# Pictures


def test_spectra_are_drawn_on_one_axis():
    both = [cv.spectral_density(free(scale * MATRIX), probes=3, steps=6) for scale in (1, 3)]
    ax = cv.compare(*both, labels=("a", "b")).plot(Figure().add_subplot())
    curves = [line for line in ax.get_lines() if line.get_label().endswith("95 % band")]
    assert [line.get_label()[0] for line in curves] == ["a", "b"]
    for line, density in zip(curves, both, strict=True):
        t = torch.from_numpy(line.get_xdata())
        unit = min(d.unit for d in both)
        mass = density.density(t).value * (unit + t.abs()) / (density.unit + t.abs())
        expected = mass.clamp(min=min(0.5 / d.size for d in both) / 10)
        torch.testing.assert_close(torch.from_numpy(line.get_ydata()), expected)


def test_rows_are_drawn_relative_to_the_first():
    objective = cv.demo("digits").first(20)
    tables = [cv.sharpness(o, measures=("lambda_max", "trace"), products=8, seed=i)
              for i, o in enumerate((objective, objective.at(1.1 * objective.position)))]  # fmt: skip
    found = cv.compare(*tables)
    ax = found.plot(Figure().add_subplot())
    points = [float(line.get_xdata()[0]) for line in ax.get_lines() if len(line.get_xdata()) == 1]
    expected = [100 * (row.second - row.first) / row.first for row in found.rows]
    assert all(any(x == pytest.approx(point) for point in points) for x in expected)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["lambda_max", "trace"]


@pytest.mark.parametrize("axes", [1, 2])
def test_landscapes_are_drawn_on_one_scale(tmp_path, axes):
    objective = cv.demo("digits").first(20)
    look = {1: cv.line, 2: cv.plane}[axes]
    both = [look(o, cv.random_directions(o, axes), points=3) for o in (objective, objective.at(objective.position / 2))]
    save_picture(cv.compare(*both), tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 1000


def test_what_has_not_converged_is_not_judged():
    early, late = (cv.eigsh(free(k * MATRIX), max_steps=1, method="krylov", seed=k) for k in (1, 2))
    assert not early.converged.any()
    row = cv.compare(early, late)["lambda_max"]
    assert (row.p, row.different, row.converged) == (None, None, False) and "no error is known" in str(row)
    exact = [cv.eigsh(free(k * MATRIX)) for k in (1, 2)]
    assert cv.compare(*exact)["lambda_max"].different
