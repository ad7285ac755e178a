"""Pictures of roughness and of persistence: what is in the result is drawn, and nothing that is not finite stops it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from objectives import zoo

import curvature as cv
from curvature.plots.roughness import draw_persistence, draw_roughness
from curvature.probes.persistence import Persistence
from curvature.probes.roughness import roughness
from curvature.result import with_error

OBJECTIVE = next(case for case in zoo() if case.name == "classifier").objective()
ROUGH = roughness(OBJECTIVE, directions=12, radius=1.0)


def axes() -> Axes:
    return Figure().add_subplot()


def diagram(births: list[float], deaths: list[float], dimensions: list[int]) -> Persistence:
    return Persistence(
        births=torch.tensor(births, dtype=torch.float64),
        deaths=torch.tensor(deaths, dtype=torch.float64),
        dimensions=torch.tensor(dimensions),
        outside=0,
        cost=cv.Cost(),
        origin=ROUGH.origin,
    )


def test_the_profiles_of_roughness_are_drawn_with_the_index():
    ax = draw_roughness(ROUGH, axes())
    assert ax.texts[0].get_text() == f"roughness {with_error(float(ROUGH), float(ROUGH.stderr), ROUGH.dof)}"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["9 in 10 directions", "half of them", "median"]
    (median,) = [line for line in ax.lines if line.get_label() == "median"]
    expected = (ROUGH.profiles - ROUGH.profiles[:, 5:6]).median(0)  # torch takes the lower of two in the middle
    drawn = torch.from_numpy(np.asarray(median.get_ydata()))
    assert (drawn >= expected.values - 1e-12).all() and drawn[5] == 0
    assert ax.get_xlabel() and ax.get_ylabel() and not ax.get_title()


def test_in_small_panels_the_index_and_the_legend_have_room():
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for ax in figure.subplots(1, 3):
        draw_roughness(ROUGH, ax)
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert not ax.texts[0].get_window_extent().overlaps(ax.get_legend().get_window_extent())


def test_profiles_that_are_not_finite_are_left_out_of_the_bands():
    profiles = ROUGH.profiles.clone()
    profiles[0, 3] = math.inf
    lost = dataclasses.replace(ROUGH, profiles=profiles, value=torch.tensor(math.nan), stderr=torch.tensor(math.nan))
    ax = draw_roughness(lost, axes())
    assert "nan" in ax.texts[0].get_text() and all(np.isfinite(np.asarray(line.get_ydata())).all() for line in ax.lines)
    nothing = dataclasses.replace(lost, profiles=torch.full_like(profiles, math.nan))
    assert draw_roughness(nothing, axes()).get_legend() is None


def test_a_feature_that_never_dies_is_on_the_line_above():
    ax = draw_persistence(diagram([0.0, 1.0, 2.0], [math.inf, 3.0, 4.0], [0, 0, 1]), axes())
    basins, loops = (line for line in ax.lines if line.get_label() in ("basins", "loops"))
    top = max(np.asarray(basins.get_ydata()))
    assert 4 < top < ax.get_ylim()[1] and np.asarray(loops.get_ydata()).tolist() == [4.0]
    assert any(text.get_text() == "never" for text in ax.texts)


@pytest.mark.parametrize(
    ("births", "deaths"), [([], []), ([2.0], [math.inf]), ([-math.inf, 1.0], [math.inf, 3.0]), ([0.0], [math.inf])]
)
def test_degenerate_diagrams_can_be_drawn(births, deaths, tmp_path):
    ax = draw_persistence(diagram(births, deaths, [0] * len(births)), axes())
    ax.figure.savefig(tmp_path / "a.png")
    low, high = ax.get_xlim()
    assert high > low and sum(len(np.asarray(line.get_xdata())) for line in ax.lines[2:]) == len(births)
