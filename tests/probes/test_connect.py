"""Trained curves: every step is that of SGD on the bends, and two networks are joined by a curve of low loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from matrices import Stopping
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes.connect import connect
from curvature.probes.path import interpolate, path

CASES = [case for case in zoo() if case.name in ("classifier", "regression", "class-weights-and-ignored")]
CASE = CASES[0]


def far(objective: cv.Objective) -> Tensor:
    return objective.position + objective.space.draw(1, seed=3, kind="normal")[0]


def trained_by_torch(case, end: Tensor, kind: str, sizes: tuple[int, ...], l2: float, **options) -> Tensor:
    """The knots after SGD on the bends by torch.optim, with gradients through the formula of the curve."""
    bends, steps = options["bends"], options["steps"]
    generator = torch.Generator().manual_seed(options["seed"])
    places = torch.rand(steps, generator=generator, dtype=torch.float64).tolist()
    epochs = [torch.randperm(len(sizes), generator=generator) for _ in range(math.ceil(steps / len(sizes)))]
    data = list(zip(case.inputs.split(sizes), case.targets.split(sizes), strict=True))
    start = case.flat
    inner = [(start + (end - start) * j / (bends + 1)).requires_grad_() for j in range(1, bends + 1)]
    optimizer = torch.optim.SGD(inner, lr=options["lr"], momentum=options["momentum"])
    for t, batch in zip(places, torch.cat(epochs).tolist(), strict=False):
        knots = torch.stack([start, *inner, end])
        if kind == "bezier":
            while len(knots) > 1:
                knots = (1 - t) * knots[:-1] + t * knots[1:]
            theta = knots[0]
        else:
            edge = int(t * (bends + 1))
            theta = knots[edge] + (t * (bends + 1) - edge) * (knots[edge + 1] - knots[edge])
        params = dict(zip(case.trainable, theta.split([p.numel() for p in case.trainable.values()]), strict=True))
        params = {name: piece.view_as(case.trainable[name]) for name, piece in params.items()}
        x, y = data[batch]
        loss = case.mean_loss(torch.func.functional_call(case.module, params, (x,)), y) + l2 / 2 * theta.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack([start, *inner, end]).detach()


@pytest.mark.parametrize("kind", ["polygon", "bezier"])
@pytest.mark.parametrize("bends", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_stochastic_gradient_descent_on_the_bends(case, bends, kind):
    sizes = (3, 2, len(case.inputs) - 5)
    objective = case.objective(sizes, l2=0.1)
    options = {"bends": bends, "steps": 130, "lr": 0.1, "momentum": 0.8, "seed": 5}
    found = connect(objective, far(objective), kind=kind, **options, points=5)
    expected = trained_by_torch(case, far(objective), kind, sizes, 0.1, **options)
    torch.testing.assert_close(found.knots, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.knots[[0, -1]], torch.stack([objective.position, far(objective)]))
    assert found.kind == kind
    again = path(objective, found.knots, kind=kind, points=5)
    assert torch.equal(again.loss, found.loss)
    assert found.cost.passes == 1 + 130 // 3 + again.cost.passes  # to count terms, in training, along the path


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def solutions() -> list[cv.Objective]:
    """Two networks 10-40-40-4, trained from different beginnings on Gaussian clusters."""
    torch.manual_seed(0)
    y = torch.arange(4).repeat(64)
    x = torch.randn(4, 10)[y] + torch.randn(256, 10)
    found = []
    for _ in range(2):
        net = mlp(10, 40, 40, 4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(600):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        found.append(cv.Objective.of(net, "cross-entropy", (x, y)))
    return found


def test_two_networks_are_joined_by_a_curve_that_lies_far_below_the_straight_line():
    start, end = solutions()
    assert max(start.value(), end.value()) < 1e-3
    straight = interpolate(start, end)
    curve = connect(start, end, steps=1000)
    assert straight.barrier > 0.3
    assert 20 * curve.barrier < straight.barrier
    assert float(curve.loss.max()) < 0.02
    assert float(curve.arc[-1]) > float(straight.arc[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["polygon", "bezier"])
@pytest.mark.parametrize("bends", [1, 2])
def test_trained_for_longer_it_is_as_low_as_was_found(kind, bends):
    start, end = solutions()
    curve = connect(start, end, kind=kind, bends=bends)
    assert 100 * curve.barrier < interpolate(start, end).barrier
    assert float(curve.loss.max()) < 0.0025


def test_single_precision_goes_the_same_way():
    objectives = [CASE.objective(dtype=dtype) for dtype in (torch.float32, torch.float64)]
    knots = [connect(o, far(objectives[1]), steps=20, points=3).knots.double() for o in objectives]
    torch.testing.assert_close(*knots, rtol=1e-4, atol=1e-5)


def test_batch_normalisation_trains_with_the_statistics_of_the_batch_where_it_is_asked_to():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    objective = cv.Objective.of(net, "cross-entropy", (CASE.inputs, CASE.targets))
    training = objective.in_mode("train")
    options = {"steps": 10, "points": 3}
    batch = connect(objective, far(objective), norm="batch", **options).knots
    assert torch.equal(batch, connect(training, far(objective), norm="recalibrated", **options).knots)
    frozen = [connect(objective, far(objective), norm=norm, **options).knots for norm in ("frozen", "recalibrated")]
    assert torch.equal(*frozen) and not torch.equal(batch, frozen[0])


def test_the_model_never_notices():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(), nn.Linear(6, 3)).double()
    objective = cv.Objective.of(net, "cross-entropy", (CASE.inputs, CASE.targets), mode="train")
    with untouched(net):
        connect(objective, far(objective), steps=5, points=3)


def test_it_goes_on_where_it_was_and_returns_the_curve_so_far(tmp_path):
    objective, place = CASE.objective((4, 5)), tmp_path / "curve.ckpt"
    end, options, seen = far(objective), {"steps": 250, "points": 5}, []
    whole = connect(objective, end, **options, run=cv.Run(progress=seen.append))
    assert [p.done for p in seen if p.unit == "steps"] == [100, 200, 250] and "along the curve" in seen[0].note
    with pytest.raises(cv.Interrupted) as caught:
        connect(objective, end, **options, run=cv.Run(progress=Stopping(1), checkpoint=place))
    part = caught.value.result
    assert not part.complete and bool(part.loss.isnan().all())
    assert not torch.equal(part.knots, whole.knots) and torch.equal(part.knots[[0, -1]], whole.knots[[0, -1]])
    resumed = connect(objective, end, **options, run=cv.Run(checkpoint=place))
    assert torch.equal(resumed.knots, whole.knots) and torch.equal(resumed.loss, whole.loss) and resumed.complete
    assert resumed.cost.passes >= whole.cost.passes
    for other in ({"lr": 0.2}, {"seed": 1}, {"steps": 300}):
        with pytest.raises(cv.BadFile):
            connect(objective, end, **{**options, **other}, run=cv.Run(checkpoint=place))
    with pytest.raises(cv.BadFile):
        connect(objective, 2 * end, **options, run=cv.Run(checkpoint=place))


def test_seeds_decide_about_the_way():
    objective = CASE.objective((4, 5))
    first, same, other = (connect(objective, far(objective), steps=9, points=3, seed=s).knots for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_training_that_diverges_says_so():
    objective = next(case for case in zoo() if case.name == "regression").objective()
    with pytest.raises(cv.NonFinite, match=r"diverged.*Lower lr=1e\+09"):
        connect(objective, far(objective), lr=1e9, steps=500)


def test_bad_input_is_refused():
    objective = CASE.objective()
    end = far(objective)
    for wrong, match in (
        ({"bends": 0}, "a bend"),
        ({"steps": 0}, "a step"),
        ({"lr": 0.0}, "lr > 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"kind": "spline"}, "kind is"),
        ({"points": 1}, "points is 2"),
    ):
        with pytest.raises(ValueError, match=match):
            connect(objective, end, **wrong)
    with pytest.raises(TypeError, match="takes an Objective"):
        connect(nn.Linear(2, 1), end)  # pyright: ignore[reportArgumentType]
