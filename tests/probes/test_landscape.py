"""Lines, planes and volumes: what the loss is at their points, and that nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from matrices import Stopping, rotated
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv

CASES = [
    case for case in zoo() if case.name in ("classifier", "regression", "convolution", "attention", "lstm", "binary")
]


class Quadratic(nn.Module):
    """theta.A theta / 2 for one example."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta @ (self.matrix @ self.theta) / 2 * x


def quadratic(values: Tensor) -> cv.Objective:
    one = torch.ones(1, dtype=values.dtype)
    return cv.Objective.from_loss(Quadratic(rotated(values)), lambda m, x: m(x).sum(), one)


def normed(mode: str = "eval") -> cv.Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.randn(12, 1, 4, 4), torch.randint(0, 3, (12,))
    return cv.Objective.of(net.double(), "cross-entropy", [(x[:8].double(), y[:8]), (x[8:].double(), y[8:])], mode=mode)


def flat(objective: cv.Objective) -> Tensor:
    return objective.position


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_point_is_the_value_of_the_objective_there(case):
    objective = case.objective((4, len(case.inputs) - 4), l2=0.1)
    directions = cv.random_directions(objective, 2, seed=1)
    found = cv.plane(objective, directions, points=5, radius=0.7)
    for i, s in enumerate(found.coordinates):
        for j, t in enumerate(found.coordinates):
            value = objective.at(flat(objective) + s * directions[0] + t * directions[1]).value()
            assert float(found.loss[i, j]) == pytest.approx(value, rel=1e-12)
    assert found.centre == objective.value()


def test_along_the_axes_of_a_quadratic_it_is_the_quadratic():
    values = torch.tensor([-1.0, 0.5, 2.0, 7.0], dtype=torch.float64)
    objective = quadratic(values)
    vectors = torch.linalg.eigh(rotated(values)).eigenvectors.T
    t = cv.plane(objective, vectors[[3, 0]], points=11).coordinates
    expected = (7 * t[:, None] ** 2 - t[None, :] ** 2) / 2
    torch.testing.assert_close(cv.plane(objective, vectors[[3, 0]], points=11).loss, expected, rtol=0, atol=1e-12)
    cube = cv.volume(objective, vectors[:3], points=5)
    u = cube.coordinates
    expected = (-(u[:, None, None] ** 2) + 0.5 * u[None, :, None] ** 2 + 2 * u[None, None, :] ** 2) / 2
    torch.testing.assert_close(cube.loss, expected, rtol=0, atol=1e-12)
    crowded = cv.line(objective, vectors[3], points=21, crowd=3.0)
    torch.testing.assert_close(crowded.loss, 3.5 * crowded.coordinates**2, rtol=0, atol=1e-12)
    assert float(crowded.coordinates[11]) == pytest.approx(1e-3) and float(crowded.coordinates[-1]) == 1.0


def test_the_pairs_of_eigsh_are_directions_and_name_the_axes():
    objective = quadratic(torch.tensor([-1.0, 0.5, 2.0, 7.0], dtype=torch.float64))
    pairs = cv.eigsh(cv.hessian(objective), 2, which="both", rtol=1e-12)
    found = cv.plane(objective, pairs, points=11)
    t = found.coordinates
    torch.testing.assert_close(found.loss, (7 * t[:, None] ** 2 - t[None, :] ** 2) / 2, rtol=0, atol=1e-12)
    assert found.names == ("eigenvector, λ = 7", "eigenvector, λ = -1")


def test_adaptive_coordinates_are_even_on_a_parabola_and_crowd_in_a_pit():
    values = torch.tensor([0.5, 2.0], dtype=torch.float64)
    even = cv.plane(quadratic(values), torch.eye(2).double(), points=21, crowd="adaptive", radius=3.0)
    torch.testing.assert_close(even.coordinates, torch.linspace(-3, 3, 21, dtype=torch.float64), rtol=0, atol=1e-10)
    one = torch.ones(1, 1).double()
    pit = cv.Objective.from_loss(
        nn.Linear(1, 1, bias=False).double(), lambda m, x: (m(x) / 1e-3).square().mean().tanh(), one
    ).at(torch.zeros(1).double())
    found = cv.line(pit, torch.ones(1).double(), points=41, crowd="adaptive")
    even = cv.line(pit, torch.ones(1).double(), points=41)
    assert int((even.loss < 0.99).sum()) == 1 and int((found.loss < 0.99).sum()) >= 10
    assert found.coordinates[20] == 0 and float(found.coordinates[-1]) == 1.0
    assert (found.coordinates.diff() > 0).all()
    torch.testing.assert_close(found.coordinates, -found.coordinates.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("crowd", [0.5, float("inf"), "auto"])
def test_a_crowd_that_is_none_is_refused(crowd):
    objective = quadratic(torch.ones(2).double())
    with pytest.raises(ValueError, match="crowd is 1 or more, or 'adaptive', but got"):
        cv.line(objective, torch.ones(2).double(), crowd=crowd)


def test_parameters_have_coordinates_in_a_plane_of_any_axes():
    objective = CASES[0].objective()
    directions = cv.random_directions(objective, 2, seed=3)  # neither orthogonal nor of one length
    found = cv.plane(objective, directions, points=3)
    there = torch.tensor([[0.3, -2.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    rows = flat(objective) + there.to(directions.dtype) @ directions
    torch.testing.assert_close(found.coordinates_of(rows), there, rtol=1e-9, atol=1e-9)
    out = torch.linalg.svd(directions, full_matrices=True).Vh[2:3]  # what is off the plane does not matter
    torch.testing.assert_close(found.coordinates_of(rows + 5 * out), there, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"Expected parameters \(k, "):
        found.coordinates_of(rows[0])


def test_accuracy_and_other_data():
    objective = normed()
    other = (torch.randn(7, 1, 4, 4).double(), torch.randint(0, 3, (7,)))
    direction = cv.random_directions(objective, 1)[0]
    found = cv.line(objective, direction, points=3, accuracy=True, held_out=other)
    for i, t in enumerate(found.coordinates):
        at = objective.at(flat(objective) + t * direction)
        for data, loss, accuracy in (
            (at, found.loss, found.accuracy),
            (at.on(other), found.held_out_loss, found.held_out_accuracy),
        ):
            with data.context():
                right = torch.cat([data.outputs(data.params, batch)[0].argmax(1) == batch[1] for batch in data.batches])
            assert float(accuracy[i]) == pytest.approx(float(right.double().mean()), abs=1e-12)
            assert float(loss[i]) == pytest.approx(data.value(), rel=1e-12)


def test_recalibrated_statistics_are_those_of_the_data_at_every_point():
    objective = normed()
    direction = cv.random_directions(objective, 1)[0]
    found = cv.line(objective, direction, points=3, norm="recalibrated")
    for i, t in enumerate(found.coordinates):
        at = objective.at(flat(objective) + t * direction)
        net = copy.deepcopy(objective.function.module)
        net.load_state_dict({**at.params, **at.buffers})
        seen = net[0](torch.cat([x for x, _ in objective.batches])).detach()
        first, second = seen[:8], seen[8:]  # the mean over batches, each by its number of examples
        net[1].running_mean = (8 * first.mean((0, 2, 3)) + 4 * second.mean((0, 2, 3))) / 12
        net[1].running_var = (8 * first.var((0, 2, 3)) + 4 * second.var((0, 2, 3))) / 12
        net.eval()
        losses = [nn.functional.cross_entropy(net(x), y, reduction="sum") for x, y in objective.batches]
        assert float(found.loss[i]) == pytest.approx(float(sum(losses).detach()) / 12, rel=1e-10)


def test_the_scale_of_weights_before_a_normalisation_does_not_matter_where_it_is_recalibrated():
    objective = normed()
    weights = dict(objective.params)
    direction = torch.zeros(objective.space.size, dtype=torch.float64)
    for name, place in objective.space.named(torch.arange(len(direction))).items():
        if name.startswith("0."):
            direction[place.flatten()] = weights[name].flatten()
    for norm, changes in (("recalibrated", False), ("batch", False), ("frozen", True)):
        found = cv.line(objective, direction, points=3, norm=norm)  # the last point has twice the weights
        assert (abs(float(found.loss[2]) - found.centre) > 1e-3) == changes, norm


def test_the_batch_is_that_of_training():
    objective, direction = normed(), cv.random_directions(normed(), 1)[0]
    training = normed("train")
    found = cv.line(objective, direction, points=3, norm="batch")
    assert float(found.loss[0]) == pytest.approx(training.at(flat(training) - direction).value(), rel=1e-12)


def test_losses_with_derivatives_in_them_go_together():
    """A network whose equation has its derivative in the input, as the losses of differential equations have."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def residual(net: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (slope - x).square().mean()

    objective = cv.Objective.from_loss(net, residual, torch.linspace(0, 1, 20).double().unsqueeze(1))
    directions = cv.random_directions(objective, 2)
    found = cv.plane(objective, directions, points=5)
    for i, s in enumerate(found.coordinates):
        value = objective.at(flat(objective) + s * directions[0] + s * directions[1]).value()
        assert float(found.loss[i, i]) == pytest.approx(value, rel=1e-10)


def test_what_overflows_is_kept_and_counted():
    module = nn.Linear(1, 1, bias=False)
    objective = cv.Objective.from_loss(module, lambda m, x: (m.weight.sum() * 60).exp() * x.mean(), torch.ones(1, 1))
    found = cv.line(objective.at(torch.zeros(1)), torch.ones(1), radius=2.0, points=5)
    assert torch.isinf(found.loss[-1]) and found.centre == 1.0 and "at 1 points" in str(found)


@pytest.mark.parametrize("norm", ["frozen", "recalibrated", "batch"])
def test_the_model_never_notices(norm):
    objective = normed()
    with untouched(objective.function.module):
        cv.plane(objective, cv.random_directions(objective, 2), points=3, norm=norm, accuracy=True)


def test_it_goes_on_where_it_was_and_returns_what_it_has(tmp_path):
    objective = CASES[0].objective()
    directions = cv.random_directions(objective, 2)
    whole = cv.plane(objective, directions, points=15)
    path = tmp_path / "plane.ckpt"
    with pytest.raises(cv.Interrupted) as caught:
        cv.plane(objective, directions, points=15, run=cv.Run(progress=Stopping(1), checkpoint=path))
    part = caught.value.result
    assert not part.complete and int(part.loss.isnan().sum()) == 225 - 128 and part.centre == whole.centre
    seen = []
    resumed = cv.plane(objective, directions, points=15, run=cv.Run(progress=seen.append, checkpoint=path))
    assert torch.equal(resumed.loss, whole.loss) and resumed.complete
    with pytest.raises(cv.BadFile):
        cv.plane(objective, 2 * directions, points=15, run=cv.Run(checkpoint=path))


def test_bad_input_is_refused():
    objective = CASES[0].objective()
    directions = cv.random_directions(objective, 2)
    with pytest.raises(ValueError, match="2 directions"):
        cv.plane(objective, directions[:1])
    with pytest.raises(ValueError, match="a direction"):
        cv.line(objective, directions)
    with pytest.raises(ValueError, match="odd"):
        cv.line(objective, directions[0], points=10)
    with pytest.raises(ValueError, match="positive radius"):
        cv.line(objective, directions[0], radius=0.0)
    with pytest.raises(ValueError, match="norm is"):
        cv.line(objective, directions[0], norm="off")  # pyright: ignore[reportArgumentType]
    with pytest.raises(cv.BadObjective, match="no accuracy"):
        cv.line(CASES[1].objective(), cv.random_directions(CASES[1].objective(), 1)[0], accuracy=True)
    with pytest.raises(TypeError, match="takes an Objective"):
        cv.line(nn.Linear(2, 1), directions[0])  # pyright: ignore[reportArgumentType]
