"""Paths: the loss at their points, their length, and the numbers that are read from them."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from matrices import Stopping, rotated, tensor
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes.path import Path, bernstein, hats, interpolate, path

CASES = [case for case in zoo() if case.name in ("classifier", "regression", "convolution", "attention", "binary")]
KINDS = pytest.mark.parametrize("kind", ["polygon", "bezier"])


class Flat(nn.Module):
    """Parameters of which the loss is any function."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def of(function, size: int) -> cv.Objective:
    """The objective function(theta)."""
    return cv.Objective.from_loss(Flat(size), lambda m, x: function(m.theta) * x.mean(), torch.ones(1).double())


def knots_of(objective: cv.Objective, count: int = 4) -> Tensor:
    return objective.position + objective.space.draw(count, seed=3, kind="normal")


def normed() -> cv.Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.randn(12, 1, 4, 4).double(), torch.randint(0, 3, (12,))
    return cv.Objective.of(net.double(), "cross-entropy", [(x[:8], y[:8]), (x[8:], y[8:])])


def casteljau(knots: Tensor, t: float) -> Tensor:
    """The point of a Bézier curve by repeated interpolation."""
    while len(knots) > 1:
        knots = (1 - t) * knots[:-1] + t * knots[1:]
    return knots[0]


def on_polygon(knots: Tensor, t: float) -> Tensor:
    edge = min(max(int(t * (len(knots) - 1)), 0), len(knots) - 2)
    return knots[edge] + (t * (len(knots) - 1) - edge) * (knots[edge + 1] - knots[edge])


POINT = {"polygon": on_polygon, "bezier": casteljau}


@KINDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_point_is_the_value_of_the_objective_there(case, kind):
    objective = case.objective((4, len(case.inputs) - 4), l2=0.1)
    knots = knots_of(objective)
    found = path(objective, knots, kind=kind, points=9, beyond=0.3, norm="frozen")
    assert float(found.t[0]) == -0.3 and float(found.t[-1]) == 1.3
    for t, row, loss in zip(found.t.tolist(), found.rows, found.loss.tolist(), strict=True):
        torch.testing.assert_close(row, POINT[kind](knots, t), rtol=1e-12, atol=1e-12)
        assert loss == pytest.approx(objective.at(row).value(), rel=1e-10)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ends_are_the_values_of_the_objective_to_the_last_bit(case, dtype, kind):
    objective = case.objective((4, len(case.inputs) - 4), dtype=dtype)
    knots = knots_of(objective)
    found = path(objective, knots, kind=kind, points=5, beyond=0.5)
    ends = [float(found.loss[found.t == t]) for t in (0, 1)]
    assert ends == [objective.at(row).value() for row in knots[[0, -1]]]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("basis", [hats, bernstein])
def test_coefficients_sum_to_one_and_pick_the_ends(basis, count):
    t = torch.linspace(-0.5, 1.5, 21, dtype=torch.float64)
    torch.testing.assert_close(basis(t, count).sum(1), torch.ones(21).double(), rtol=0, atol=1e-12)
    assert torch.equal(basis(tensor(0, 1), count), torch.eye(count).double()[[0, -1]])


def test_on_a_quadratic_the_straight_line_has_no_barrier_and_the_known_heights():
    A = rotated(tensor(0.5, 1, 3, 8))
    objective = of(lambda theta: theta @ A @ theta / 2, 4)
    start, end = objective.space.draw(2, seed=1, kind="normal")
    found = interpolate(objective.at(start), end, points=11, beyond=0.2)
    way = end - start
    torch.testing.assert_close(found.loss, ((r := found.rows) @ A * r).sum(1) / 2, rtol=1e-12, atol=0)
    t = found.t[found.between]
    expected = -t * (1 - t) / 2 * (way @ A @ way)
    torch.testing.assert_close(found.heights(found.loss), expected, rtol=0, atol=1e-12)
    assert found.barrier == 0.0 and found.climb == 0.0
    torch.testing.assert_close(found.arc, found.t * way.norm(), rtol=1e-12, atol=1e-12)


def test_the_numbers_of_a_hump_are_those_of_its_points():
    objective = of(lambda theta: (math.pi * theta[0]).sin() + theta[0], 2)  # from 0 to 1, over 1.5 in the middle
    found = interpolate(objective, tensor(1, 0), points=101, beyond=0.1)
    assert found.barrier == pytest.approx(1.0, rel=1e-12)
    highest = math.acos(-1 / math.pi) / math.pi
    top = math.sin(math.pi * highest) + highest
    assert found.climb == pytest.approx(top - 1, abs=1e-3)
    assert found.variation == pytest.approx(2 * top - 1, abs=2e-3)
    assert found.mean == pytest.approx(2 / math.pi + 0.5, abs=1e-3)
    assert not found.monotone() and found.monotone(tol=1.0)
    assert interpolate(objective.at(tensor(0.7, 0)), tensor(1, 0), beyond=1.0).monotone()  # beyond it rises again
    assert "at t = 0.5" in str(found)


def test_the_length_of_a_polygon_is_that_of_its_edges():
    objective = of(lambda theta: theta.sum() * 0, 2)
    found = path(objective, tensor(0, 0, 3, 0, 3, 4, 3, 3).view(4, 2), points=61, beyond=1 / 3)
    at = {round(t, 6): arc for t, arc in zip(found.t.tolist(), found.arc.tolist(), strict=True)}
    for t, expected in ((-1 / 3, -3), (0, 0), (1 / 3, 3), (0.5, 5), (2 / 3, 7), (1, 8), (4 / 3, 9)):
        assert at[round(t, 6)] == pytest.approx(expected, abs=1e-12)
    skipping = path(objective, found.knots, points=3)  # corners between the points count, too
    torch.testing.assert_close(skipping.arc, tensor(0, 5, 8), rtol=1e-12, atol=1e-12)


def test_the_length_of_a_bezier_curve_is_the_limit_of_its_chords():
    objective = of(lambda theta: theta.sum() * 0, 5)
    knots = knots_of(objective)
    found = path(objective, knots, kind="bezier", points=5)
    fine = bernstein(torch.linspace(0, 1, 40001, dtype=torch.float64), 4) @ knots
    chords = fine.diff(dim=0).norm(dim=1).cumsum(0)
    torch.testing.assert_close(found.arc[1:], chords[9999::10000], rtol=1e-8, atol=0)


@KINDS
def test_a_path_of_knots_on_a_line_is_that_line(kind):
    objective = CASES[0].objective()
    start, end = knots_of(objective, 2)
    straight = interpolate(objective.at(start), end, points=7)
    found = path(
        objective, torch.stack([start, start + (end - start) / 3, end - (end - start) / 3, end]), kind=kind, points=7
    )
    for name in ("loss", "arc", "rows"):
        torch.testing.assert_close(getattr(found, name), getattr(straight, name), rtol=1e-10, atol=1e-12)


def test_the_mean_is_over_the_length_whatever_the_points():
    """An edge ten times as long counts ten times as much, though half of the points are on each."""
    objective = of(lambda theta: (theta[0] > 1).double() * (1 + 0 * theta[1]), 2)
    found = path(objective, tensor(0, 0, 1, 0, 11, 0).view(3, 2), points=2001)
    assert found.mean == pytest.approx(10 / 11, abs=1e-3)


@pytest.mark.parametrize("refine", [1, 6, 7])
def test_more_points_go_around_the_highest(refine):
    objective = of(lambda theta: (-((theta[0] - 0.437) ** 2) / 1e-3).exp(), 1)
    coarse = interpolate(objective, tensor(1), points=21)
    fine = interpolate(objective, tensor(1), points=21, refine=refine)
    assert len(fine.t) == 21 + refine and bool((fine.t.diff() > 0).all())
    added = fine.t[~torch.isin(fine.t, coarse.t)]
    assert len(added) == refine and float(added.min()) > 0.4 and float(added.max()) < 0.5
    assert coarse.barrier <= fine.barrier <= 1.0 and (refine < 6 or fine.barrier > 0.99)
    torch.testing.assert_close(fine.loss, (-((fine.t - 0.437) ** 2) / 1e-3).exp(), rtol=1e-10, atol=1e-300)


def test_at_an_end_they_go_to_its_one_side():
    objective = of(lambda theta: theta[0] ** 2, 1)  # nowhere above its chord: the highest are the ends
    found = interpolate(objective, tensor(1), points=3, refine=4)
    assert found.t.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 1])


def test_an_end_is_a_vector_an_objective_or_a_state():
    objective = CASES[0].objective()
    other = copy.deepcopy(objective.function.module)
    for p in other.parameters():
        nn.init.normal_(p)
    end = cv.Objective.of(other, "cross-entropy", (CASES[0].inputs[:3], CASES[0].targets[:3]))
    paths = [interpolate(objective, given, points=5) for given in (end, end.position, other.state_dict())]
    assert paths[0].loss[-1] == objective.at(end.position).value()  # the data are those of the objective
    for found in paths[1:]:
        assert torch.equal(found.loss, paths[0].loss)


def test_accuracy_and_other_data():
    objective = CASES[0].objective()
    other = (torch.randn(7, 4).double(), torch.randint(0, 3, (7,)))
    end = knots_of(objective, 1)[0]
    found = interpolate(objective, end, points=5, accuracy=True, held_out=other, refine=2)
    for row, accuracy, held_out_loss, held_out in zip(
        found.rows, found.accuracy, found.held_out_loss, found.held_out_accuracy, strict=True
    ):
        at = objective.at(row)
        for data, share in ((at, accuracy), (at.on(other), held_out)):
            with data.context():
                (right,) = [data.outputs(data.params, batch)[0].argmax(1) == batch[1] for batch in data.batches]
            assert float(share) == pytest.approx(float(right.double().mean()))
        assert float(held_out_loss) == pytest.approx(at.on(other).value(), rel=1e-12)
    assert found.held_out_barrier == float(found.heights(found.held_out_loss).max())
    assert "held-out barrier" in str(found) and "held-out barrier" not in str(interpolate(objective, end, points=3))


def test_between_scales_of_weights_before_a_normalisation_there_is_nothing_where_it_is_recalibrated():
    objective = normed()
    end = objective.at(
        {**objective.params, "0.weight": 3 * objective.params["0.weight"], "0.bias": 3 * objective.params["0.bias"]}
    )
    found = interpolate(objective, end, points=5)
    torch.testing.assert_close(found.loss, found.loss[:1].expand(5), rtol=1e-4, atol=0)  # BatchNorm's eps
    frozen = interpolate(objective, end, points=5, norm="frozen")
    assert abs(float(frozen.loss[-1] - frozen.loss[0])) > 0.01
    assert frozen.loss[0] == objective.value()
    assert "recalibrated" in str(found) and "frozen" in str(frozen)


def test_from_initialisation_to_solution_the_loss_falls_all_the_way():
    """Monotone linear interpolation (Goodfellow et al. 2015), on a network of 724 parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    y = torch.arange(4).repeat(50)
    x = torch.randn(4, 10)[y] + 0.7 * torch.randn(200, 10)
    begin = cv.Objective.of(net, "cross-entropy", (x, y))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    found = interpolate(begin, net.state_dict(), points=21)
    assert found.monotone() and found.barrier == 0.0 and float(found.loss[-1]) < 0.05 < 1.0 < float(found.loss[0])
    assert found.variation == pytest.approx(float(found.loss[0] - found.loss[-1]), rel=1e-12)


def test_the_plane_of_a_curve_holds_it():
    objective = CASES[0].objective()
    curve = path(objective, knots_of(objective, 3), kind="bezier", points=5)
    first, second = curve.plane
    assert float(first @ second) == pytest.approx(0, abs=1e-10)
    assert float(second.norm()) == pytest.approx(float(first.norm())) and torch.equal(
        first, curve.knots[2] - curve.knots[0]
    )
    seen = cv.plane(objective.at(curve.knots[0]), curve.plane, points=3)
    places = seen.coordinates_of(curve.rows)
    torch.testing.assert_close(curve.knots[0] + places @ curve.plane, curve.rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(places[[0, -1]], tensor(0, 0, 1, 0).view(2, 2), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="no plane of its own"):
        _ = interpolate(objective, curve.knots[2], points=2).plane
    with pytest.raises(ValueError, match="combination"):
        _ = path(objective, torch.stack([curve.knots[0], curve.knots[[0, 2]].mean(0), curve.knots[2]]), points=2).plane


def test_what_overflows_is_kept_and_counted():
    objective = of(lambda theta: (800 * theta[0]).exp(), 1)
    found = interpolate(objective, tensor(0.5), beyond=1.0, points=5, refine=2)
    assert torch.isinf(found.loss[-1]) and math.isfinite(found.barrier) and "not finite" in str(found)
    assert math.isnan(interpolate(objective, tensor(1), points=5).barrier)  # of an infinite end


@pytest.mark.parametrize("norm", ["frozen", "recalibrated", "batch"])
def test_the_model_never_notices(norm):
    objective = normed()
    with untouched(objective.function.module):
        interpolate(objective, objective.position * 1.1, points=3, norm=norm, accuracy=True, refine=1)


@pytest.mark.parametrize("after", [1, 3])  # along the path, and around its highest point
def test_it_goes_on_where_it_was_and_returns_what_it_has(tmp_path, after):
    objective = CASES[0].objective()
    end, place = knots_of(objective, 1)[0], tmp_path / "path.ckpt"
    options = {"points": 131, "refine": 70}
    whole = interpolate(objective, end, **options)
    with pytest.raises(cv.Interrupted) as caught:
        interpolate(objective, end, **options, run=cv.Run(progress=Stopping(after), checkpoint=place))
    part = caught.value.result
    known = part.loss.isfinite()
    assert not part.complete and int((~known).sum()) > 0 and bool(known[[0, -1]].all()) and math.isnan(part.barrier)
    assert torch.equal(part.loss[known], whole.loss[torch.isin(whole.t, part.t[known])])
    resumed = interpolate(objective, end, **options, run=cv.Run(checkpoint=place))
    assert torch.equal(resumed.loss, whole.loss) and torch.equal(resumed.t, whole.t) and resumed.complete
    with pytest.raises(cv.BadFile):
        interpolate(objective, 2 * end, **options, run=cv.Run(checkpoint=place))


def test_it_comes_back_from_a_file(tmp_path):
    objective = CASES[0].objective()
    found = path(objective, knots_of(objective), kind="bezier", points=5, accuracy=True)
    loaded = Path.load(found.save(tmp_path))
    assert loaded.kind == "bezier" and loaded.barrier == found.barrier and str(loaded) == str(found)
    assert torch.equal(loaded.rows, found.rows) and loaded.held_out_loss is None


def test_bad_input_is_refused():
    objective = CASES[0].objective()
    knots = knots_of(objective)
    for wrong, match in (
        ({"knots": knots[:1]}, "2 knots"),
        ({"knots": knots[:, 1:]}, "2 knots"),
        ({"kind": "spline"}, "kind is"),
        ({"points": 1}, "points is 2"),
        ({"refine": -1}, "refine 0 or more"),
        ({"beyond": -0.1}, "beyond"),
        ({"beyond": math.inf}, "beyond"),
        ({"norm": "off"}, "norm is"),
    ):
        with pytest.raises(ValueError, match=match):
            path(objective, **{"knots": knots, **wrong})
    with pytest.raises(cv.NonFinite, match="knots"):
        path(objective, knots / 0)
    with pytest.raises(cv.NonFinite, match="at the end"):
        interpolate(objective, knots[0] / 0)
    with pytest.raises(ValueError, match="flat vector"):
        interpolate(objective, knots[0, 1:])
    with pytest.raises(TypeError, match="takes an Objective"):
        path(nn.Linear(2, 1), knots)  # pyright: ignore[reportArgumentType]
    with pytest.raises(cv.BadObjective, match="do not fit"):
        interpolate(objective, {"0.weight": knots[0]})


def test_ends_of_different_models_are_refused():
    nets = [
        nn.Sequential(*itertools.chain([nn.Linear(3, 2)], extra)) for extra in ([], [nn.BatchNorm1d(2, affine=False)])
    ]
    plain, buffered = (cv.Objective.of(net, "mse", (torch.randn(5, 3), torch.randn(5, 2))) for net in nets)
    with pytest.raises(ValueError, match="different models"):
        interpolate(plain, buffered)
    turned = cv.Objective.of(nn.Linear(7, 1), "mse", (torch.randn(5, 7), torch.randn(5, 1)))
    with pytest.raises(ValueError, match="different models"):
        interpolate(plain, turned)  # as many parameters


def test_ends_that_differ_in_what_is_held_fixed_are_refused():
    case = next(case for case in zoo() if case.name == "frozen")
    objective = case.objective()
    other = copy.deepcopy(case.module)
    nn.init.normal_(other[0].weight)
    with pytest.raises(ValueError, match=r"held fixed: 0\.weight"):
        interpolate(objective, other.state_dict())
    nn.init.normal_(case.module[0].bias)
    interpolate(objective, case.module.state_dict(), points=2)
