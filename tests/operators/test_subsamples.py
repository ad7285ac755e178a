"""Errors that come from the data: those of the mean over batches, apart from those of the random vectors."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping
from objectives import zoo
from torch import nn

import curvature as cv

CASE = zoo()[1]
SIZES = (1, 3, 2, 3)


def by_hand(objective: cv.Objective, forms: list[float], terms: list[float]) -> tuple[float, float]:
    """Mean and standard error of values with weights."""
    shares = [t / sum(terms) for t in terms]
    mean = sum(s * f for s, f in zip(shares, forms, strict=True))
    spread = sum((s * (f - mean)) ** 2 for s, f in zip(shares, forms, strict=True))
    return mean, (spread * len(forms) / (len(forms) - 1)) ** 0.5


def test_an_exact_question_leaves_the_error_of_the_data():
    objective = CASE.objective(SIZES)
    n = objective.space.size
    result = cv.subsampled(cv.trace, cv.hessian, objective, products=n)
    traces = [float(cv.hessian(part).dense().trace()) for _, part in objective.split()]
    mean, stderr = by_hand(objective, traces, [terms for terms, _ in objective.split()])
    assert float(result) == pytest.approx(mean, rel=1e-12)
    assert float(result) == pytest.approx(float(cv.hessian(objective).dense().trace()), rel=1e-10)
    assert float(result.stderr) == float(result.data_stderr) == pytest.approx(stderr, rel=1e-10)
    assert float(result.probe_stderr) == 0 and (result.samples, result.dof) == (4, 3)
    assert result.cost.products == 4 * n


def test_the_two_errors_add_up_and_more_products_lessen_that_of_the_probes_only():
    objective = CASE.objective(SIZES)
    few, many = (cv.subsampled(cv.trace, cv.hessian, objective, products=k, method="hutchinson") for k in (4, 40))
    for result in (few, many):
        assert float(result.probe_stderr.square() + result.data_stderr.square()) == pytest.approx(
            float(result.stderr.square())
        )
        assert "of which data" in str(result) and "of which probes" in str(result)
    assert many.probe_stderr < few.probe_stderr


def test_vectors_have_their_errors_entry_by_entry():
    objective = CASE.objective(SIZES)
    result = cv.subsampled(cv.diagonal, cv.ggn, objective, products=objective.space.size)
    torch.testing.assert_close(result.value, cv.ggn(objective).dense().diagonal(), rtol=1e-9, atol=1e-12)
    assert result.data_stderr.shape == result.value.shape
    layers = cv.subsampled(
        lambda A, **options: cv.block_traces(A, objective.space.places(), **options), cv.ggn, objective, products=99
    )
    assert layers.names == tuple(objective.space.places())


def test_eigenvalues_have_the_error_of_first_order():
    objective = CASE.objective(SIZES)
    pairs = cv.eigsh(cv.hessian(objective), 3, rtol=1e-10)
    result = cv.eigenvalue_errors(pairs, cv.hessian, objective)
    torch.testing.assert_close(result.value, pairs.values)
    parts = objective.split()
    for v, stderr in zip(pairs.vectors, result.stderr, strict=True):
        forms = [float(v @ cv.hessian(part).dense() @ v) for _, part in parts]
        assert float(stderr) == pytest.approx(by_hand(objective, forms, [t for t, _ in parts])[1], rel=1e-9)


def regression(seed: int, batches: int) -> cv.Objective:
    """Least squares, whose matrix is the covariance of the inputs: eigenvalues 9, 4, 1, 1."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches * 20, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 1.0])
    data = list(zip(inputs.split(20), inputs.sum(1, keepdim=True).split(20), strict=True))
    return cv.Objective.of(nn.Linear(4, 1, bias=False).double(), "mse", data)


def test_intervals_hold_what_all_data_there_could_be_would_give():
    """100 data sets of 20 batches: a true 95 % would be seen within 0.88 and 1."""
    seeds, scale = range(100), 2.0  # the second derivative of a square
    traces = [cv.subsampled(cv.trace, cv.ggn, regression(seed, 20), products=2, method="hutchinson") for seed in seeds]
    inside = [float(e.interval()[0]) <= 15 * scale <= float(e.interval()[1]) for e in traces]
    assert sum(inside) / len(inside) >= 0.88
    # the interval of the probes alone is that of another question
    whole = [cv.trace(cv.ggn(regression(seed, 20)), products=4) for seed in range(20)]
    assert all(float(e.stderr) == 0 for e in whole) and not any(abs(float(e) - 15 * scale) < 1e-6 for e in whole)
    inside = []
    for seed in seeds:
        objective = regression(seed, 20)
        errors = cv.eigenvalue_errors(cv.eigsh(cv.ggn(objective), 1), cv.ggn, objective)
        inside.append(float(errors.interval()[0]) <= 9 * scale <= float(errors.interval()[1]))
    assert sum(inside) / len(inside) >= 0.88


def test_one_batch_says_nothing_about_other_data():
    with pytest.raises(cv.BadObjective, match="batch_size="):
        cv.subsampled(cv.trace, cv.hessian, CASE.objective())


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    objective, left = CASE.objective(SIZES), 3

    def stop(progress):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        cv.subsampled(cv.trace, cv.hessian, objective, run=cv.Run(progress=stop, checkpoint=path), products=8)
    resumed = cv.subsampled(cv.trace, cv.hessian, objective, run=cv.Run(checkpoint=path), products=8)
    whole = cv.subsampled(cv.trace, cv.hessian, objective, products=8)
    assert torch.equal(resumed.value, whole.value) and torch.equal(resumed.stderr, whole.stderr)


def test_what_is_not_linear_in_the_data_is_refused():
    with pytest.raises(ValueError, match="logdet is not linear in the data"):
        cv.subsampled(cv.logdet, cv.ggn, CASE.objective(SIZES), damping=0.1)


def test_an_interrupt_returns_the_batches_so_far():
    with pytest.raises(cv.Interrupted) as caught:
        cv.subsampled(cv.trace, cv.hessian, CASE.objective(SIZES), run=cv.Run(progress=Stopping(2)), products=8)
    assert caught.value.result.samples == 3 and not caught.value.result.complete
