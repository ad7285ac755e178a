"""Pictures of paths: the curve, its chord and its barrier are those of the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import curvature as cv
from curvature.plots.path import draw_path
from curvature.probes.path import Path, interpolate, path


def axes():
    return Figure().add_subplot()


@pytest.fixture(scope="module")
def hump() -> Path:
    objective = cv.demo("digits").first(60)
    there, other = objective.position, list(objective.first(20).batches)
    knots = torch.stack([there, 0 * there, 1.1 * there])  # by way of a network that knows nothing
    return path(objective, knots, points=11, beyond=0.2, accuracy=True, held_out=other)


@pytest.mark.parametrize("over", ["t", "arc"])
def test_the_curve_the_chord_and_the_barrier_are_those_of_the_result(hump, over):
    ax = axes()
    assert draw_path(hump, ax, over=over) is ax
    x = (hump.t if over == "t" else hump.arc).numpy()
    chord, curve, ends, held_out, barrier = ax.get_lines()
    np.testing.assert_array_equal(curve.get_xdata(), x)
    np.testing.assert_array_equal(curve.get_ydata(), hump.loss.numpy())
    np.testing.assert_array_equal(held_out.get_ydata(), hump.held_out_loss.numpy())
    np.testing.assert_array_equal(ends.get_ydata(), hump.loss[hump.between][[0, -1]].numpy())
    np.testing.assert_array_equal(chord.get_ydata(), hump.chord(hump.loss).numpy())
    low, high = barrier.get_ydata()
    assert hump.barrier > 1
    assert high - low == pytest.approx(hump.barrier)
    (text,) = ax.texts
    assert text.get_text() == f"barrier {hump.barrier:.3g}"
    (twin,) = [other for other in ax.figure.axes if other is not ax]
    assert twin.get_ylabel() == "accuracy" and len(twin.get_lines()) == 2
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"loss", "held-out loss", "accuracy", "held-out accuracy"}
    assert ax.get_xlabel() and ax.get_ylabel() == "loss"


def test_without_a_barrier_none_is_drawn():
    objective = cv.Objective.from_loss(
        torch.nn.Linear(1, 1, bias=False), lambda m, x: m(x).square().mean(), torch.ones(1, 1)
    )
    ax = draw_path(interpolate(objective.at(-torch.ones(1)), torch.ones(1), points=5), axes())
    assert not ax.texts and len(ax.get_lines()) == 3 and ax.get_legend() is None


def test_over_something_else_is_refused(hump):
    with pytest.raises(ValueError, match="over is"):
        draw_path(hump, axes(), over="x")
