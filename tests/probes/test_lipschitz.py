"""Lipschitz constants from below: what the ratios are on functions whose constants are known, and nothing beyond."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from functions import made
from matrices import Stopping, linspace, rotated, tensor
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes.lipschitz import Lipschitz, gradient_lipschitz, gradient_lipschitz_along, hessian_lipschitz

CASE = next(case for case in zoo() if case.name == "regression")
BOTH = pytest.mark.parametrize("ask", [gradient_lipschitz, hessian_lipschitz])


def quadratic(values: Tensor) -> cv.Objective:
    matrix = rotated(values)
    return made(lambda w: w @ matrix.to(w) @ w / 2, torch.ones_like(values))


def seen_by(ask, objective: cv.Objective, monkeypatch, **options) -> tuple[Lipschitz, Tensor]:
    """The result, and the points that were looked at, as the objective was asked to be there."""
    objective.check()  # which looks elsewhere too
    seen, at = [], cv.Objective.at
    with monkeypatch.context() as patch:
        patch.setattr(cv.Objective, "at", lambda self, row: [seen.append(row.clone()), at(self, row)][1])
        found = ask(objective, **options)
    return found, torch.stack(seen)


@pytest.mark.parametrize("values", [linspace(0.1, 5, 12), torch.cat([linspace(-7, -5, 3), linspace(0, 4, 9)])])
def test_of_a_quadratic_it_is_the_largest_curvature_and_never_more(values):
    highest = float(values.abs().max())
    single = gradient_lipschitz(quadratic(values), radius=1.0, steps=1, pairs=40)
    assert single.largest < highest * (1 + 1e-9) and single.largest < 0.95 * highest
    few = gradient_lipschitz(quadratic(values), radius=1.0, steps=4, pairs=40)
    assert (few.ratios >= single.ratios).all() and few.largest < highest * (1 + 1e-9)
    many = gradient_lipschitz(quadratic(values), radius=1.0, steps=100, pairs=3)
    torch.testing.assert_close(many.ratios, torch.full((3,), highest).double(), rtol=1e-6, atol=0)


def test_random_pairs_see_the_root_mean_square_curvature():
    values = linspace(0.1, 5, 12)
    found = gradient_lipschitz(quadratic(values), radius=1.0, steps=1, pairs=100)
    squares = found.ratios.square()
    assert abs(float(squares.mean() - values.square().mean())) < 4 * float(squares.std()) / 10


def test_the_hessian_of_a_quadratic_does_not_change():
    found = hessian_lipschitz(quadratic(linspace(-1, 5, 12)), radius=1.0)
    assert found.largest < 1e-12 and (found.ratios <= found.noise).all()


def test_of_a_cubic_the_hessian_changes_by_its_coefficient():
    cubic = made(lambda w: -3 * w.pow(3).sum() / 6, tensor(0.7))
    torch.testing.assert_close(hessian_lipschitz(cubic, radius=0.5).ratios, torch.full((4,), 3.0).double())


def test_the_hessian_is_looked_at_where_it_changes_most():
    """Of a sum of cubics every coefficient is a maximum among directions near its own; random ones see little of it."""
    sizes = tensor(1, -2, 4, -8, 3, 0, 0, 0, 0, 0)
    cubics = made(lambda w: (sizes * w.pow(3)).sum() / 6, torch.zeros(10).double())
    single, found = (hessian_lipschitz(cubics, radius=1.0, steps=steps, pairs=6) for steps in (1, 3))
    assert (found.ratios >= single.ratios - 1e-9).all() and single.largest < 7
    assert all(float((sizes.abs() - ratio).abs().min()) < 1e-5 for ratio in found.ratios)
    assert found.largest == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@BOTH
def test_ratios_are_those_of_the_dense_derivatives_at_points_in_the_ball(ask, steps, monkeypatch):
    objective = CASE.objective(l2=0.1)

    def value(row: Tensor) -> Tensor:
        return CASE.value(row) + 0.05 * row @ row

    derivative = {
        gradient_lipschitz: lambda row: torch.autograd.functional.jacobian(value, row),
        hessian_lipschitz: lambda row: torch.autograd.functional.hessian(value, row),
    }[ask]
    found, seen = seen_by(ask, objective, monkeypatch, radius=2.0, distance=0.5, pairs=3, steps=steps)
    points = seen.view(3, 1 + steps, -1)  # of each pair u, and every v
    assert float((points - objective.position).norm(dim=2).max()) <= 2.0
    distances = (points[:, 1:] - points[:, :1]).norm(dim=2)
    torch.testing.assert_close(distances, torch.full_like(distances, 0.5))
    expected = [
        max(float(torch.linalg.norm(derivative(v) - derivative(u), 2)) / 0.5 for v in others) for u, *others in points
    ]
    torch.testing.assert_close(found.ratios, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.largest == float(found.ratios.max()) and float(found) == pytest.approx(float(found.ratios.mean()))


def test_points_are_uniform_in_the_ball(monkeypatch):
    """Of n dimensions: the share of the volume within a share of the radius is its n-th power."""
    for n in (1, 3):
        options = {"radius": 1.0, "distance": 1e-6, "pairs": 150, "steps": 1}
        _, seen = seen_by(gradient_lipschitz, quadratic(torch.ones(n).double()), monkeypatch, **options)
        shares = ((seen[::2] - 1).norm(dim=1) ** n).sort().values
        assert float((shares - linspace(0, 1, 150)).abs().max()) < 1.63 / 150**0.5  # Kolmogorov-Smirnov, 1 %
        assert float((seen[::2] - 1).mean(0).abs().max()) < 4 / 150**0.5


def test_along_rows_it_is_the_ratio_between_each_and_the_next():
    objective = CASE.objective((4, 5))
    rows = objective.position + torch.randn(5, objective.space.size).double()
    found = gradient_lipschitz_along(objective, rows)
    gradients = [objective.at(row).gradient() for row in rows]
    expected = [
        float((h - g).norm() / (v - u).norm())
        for (u, v), (g, h) in zip(itertools.pairwise(rows), itertools.pairwise(gradients), strict=True)
    ]
    torch.testing.assert_close(found.ratios, torch.tensor(expected, dtype=torch.float64))
    assert found.dof == 0 and found.interval()[0] == found.value - found.floor and found.cost.passes == 5
    still = gradient_lipschitz_along(objective, rows[[0, 0, 1]])
    assert still.ratios.isnan().tolist() == [True, False] and math.isnan(still.largest)


@pytest.mark.parametrize(("seeds", "fewest", "most"), [(20, 16, 20), pytest.param(100, 91, 99, marks=pytest.mark.slow)])
def test_the_error_bar_of_the_mean_is_honest(seeds, fewest, most):
    objective = quadratic(linspace(0.1, 5, 6))
    truth = gradient_lipschitz(objective, radius=1.0, steps=1, pairs=seeds * 20, seed=999).ratios.mean()
    found = [gradient_lipschitz(objective, radius=1.0, steps=1, seed=seed) for seed in range(seeds)]
    inside = sum(bool(low <= truth <= high) for low, high in (one.interval(0.95) for one in found))
    assert fewest <= inside <= most


@pytest.mark.parametrize("distance", [3e-4, 3e-2, 1.0])
def test_the_noise_bounds_what_float32_changes(distance):
    fine = CASE.objective()
    rows = (fine.position + distance * torch.randn(6, fine.space.size).double() / fine.space.size**0.5).float()
    coarse = gradient_lipschitz_along(fine.to(dtype=torch.float32), rows)
    exact = gradient_lipschitz_along(fine, rows.double())
    assert ((coarse.ratios - exact.ratios).abs() <= coarse.noise).all()
    assert coarse.floor == pytest.approx(float(coarse.noise.mean()))


@pytest.mark.parametrize("distance", [2e-3, 2e-2])
def test_in_float32_the_noise_bounds_what_the_change_of_the_hessian_has_of_it(distance):
    fine = CASE.objective()
    options = {"radius": 0.2, "distance": distance, "steps": 1, "pairs": 8}
    coarse, exact = (hessian_lipschitz(o, **options) for o in (fine.to(dtype=torch.float32), fine))
    assert ((coarse.ratios - exact.ratios).abs() <= coarse.noise).all()
    assert ((coarse.ratios - exact.ratios).abs() > 10 * exact.noise).all()


def test_a_ratio_that_may_be_rounding_says_so():
    coarse = quadratic(linspace(-1, 5, 12)).to(dtype=torch.float32)
    assert "take a larger distance, or dtype=torch.float64" in str(hessian_lipschitz(coarse, radius=1.0))
    assert "rounding" not in str(gradient_lipschitz(coarse, radius=1.0))


def test_kinks_have_ratios_that_grow_as_points_come_nearer():
    kink = made(lambda w: w.abs().sum(), torch.zeros(1).double())
    found = [gradient_lipschitz(kink, radius=r, pairs=20).largest for r in (1.0, 0.1)]
    assert found[0] > 2 and found[1] == pytest.approx(10 * found[0])


def test_what_is_not_finite_is_kept():
    steep = made(lambda w: (400 * w).exp().sum(), torch.zeros(1).double())
    found = gradient_lipschitz(steep, radius=4.0, pairs=8)
    assert not found.ratios.isfinite().all() and not math.isfinite(found.largest)
    with pytest.raises(cv.NonFinite):
        hessian_lipschitz(steep, radius=4.0, pairs=8)


def test_where_nothing_changes_the_ratio_is_zero():
    flat = made(lambda w: 0 * w.sum(), torch.zeros(3).double())
    assert gradient_lipschitz(flat, radius=1.0).ratios.tolist() == [0.0] * 8


@BOTH
def test_the_model_never_notices(ask):
    objective = CASE.objective()
    with untouched(objective.function.module):
        ask(objective, radius=0.1, pairs=2)


@BOTH
def test_it_goes_on_where_it_was_and_returns_what_it_has(ask, tmp_path):
    objective, path = CASE.objective(), tmp_path / "lipschitz.ckpt"
    whole = ask(objective, radius=1.0, pairs=5)
    with pytest.raises(cv.Interrupted) as caught:
        ask(objective, radius=1.0, pairs=5, run=cv.Run(progress=Stopping(2), checkpoint=path))
    part = caught.value.result
    assert not part.complete and torch.equal(part.ratios, whole.ratios[:3]) and part.samples == 3
    resumed = ask(objective, radius=1.0, pairs=5, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.ratios, whole.ratios) and resumed.cost.products == whole.cost.products
    assert torch.equal(ask(objective, radius=1.0, pairs=5).ratios, whole.ratios)
    assert not torch.equal(ask(objective, radius=1.0, pairs=5, seed=1).ratios, whole.ratios)
    with pytest.raises(cv.BadFile):
        ask(objective, radius=2.0, pairs=5, run=cv.Run(checkpoint=path))
    with pytest.raises(KeyboardInterrupt) as early:
        ask(objective, radius=1.0, run=cv.Run(progress=Stopping(0)))
    assert not isinstance(early.value, cv.Interrupted)


def test_a_path_goes_on_where_it_was(tmp_path):
    objective, path = CASE.objective(), tmp_path / "along.ckpt"
    rows = objective.position + torch.randn(6, objective.space.size).double()
    whole = gradient_lipschitz_along(objective, rows)
    with pytest.raises(cv.Interrupted) as caught:
        gradient_lipschitz_along(objective, rows, run=cv.Run(progress=Stopping(3), checkpoint=path))
    assert torch.equal(caught.value.result.ratios, whole.ratios[:3])
    resumed = gradient_lipschitz_along(objective, rows, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.ratios, whole.ratios) and resumed.cost.passes == 6


def test_it_is_saved(tmp_path):
    found = gradient_lipschitz(CASE.objective(), radius=1.0, pairs=3)
    assert found.origin.seed == 0 and "of 3)" in str(found)
    assert str(Lipschitz.load(found.save(tmp_path))) == str(found)


@BOTH
def test_bad_input_is_refused(ask):
    objective = CASE.objective()
    for options, message in (
        ({"radius": 0.0}, "positive radius"),
        ({"radius": math.inf}, "positive radius"),
        ({"radius": 1.0, "distance": 2.0}, "a distance within it"),
        ({"radius": 1.0, "distance": 0.0}, "a distance within it"),
        ({"radius": 1.0, "pairs": 1}, "2 pairs at least"),
        ({"radius": 1.0, "steps": 0}, "and a step"),
        ({"radius": 1e-14}, "Take a distance of"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(objective, **options)
    assert objective.meter.passes == 0
    with pytest.raises(TypeError, match="takes an Objective"):
        ask(nn.Linear(2, 1), radius=1.0)


def test_bad_rows_are_refused():
    objective = CASE.objective()
    for rows in (torch.zeros(1, objective.space.size), torch.zeros(4, 3), torch.zeros(objective.space.size)):
        with pytest.raises(ValueError, match="Expected two points"):
            gradient_lipschitz_along(objective, rows)
    with pytest.raises(TypeError, match="takes an Objective"):
        gradient_lipschitz_along(nn.Linear(2, 1), torch.zeros(2, 3))  # pyright: ignore[reportArgumentType]
