"""Benchmarks: every curve is that of a loop written out, tuning is the same for all, and what fails is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from matrices import Stopping
from torch import nn

import curvature as cv
from curvature.optim import benchmark, restarted
from curvature.optim.registry import OPTIMIZERS


def data(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).double()
    return x, x.sum(1, keepdim=True).tanh()


@pytest.fixture
def objective() -> cv.Objective:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return cv.Objective.of(net, "mse", data(), batch_size=20, l2=0.01)


def written_out(objective: cv.Objective, make, lr: float, steps: int, minibatch: int, seed: int) -> list[float]:
    """The loss of all data after each step."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = data()
    pieces = [range(b + s, min(b + s + minibatch, b + 20)) for b in (0, 20) for s in range(0, 20, minibatch)]
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps // len(pieces))
    order = torch.cat([torch.randperm(len(pieces), generator=generator) for _ in range(epochs)]).tolist()
    optimizer = make(net.parameters(), lr)

    def loss(rows) -> torch.Tensor:
        penalty = 0.005 * sum(p.square().sum() for p in net.parameters())
        return nn.functional.mse_loss(net(x[list(rows)]), y[list(rows)]) + penalty

    losses = [loss(range(40)).item()]
    for step in range(steps):
        optimizer.zero_grad()
        loss(pieces[order[step]]).backward()
        optimizer.step()
        losses.append(loss(range(40)).item())
    return losses


MAKES = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=0),
    "soap": lambda params, lr: cv.optim.SOAP(params, lr, weight_decay=0),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_curve_is_that_of_a_loop_written_out(objective, name):
    found = benchmark(objective, [name], lrs=[0.02], steps=9, minibatch=8, repeats=2, seed=3)
    assert found.steps.tolist() == list(range(10))
    for place in range(2):
        expected = written_out(objective, MAKES[name], 0.02, 9, 8, seed=4 + place)
        assert found.losses[0, place].tolist() == pytest.approx(expected, rel=1e-9)
    assert float(found.tried[0, 0]) == pytest.approx(written_out(objective, MAKES[name], 0.02, 9, 8, 3)[-1], rel=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = data()
    problem = cv.Objective.of(net, "cross-entropy", (x, (y[:, 0] > 0).long()))
    before = problem.position.clone()
    found = benchmark(problem, [name], lrs=[0.03, 0.3], steps=12, minibatch=20, repeats=1)
    assert not found.left_out and float(found.losses[0, 0, -1]) < float(found.losses[0, 0, 0])
    assert int(found.state_bytes[0]) > 0 and float(found.step_seconds[0]) > 0
    assert bool((found.seconds[0, 0].diff() > 0).all())
    assert torch.equal(problem.position, before) and torch.equal(net[0].weight.detach(), problem.params["0.weight"])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_the_best_rate_is_taken_and_divergence_is_told(objective):
    found = benchmark(objective, ["sgd"], lrs=[1e-4, 0.1, 1e6], steps=20, repeats=2)
    assert float(found.best[0]) == 0.1 and math.isinf(float(found.tried[0, 2]))
    assert "diverged with 1 of 3 rates" in str(found) and "end of those" not in str(found)
    assert "at the end of those tried" in str(benchmark(objective, ["sgd"], lrs=[1e-4, 1e-3, 1e-2], steps=9, repeats=1))
    quantity = found.quantities()["sgd"]
    finals = found.losses[0, :, -1]
    assert quantity.value == float(finals.mean())
    assert (quantity.stderr, quantity.dof) == (pytest.approx(float(finals.std()) / 2**0.5), 1)
    lost = benchmark(objective, ["sgd"], lrs=[1e6], steps=5, repeats=1)
    assert math.isinf(lost.losses[0, 0, -1]) and "inf" in str(lost) and lost.to_dict()["losses"][0][0][-1] is None


def test_other_data_and_parameters_that_are_held_fixed(objective):
    other = data(11)
    found = benchmark(objective, ["adamw"], lrs=[0.01], steps=4, repeats=1, held_out=other)
    assert float(found.held_out[0, 0, 0]) == pytest.approx(objective.on(other).value(), rel=1e-12)
    few = benchmark(objective.narrowed("2.*"), ["adamw"], lrs=[0.01], steps=4, repeats=1)
    assert int(few.state_bytes[0]) == 2 * 6 * 8 + 2 * 4  # two moments of six numbers, and the steps
    own = {"none": lambda module, lr, seed: torch.optim.SGD(module.parameters(), lr=0.0)}
    still = benchmark(objective, own, lrs=[1.0], steps=3, repeats=1)
    assert still.losses.unique().tolist() == [pytest.approx(objective.value())]


def test_what_cannot_train_a_model_is_left_out(objective):
    scalar = cv.Objective.from_loss(objective.function.module, lambda m, b: (m(b[0]) - b[1]).square().mean(), data())
    found = benchmark(scalar, ["sgd", "egn"], lrs=[0.01], steps=2, repeats=1)
    assert found.names == ("sgd",) and found.left_out[0].startswith("egn: ")
    with pytest.raises(cv.BadObjective, match="No optimizer can train this model"):
        benchmark(scalar, ["egn"], lrs=[0.01], steps=2, repeats=1)


def test_it_goes_on_where_it_was(objective, tmp_path):
    options = {"lrs": [0.01, 0.1], "steps": 3, "repeats": 2}
    with pytest.raises(cv.Interrupted) as stop:
        benchmark(objective, ["sgd", "adamw"], **options, run=cv.Run(progress=Stopping(5), checkpoint=tmp_path / "c"))
    part = stop.value.result
    assert part.names == ("sgd",) and not part.complete
    whole = benchmark(objective, ["sgd", "adamw"], **options, run=cv.Run(checkpoint=tmp_path / "c"))
    fresh = benchmark(objective, ["sgd", "adamw"], **options)
    assert torch.equal(whole.losses, fresh.losses) and torch.equal(whole.seconds[0], part.seconds[0])


def test_a_fresh_start_is_drawn_by_the_layers():
    objective = cv.demo("digits-cnn")
    state = torch.get_rng_state()
    one, again, other = (restarted(objective, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.position, again.position) and not torch.equal(one.position, other.position)
    assert not torch.equal(one.position, objective.position)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * x

    with pytest.raises(cv.BadObjective, match=r"1\.scale belong to layers without reset_parameters"):
        restarted(cv.Objective.of(nn.Sequential(nn.Linear(2, 1), Bare()), "mse", (torch.ones(3, 2), torch.ones(3, 1))))


def test_bad_input_is_refused(objective):
    with pytest.raises(ValueError, match=r"optimizers are some of sgd, adamw, .*, but got fast"):
        benchmark(objective, ["fast"])
    with pytest.raises(ValueError, match="positive learning rates, but got"):
        benchmark(objective, lrs=[0.1, -1])
    with pytest.raises(ValueError, match="of 1 at least, but got 0, 3 and 64"):
        benchmark(objective, steps=0)
    with pytest.raises(TypeError, match="takes an Objective"):
        benchmark(nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("over", ["steps", "seconds"])
def test_the_picture_has_the_means(objective, over):
    found = benchmark(objective, ["sgd", "adamw"], lrs=[0.01], steps=3, repeats=2, held_out=data(5))
    ax = found.plot(Figure().add_subplot(), over=over)
    own, dashed = ax.get_lines()[:2]
    assert own.get_ydata().tolist() == found.losses[0].mean(0).tolist() and own.get_label() == "sgd, lr 0.01"
    assert dashed.get_ydata().tolist() == found.held_out[0].mean(0).tolist()
    x = found.steps if over == "steps" else found.seconds[0].mean(0)
    assert own.get_xdata().tolist() == x.tolist()
    with pytest.raises(ValueError, match="over is 'steps' or 'seconds', but got 'x'"):
        found.plot(Figure().add_subplot(), over="x")
    assert not replace(found, held_out=None).plot(Figure().add_subplot()).get_ylabel().endswith(")")
