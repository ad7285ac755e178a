"""Stochastic Neumann series against dense solves: the damping that is said, and errors that are there."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping
from objectives import zoo
from torch import Tensor, nn

import curvature as cv

SIZES = (2, 6, 4, 8, 4)


def least_squares(sizes: tuple[int, ...] = SIZES, seed: int = 1) -> cv.Objective:
    """A linear model, whose GGN and Hessian are the second moment of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([2.0, 1.0, 0.5, 0.1])
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64) * spread
    batches = list(zip(x.split(list(sizes)), x.sum(1, keepdim=True).split(list(sizes)), strict=True))
    return cv.Objective.of(nn.Linear(4, 1, bias=False).double(), cv.SquaredError(scale=1), batches)


def solved(matrix: cv.LinearOperator, b: Tensor, damping: float) -> Tensor:
    n = len(b)
    return torch.linalg.solve(matrix.dense() + damping * torch.eye(n, dtype=b.dtype), b)


B = torch.tensor([1.0, -2.0, 0.5, 1.0], dtype=torch.float64)


def test_with_one_batch_it_is_the_series_and_solves_with_the_damping_that_is_said():
    objective = least_squares((24,))
    found = cv.lissa(cv.ggn, objective, B, damping=0.3, steps=1400, repeats=2)
    torch.testing.assert_close(found.value, solved(cv.ggn(objective), B, 0.3), rtol=1e-10, atol=0)
    assert float(found.stderr.max()) == 0 and float(found.floor) < 1e-10
    scale = found.origin.options["scale"]
    other = solved(cv.ggn(objective), B, 0.3 * scale)  # what the same number says as delta of the papers
    assert float((found.value - other).norm()) > 0.5 * float(found.value.norm())


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_so_many_steps_are_so_many_terms_and_one_and_the_floor_bounds_the_rest(steps):
    objective = least_squares((24,))
    H, one = cv.ggn(objective).dense(), torch.eye(4, dtype=torch.float64)
    found = cv.lissa(cv.ggn, objective, B, damping=0.3, steps=steps, repeats=2)
    scale = found.origin.options["scale"]
    rest = one - (H + 0.3 * one) / scale
    terms = [torch.linalg.matrix_power(rest, k) @ B / scale for k in range(steps + 1)]
    torch.testing.assert_close(found.value, torch.stack(terms).sum(0), rtol=1e-12, atol=0)
    assert float((found.value - solved(cv.ggn(objective), B, 0.3)).norm()) <= float(found.floor)


def test_intervals_hold_the_solution():
    """60 seeds of 4 entries, batches of unequal size: a true 95 % would be seen within 0.88 and 1."""
    objective = least_squares()
    truth, held, near = solved(cv.ggn(objective), B, 2.0), [], []
    for seed in range(60):
        found = cv.lissa(cv.ggn, objective, B, damping=2.0, steps=50, repeats=5, scale=13.0, seed=seed)
        low, high = found.interval()
        held.append((low <= truth) & (truth <= high))
        near.append((found.value - truth).abs() <= found.stderr)  # 63 % with 4 degrees of freedom
        assert float(found.floor) < 0.1 * float(found.stderr.max()) < 0.1 * float(truth.norm())
    assert 0.88 <= float(torch.stack(held).double().mean()) <= 0.995
    assert 0.5 <= float(torch.stack(near).double().mean()) <= 0.76


def test_it_is_as_noisy_as_the_recursion_of_the_papers():
    """h <- b + (1 - delta) h - H_j h / scale, of which h / scale is taken, simulated with dense matrices."""
    objective, scale, steps, repeats = least_squares(), 12.0, 60, 150
    found = cv.lissa(cv.ggn, objective, B, damping=1.0, steps=steps, repeats=repeats, scale=scale)
    dense = torch.stack([cv.ggn(part).dense() for _, part in objective.split()])
    terms = torch.tensor([terms for terms, _ in objective.split()])
    generator, count = torch.Generator().manual_seed(5), 4000
    h = B.expand(count, 4)
    for _ in range(steps):
        drawn = torch.multinomial(terms, count, replacement=True, generator=generator)
        h = B + (1 - 1 / scale) * h - torch.einsum("rij,rj->ri", dense[drawn], h) / scale
    torch.testing.assert_close(found.stderr * repeats**0.5, (h / scale).std(0), rtol=0.25, atol=0)
    assert ((found.value - (h / scale).mean(0)).abs() <= 4.5 * found.stderr).all()


def test_the_scale_is_above_the_eigenvalues_of_every_batch():
    objective = zoo()[1].objective((1, 3, 2, 3))
    b = torch.ones(objective.space.size, dtype=torch.float64)
    found = cv.lissa(cv.ggn, objective, b, damping=0.1, steps=3, repeats=2)
    largest = max(float(torch.linalg.eigvalsh(cv.ggn(part).dense())[-1]) for _, part in objective.split())
    assert largest + 0.1 <= found.origin.options["scale"] <= 1.2 * (largest + 0.1)


def test_more_batches_cost_no_more_products_and_passes_are_over_all():
    found = cv.lissa(cv.ggn, least_squares(), B, damping=0.3, steps=30, repeats=3, scale=40.0)
    assert found.cost.products == 90 and found.cost.passes == 18
    assert found.samples == 3 and found.dof == 2 and found.origin.question == "lissa"


def test_hessians_with_negative_eigenvalues_need_damping_beyond_them():
    case = zoo()[1]
    objective = case.objective((3, 6))
    b = torch.linspace(-1, 1, objective.space.size, dtype=torch.float64)
    least = float(torch.linalg.eigvalsh(case.dense_hessian())[0])
    assert least < -1e-3
    with pytest.raises(ValueError, match=r"is not positive definite\. Raise the damping, or take the GGN"):
        cv.lissa(cv.hessian, objective, b, damping=-least / 2, steps=10)
    damping = 0.5 - least
    found = cv.lissa(cv.hessian, objective, b, damping=damping, steps=200, repeats=20)
    truth = solved(cv.hessian(objective), b, damping)
    low, high = found.interval(0.9999)
    assert ((low <= truth) & (truth <= high)).all()
    assert float((found.value - truth).norm()) < 0.1 * float(truth.norm())


def test_the_floor_is_one_for_indefinite_matrices_too():
    """b along the most negative eigenvector, the whole data in one batch: the series is slowest there."""
    objective = zoo()[1].objective()
    values, vectors = torch.linalg.eigh(cv.hessian(objective).dense())
    damping, b = 0.05 - float(values[0]), vectors[:, 0].contiguous()
    found = cv.lissa(cv.hessian, objective, b, damping=damping, steps=20, repeats=2)
    error = float((found.value - b / (values[0] + damping)).norm())
    assert error <= float(found.floor) < 1.3 * error


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_divergence_is_found_and_named(scale):
    with pytest.raises(
        cv.NotConverged, match=rf"series diverges.*scale={scale:g} is too small for a batch.*Leave scale"
    ):
        cv.lissa(cv.ggn, least_squares(), B, damping=0.3, steps=1000, scale=scale)


def test_a_seed_gives_the_same_bits_and_float32_agrees():
    objective = least_squares()
    first, second, other = (
        cv.lissa(cv.ggn, objective, B, damping=0.3, steps=50, repeats=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.value, second.value) and torch.equal(first.stderr, second.stderr)
    assert not torch.equal(first.value, other.value)
    single = cv.lissa(cv.ggn, objective.to(dtype=torch.float32), B, damping=0.3, steps=50, repeats=3, seed=1)
    assert single.value.dtype == torch.float32
    torch.testing.assert_close(single.value.double(), first.value, rtol=1e-4, atol=1e-5)


def test_an_interrupt_returns_the_repeats_so_far():
    with pytest.raises(cv.Interrupted) as stop:
        cv.lissa(cv.ggn, least_squares(), B, damping=0.3, steps=20, run=cv.Run(progress=Stopping(3)))
    assert stop.value.result.samples == 4 and not stop.value.result.complete
    with pytest.raises(KeyboardInterrupt):
        cv.lissa(cv.ggn, least_squares(), B, damping=0.3, steps=20, run=cv.Run(progress=Stopping(0)))


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    objective, options = least_squares(), {"damping": 0.3, "steps": 40, "repeats": 5}
    path = tmp_path / "c"
    with pytest.raises(cv.Interrupted):
        cv.lissa(cv.ggn, objective, B, run=cv.Run(progress=Stopping(3), checkpoint=path), **options)
    resumed = cv.lissa(cv.ggn, objective, B, run=cv.Run(checkpoint=path), **options)
    whole = cv.lissa(cv.ggn, objective, B, **options)
    assert torch.equal(resumed.value, whole.value) and torch.equal(resumed.stderr, whole.stderr)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"b": torch.ones(3)}, r"b is a vector of 4 finite numbers, but got \(3,\) of torch.float32. Ask for one"),
        ({"b": torch.full((4,), float("nan"))}, "b is a vector of 4 finite numbers"),
        ({"b": [1.0] * 4}, "but got list"),
        ({"damping": 0.0}, "damping is positive and finite, but got 0.0"),
        ({"steps": 0}, "2 repeats for an error bar, but got steps=0, repeats=8"),
        ({"repeats": 1}, "got steps=9, repeats=1"),
        ({"scale": 0.2}, r"scale is above .* damping=0.3, but got 0.2. Leave it to be found"),
    ],
)
def test_arguments_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cv.lissa(cv.ggn, least_squares(), **{"b": B, "damping": 0.3, "steps": 9, **options})
    with pytest.raises(TypeError, match="lissa takes an Objective"):
        cv.lissa(cv.ggn, nn.Linear(4, 1), B, damping=0.3, steps=9)  # pyright: ignore[reportArgumentType]


def test_a_matrix_that_is_zero_leaves_the_damping():
    x = torch.zeros(4, 2)
    objective = cv.Objective.of(
        torch.nn.Linear(2, 1, bias=False), "mse", [(x[:2], torch.ones(2, 1)), (x[2:], torch.ones(2, 1))]
    )
    found = cv.lissa(cv.ggn, objective, torch.ones(2), damping=0.5, steps=3)
    torch.testing.assert_close(found.value, torch.full((2,), 2.0))
