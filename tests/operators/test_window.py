"""Windows of gradients at one point: what their Fisher matrix estimates."""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.parametrize("name", ["class-weights-and-ignored", "tokens", "lstm", "dropout", "norm"])
def test_all_gradients_average_to_that_of_the_objective_without_its_regulariser(name):
    """With unequal numbers of terms, class weights, dropout and batch statistics as well."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    made = {
        "dropout": nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double(),
        "norm": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double(),
    }
    if name in made:
        objective = cv.Objective.of(made[name], "cross-entropy", [(x[:5], y[:5]), (x[5:], y[5:])], mode="train", l2=3.0)
        plain = replace(objective, l2=0.0)
    else:
        case = CASES[name]
        objective, plain = case.objective(l2=3.0), case.objective()
    count = len(cv.example_gradients(objective))
    window = cv.gradient_window(objective, count)
    torch.testing.assert_close(window.gradients.mean(0), plain.gradient(), rtol=1e-9, atol=1e-12)
    halves = cv.gradient_window(objective, 2, batch_size=count // 2)
    torch.testing.assert_close(halves.gradients.mean(0), plain.gradient(), rtol=1e-9, atol=1e-12)


def test_what_all_examples_share_is_not_an_example():
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.places = nn.Linear(4, 3).double(), nn.Embedding(4, 4).double()

        def forward(self, place_ids, x):
            return self.layer(x + self.places(place_ids).mean(1))

    batch = {"place_ids": torch.arange(4)[None], "x": CASE.inputs, "labels": CASE.targets}
    objective = cv.Objective.of(Placed(), "cross-entropy", [batch])
    window = cv.gradient_window(objective, 9)
    torch.testing.assert_close(window.fisher.dense(), cv.empirical_fisher(objective).dense(), rtol=1e-10, atol=1e-13)


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
    with pytest.raises(ValueError, match="1 to 9 examples"):
        cv.gradient_window(objective, 3, batch_size=0)
    with pytest.raises(TypeError, match="takes an Objective, but got a Sequential"):
        cv.gradient_window(CASE.module, 3)  # pyright: ignore
