"""Which part of a model is named for a node of a graph, an error, a number that is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.objective.blame import Replay, nodes_of
from curvature.objective.calls import call_record


class Net(nn.Module):
    """A stack in a part, a layer that is called twice, and something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stack(x)
        return self.last(self.twice(self.twice(hidden).sin()))


def objective(net: nn.Module) -> cv.Objective:
    return cv.Objective.from_loss(
        net, lambda model, batch: model(batch[0]).exp().mean(), (torch.ones(5, 3), torch.ones(5)), terms=lambda batch: 1
    )


def test_every_node_of_first_and_second_derivatives_is_of_the_part_that_made_it():
    net = Net()
    replay = Replay(objective(net), (torch.ones(5, 3), torch.ones(5)))
    assert [span.part for span in replay.calls.ended] == [
        "stack.0 (Linear)", "stack.1 (Tanh)", "stack (Sequential)",
        "twice (Linear)", "twice (Linear)", "last (Linear)", "the model (Net)",
    ]  # fmt: skip
    parts = {"Tanh": "stack.1 (Tanh)", "Sin": "the model (Net)", "Exp": "the loss"}
    for graph in ([replay.total], replay._gradient):
        for node in nodes_of(graph):
            maker = replay._maker(node).name().removesuffix("Backward0")
            if maker in parts:
                assert replay._part(node) == parts[maker]
    linear = [replay._part(node) for node in nodes_of([replay.total]) if node.name() == "AddmmBackward0"]
    assert sorted(linear) == ["last (Linear)", "stack.0 (Linear)", "twice (Linear)", "twice (Linear)"]
    makers = {replay._maker(node).name() for node in nodes_of(replay._gradient) if node.name() == "MulBackward0"}
    assert "SinBackward0" in makers  # cos(h) times what comes from above


class Trying(nn.Module):
    """Raises inside, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.bad, self.good, self.worse = nn.Linear(2, 2), nn.Linear(3, 2), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.bad(x)
        except RuntimeError:
            return self.worse(self.good(x))


def test_what_was_caught_is_not_blamed():
    net = Trying()
    with untouched(net), call_record(net) as calls, pytest.raises(RuntimeError):
        net(torch.ones(5, 3))
    assert calls.open[-1].part == "worse (Linear)"
    assert Replay(objective(net), (torch.ones(5, 3), torch.ones(5))).raising() == "worse (Linear)"


class Refusing(torch.autograd.Function):
    """Raises in the backward pass, or in that through it."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if ctx.order == 1:
            raise ValueError("burnt")
        return g * Refusing.apply(x, 1), None


class Late(nn.Module):
    def __init__(self, order: int) -> None:
        super().__init__()
        self.first, self.order = nn.Linear(3, 2), order

    def forward(self, x: Tensor) -> Tensor:
        return Refusing.apply(self.first(x), self.order)


@pytest.mark.parametrize("order", [1, 2])
def test_errors_of_backward_passes_are_of_the_part_of_their_forward_pass(order):
    late = objective(nn.Sequential(Late(order), nn.Tanh()))
    with pytest.raises(cv.BadObjective, match=r"ValueError: burnt, in 0 \(Late\)\."):
        late.check()


@pytest.mark.parametrize("place", ["0", "2"])
def test_the_first_output_that_is_not_finite_is_named(place):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    part = net.get_submodule(place)
    part.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(cv.NonFinite, match=rf"it begins in {place} \(Linear\)"):
        objective(net).check()


def test_hooks_are_gone_afterwards_whatever_was_raised():
    net = Net()
    with untouched(net), pytest.raises(KeyboardInterrupt), call_record(net):
        raise KeyboardInterrupt
