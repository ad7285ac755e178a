"""Windows of gradients at one point: what their Fisher matrix estimates."""

from __future__ import annotations

import pytest
import torch
from objectives import Case, zoo
from torch import nn

import curvature as cv

CASES = {case.name: case for case in zoo()}
CASE = CASES["classifier"]


def gradients_of_examples(case: Case) -> torch.Tensor:
    """By autograd, one example at a time: of the mean over its terms."""
    rows = []
    for x, y in zip(case.inputs.split(1), case.targets.split(1), strict=True):
        alone = Case(case.name, case.module, case.loss, case.mean_loss, x, y)
        rows.append(torch.autograd.functional.jacobian(alone.value, case.flat))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["softmax-regression", "classifier", "regression", "binary", "attention", "frozen"])
@pytest.mark.parametrize("sizes", [None, (1, 3, 4)])
def test_all_examples_give_the_mean_of_their_outer_products(name, sizes):
    case = CASES[name]
    rows = gradients_of_examples(case)
    sizes = sizes and (*sizes, len(rows) - 8) if len(rows) > 8 else sizes
    window = cv.gradient_window(case.objective(sizes), len(rows), seed=3)
    torch.testing.assert_close(window.fisher.dense(), rows.T @ rows / len(rows), rtol=1e-10, atol=1e-13)


def test_of_one_term_each_they_make_up_the_empirical_fisher_matrix():
    objective = CASE.objective((4, 5))
    window = cv.gradient_window(objective, 9)
    torch.testing.assert_close(window.fisher.dense(), cv.empirical_fisher(objective).dense(), rtol=1e-10, atol=1e-13)


def test_mini_batches_that_are_all_of_the_data_average_to_its_gradient():
    objective = CASE.objective()
    window = cv.gradient_window(objective, 3, batch_size=3)
    torch.testing.assert_close(window.gradients.mean(0), objective.gradient(), rtol=1e-10, atol=1e-13)


def test_of_mini_batches_it_is_the_share_of_the_covariance_that_averaging_leaves():
    """C / B + g g^T, with the correction for draws from nine examples without replacement."""
    objective, rows, size = CASE.objective(), gradients_of_examples(CASE), 3
    window = cv.gradient_window(objective, 600, batch_size=size)
    covariance = torch.cov(rows.T, correction=0) / size * (9 - size) / (9 - 1)
    expected = covariance + torch.outer(rows.mean(0), rows.mean(0))
    assert float((window.fisher.dense() - expected).norm() / expected.norm()) < 0.1


def test_windows_of_one_seed_are_equal_and_of_another_are_not():
    objective = CASE.objective((4, 5))
    first, same, other = (cv.gradient_window(objective, 5, seed=seed).gradients for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first.sort(0).values, other.sort(0).values)


def test_what_has_no_terms_and_the_regulariser_are_left_out():
    case = CASES["class-weights-and-ignored"]
    window = cv.gradient_window(case.objective(), 8)
    assert len(window) == 6
    torch.testing.assert_close(
        window.fisher.dense(), cv.gradient_window(case.objective(l2=3.0), 8).fisher.dense(), rtol=0, atol=0
    )


def test_dicts_and_what_belongs_to_no_example_are_cut_aright():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x, scale):
            return self.layer(x) * scale

    module = Scaled()
    batch = {"x": CASE.inputs, "scale": torch.tensor([1.0, 2.0, 0.5]).double(), "labels": CASE.targets}
    objective = cv.Objective.of(module, "cross-entropy", [batch])
    window = cv.gradient_window(objective, 9)
    torch.testing.assert_close(window.fisher.dense(), cv.empirical_fisher(objective).dense(), rtol=1e-10, atol=1e-13)


def test_bad_input_is_refused():
    objective = CASE.objective()
    with pytest.raises(ValueError, match="The data have 9 examples, but a window of 10"):
        cv.gradient_window(objective, 10)
    with pytest.raises(ValueError, match="one example at least"):
        cv.gradient_window(objective, 3, batch_size=0)
    with pytest.raises(TypeError, match="takes an Objective, but got a Sequential"):
        cv.gradient_window(CASE.module, 3)  # pyright: ignore
