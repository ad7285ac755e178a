"""The largest stable learning rates: closed forms, steps just below and above them, and honest errors."""

from __future__ import annotations

import pytest
import torch
from objectives import zoo

import curvature as cv

CASES = [case for case in zoo() if case.name in ("classifier", "regression", "binary")]


def linear(inputs: torch.Tensor, *, sizes: int = 10, noise: float = 0.1) -> cv.Objective:
    """Least squares, (1/2) mean (w.x - y)^2, in batches of a size, at weights where not every gradient is zero."""
    torch.manual_seed(0)
    unit = torch.nn.Linear(inputs.shape[1], 1, bias=False).double()
    targets = inputs @ torch.ones(inputs.shape[1], 1).double() + noise * torch.randn(len(inputs), 1).double()
    data = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    return cv.Objective.from_loss(unit, lambda m, b: (m(b[0]) - b[1]).square().mean() / 2, data)


def trained(rule: str, rate: float, H: torch.Tensor, P: torch.Tensor, beta: float) -> float:
    """How much longer the way to the minimum of a parabola is after many steps, by the definition of each rule."""
    x = torch.linalg.eigh(P.rsqrt().diag() @ H @ P.rsqrt().diag() if rule == "Adam-like" else H).eigenvectors[:, -1]
    x = P.rsqrt() * x if rule == "Adam-like" else x
    start, v = x.norm(), torch.zeros_like(x)
    for step in range(4000):
        g = H @ x
        if rule == "gradient descent":
            x = x - rate * g
        elif rule == "momentum":
            v = beta * v + g
            x = x - rate * v
        elif rule == "Nesterov":
            v = beta * v + g
            x = x - rate * (g + beta * v)
        else:
            v = beta * v + (1 - beta) * g
            x = x - rate * v / (1 - beta ** (step + 1)) / P
    return float(x.norm() / start)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rates_are_thresholds_over_eigenvalues(case):
    objective = case.objective((4, len(case.inputs) - 4))
    found = cv.stable_learning_rates(objective, momentum=0.8, rtol=1e-10)
    H = case.dense_hessian()
    shares = torch.tensor([4, len(case.inputs) - 4]).double() / len(case.inputs)
    v = shares @ torch.stack([part.gradient().square() for _, part in objective.split()])
    P = v.sqrt() + 1e-8
    plain, adaptive = (torch.linalg.eigvalsh(M)[-1] for M in (H, H / (P[:, None] * P).sqrt()))
    expected = torch.stack([2 / plain, 3.6 / plain, 3.6 / (2.6 * plain), 3.6 / (0.2 * adaptive)])
    torch.testing.assert_close(found.value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sharpness, torch.stack([plain, adaptive]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", ["gradient descent", "momentum", "Nesterov", "Adam-like"])
def test_steps_shrink_below_a_rate_and_grow_above(rule):
    torch.manual_seed(0)
    x = torch.randn(40, 5).double() * torch.tensor([3, 1, 1, 0.5, 0.3]).double()
    objective = linear(x)
    found = cv.stable_learning_rates(objective, momentum=0.9, rtol=1e-10)
    H = x.T @ x / len(x)
    P = torch.stack([part.gradient().square() for _, part in objective.split()]).mean(0).sqrt() + 1e-8
    (place,) = [i for i, name in enumerate(found.names) if name.startswith(rule)]
    rate = float(found.value[place])
    assert trained(rule, 0.99 * rate, H, P, 0.9) < 0.1 and trained(rule, 1.01 * rate, H, P, 0.9) > 10


def test_a_second_moment_of_a_run_takes_the_place_of_that_of_the_batches():
    objective = CASES[0].objective()
    v = torch.linspace(1, 2, objective.space.size).double()
    found = cv.stable_learning_rates(objective, second_moment=v, eps=0.5, rtol=1e-10)
    P = v.sqrt() + 0.5
    largest = torch.linalg.eigvalsh(CASES[0].dense_hessian() / (P[:, None] * P).sqrt())[-1]
    assert float(found.value[3]) == pytest.approx(38 / float(largest), rel=1e-6)


@pytest.mark.parametrize("sizes", [64, 32, 2])
def test_batches_are_cut_for_the_error_where_they_are_few(sizes):
    objective = linear(torch.randn(64, 3).double(), sizes=sizes)
    found = cv.stable_learning_rates(objective, rtol=1e-10)
    parts = min(4, sizes)
    x = torch.cat([batch[0] for batch in objective.batches])
    values, vectors = torch.linalg.eigh(x.T @ x / 64)
    forms = (x @ vectors[:, -1]).square().view(-1, parts).mean(1)
    stderr = forms.std() / len(forms) ** 0.5
    assert found.samples == len(forms) == 64 // parts
    torch.testing.assert_close(found.stderr[0], 2 * stderr / values[-1] ** 2, rtol=1e-5, atol=0)


def test_batches_that_hang_together_are_not_cut():
    x = torch.randn(64, 3).double()
    unit = torch.nn.Linear(3, 1, bias=False).double()
    spread = cv.Objective.from_loss(unit, lambda m, b: m(b).var(), list(x.split(32)))  # within a batch
    assert cv.stable_learning_rates(spread).samples == 2
    pair = cv.Objective.from_loss(unit, lambda m, b: (m(b).view(2, 16) ** 2).mean(), list(x.split(32)))
    assert cv.stable_learning_rates(pair).samples == 2


def test_of_one_example_nothing_is_said_about_other_data():
    found = cv.stable_learning_rates(linear(torch.randn(1, 3).double()))
    assert found.samples == 1 and found.dof == 0 and not found.stderr.any()
    low, high = found.interval()
    assert (low <= found.value).all() and (found.value <= high).all()


def test_where_nothing_curves_upwards_there_is_no_limit():
    unit = torch.nn.Linear(2, 1, bias=False).double()
    cap = cv.Objective.from_loss(unit, lambda m, x: -m(x).square().mean(), torch.eye(2).double())
    assert cv.stable_learning_rates(cap).value.isinf().all()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [20, 200])
def test_error_bars_hold_the_rate_of_all_data_there_could_be(sizes):
    held = 0
    for seed in range(60):
        torch.manual_seed(seed)
        x = torch.randn(400, 3).double() * torch.tensor([3, 1, 0.5]).double()
        found = cv.stable_learning_rates(linear(x, sizes=sizes), rtol=1e-6)
        low, high = found.interval(0.9)
        held += bool(low[0] <= 2 / 9 <= high[0])
    assert 46 <= held <= 60  # 54 ± 2.3 of 60 at 90 %


def test_a_checkpoint_gives_the_same_bits(tmp_path):
    objective = CASES[0].objective((4, 5))
    whole = cv.stable_learning_rates(objective)
    for _ in range(2):
        again = cv.stable_learning_rates(objective, run=cv.Run(checkpoint=tmp_path / "rates"))
        assert torch.equal(again.value, whole.value) and torch.equal(again.stderr, whole.stderr)
    assert again.cost.products == whole.cost.products


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, "momentum from 0 to below 1"),
        ({"eps": 0.0}, "positive eps"),
        ({"second_moment": torch.ones(3)}, r"second moment \(\d+,\)"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        cv.stable_learning_rates(CASES[0].objective(), **options)
