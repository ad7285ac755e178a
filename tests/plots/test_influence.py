"""Pictures of influence: the ranked scores, and which examples they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import curvature as cv


@pytest.fixture(scope="module")
def train() -> cv.Objective:
    return cv.demo("digits").first(80)


def test_bars_of_one_test_carry_the_numbers_of_their_examples(train):
    found = cv.influence(train, train.gradient(), cv.identity(train.space), top=3)
    ax = found.plot(Figure().add_subplot())
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], found.ranked_scores.numpy())
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(i) for i in found.ranked.tolist()]
    assert ax.get_xlabel() == "training example" and "units of the loss" in ax.get_ylabel()
    many = cv.self_influence(train, cv.identity(train.space), top=70)
    assert not many.plot(Figure().add_subplot()).get_xticklabels()


def test_several_tests_have_a_column_of_points_each(train):
    found = cv.influence(train, train.first(5), cv.identity(train.space), top=2)
    ax = found.plot(Figure().add_subplot())
    points = torch.from_numpy(np.array(ax.collections[0].get_offsets()))
    torch.testing.assert_close(points[:, 1].view(4, 5), found.ranked_scores)
    assert points[:5, 0].tolist() == [0, 1, 2, 3, 4] and ax.get_xlabel() == "test example"
