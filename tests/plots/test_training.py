"""Pictures of stable learning rates and of the gradient's share draw what the results hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from objectives import zoo

import curvature as cv

OBJECTIVE = next(case for case in zoo() if case.name == "classifier").objective((4, 5))


def test_rates_are_points_with_intervals_on_a_logarithmic_axis():
    found = cv.stable_learning_rates(OBJECTIVE)
    ax = found.plot(Figure().add_subplot())
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_yticklabels()] == list(found.names)
    assert ax.lines[0].get_xdata() == pytest.approx(found.value.numpy())
    low, high = ax.get_xlim()
    assert low > 0 and high > float(found.value.max())


def test_a_rule_without_a_limit_is_told_and_not_drawn():
    found = cv.stable_learning_rates(OBJECTIVE)
    ax = replace(found, value=torch.tensor([torch.inf, 1.0, 1.0, 1.0]).double()).plot(Figure().add_subplot())
    assert ax.get_yticklabels()[0].get_text() == "gradient descent: no limit"
    assert np.asarray(ax.lines[0].get_xdata()).tolist() == [1, 1, 1]


def test_the_gradients_share_is_drawn_beside_that_of_batches_and_of_chance():
    found = cv.gradient_share(OBJECTIVE, cv.eigsh(cv.hessian(OBJECTIVE), 3))
    ax = found.plot(Figure().add_subplot())
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert lines["gradient"] == pytest.approx(found.value.numpy())
    assert lines["a random direction"] == pytest.approx([i / OBJECTIVE.space.size for i in (1, 2, 3)])
