"""Aligned networks: the same functions, and as near as permutations of their hidden units bring them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from objectives import zoo
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from untouched import untouched

import curvature as cv
from curvature.probes.align import align, units_of
from curvature.probes.path import interpolate


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, given: int, made: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(given, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made)
        self.second, self.last = nn.Conv2d(made, made, 3, 1, 1, bias=False), nn.BatchNorm2d(made)
        self.short = nn.Identity() if given == made else nn.Conv2d(given, made, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.second(F.relu(self.norm(self.first(x))))) + self.short(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 1, 1)
        self.blocks = nn.Sequential(Block(6, 6), Block(6, 8, 2), Block(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Transformer(nn.Module):
    """Attention, and a hidden layer on each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(7, 4), nn.Parameter(torch.randn(5, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 9), nn.Linear(9, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 10, 3, padding=1, groups=5), nn.GroupNorm(1, 10), nn.PReLU(10)),
        *(nn.ConvTranspose2d(10, 6, 2), nn.BatchNorm2d(6, affine=False), nn.GELU(), nn.Dropout2d()),
        *(nn.Flatten(), nn.Linear(6 * 9, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
    )


def recurrent() -> nn.Module:
    """A layer that is called twice, on its own units."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.middle, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.into(x))
            return self.out(torch.tanh(self.middle(torch.tanh(self.middle(x)))))

    return Twice()


INPUTS = {
    "mlp": (lambda: mlp(4, 7, 6, 3), lambda: torch.randn(20, 4)),
    "convolutional": (convolutional, lambda: torch.randn(20, 1, 4, 4)),
    "residual": (Residual, lambda: torch.randn(20, 1, 6, 6)),
    "twice": (recurrent, lambda: torch.randn(20, 4)),
    "transformer": (Transformer, lambda: torch.randint(0, 7, (20, 5))),
}
NETWORKS = pytest.mark.parametrize("name", list(INPUTS))


def network(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> cv.Objective:
    """With random parameters everywhere, and statistics of the data."""
    make, draw = INPUTS[name]
    torch.manual_seed(seed)
    net = make()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    torch.manual_seed(9)
    x, y = draw(), torch.randint(0, 3, (20,))
    net.train()(x)
    return cv.Objective.of(net.eval(), "cross-entropy", (x, y), dtype=dtype)


def shuffled(objective: cv.Objective, seed: int = 0) -> cv.Objective:
    """The same function with its hidden units in a random order, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: t.clone() for name, t in {**objective.params, **objective.buffers}.items()}
    for axes in units_of(objective).values():
        count = min(tensors[name].shape[axis] for name, axis in axes)
        order = torch.randperm(count, generator=generator).tolist()
        for name, axis in axes:
            pieces = tensors[name].chunk(count, axis)
            tensors[name] = torch.cat([pieces[i] for i in order], axis)
    return replace(
        objective,
        params={name: tensors[name] for name in objective.params},
        buffers={name: tensors[name] for name in objective.buffers},
    )


def distance(a: cv.Objective, b: cv.Objective) -> float:
    return float((a.position - b.position).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@NETWORKS
def test_a_permuted_copy_comes_back_whole(name, dtype):
    objective = network(name, dtype=dtype)
    for seed in range(2):
        copied = shuffled(objective, seed)
        assert copied.value() == pytest.approx(objective.value(), rel=1e-5)
        assert distance(objective, copied) > 1.0 and interpolate(objective, copied, points=5).variation > 1e-3
        found = align(objective, copied)
        assert torch.equal(found.position, objective.position)
        assert all(torch.equal(t, objective.buffers[key]) for key, t in found.buffers.items())
        straight = interpolate(objective, found, points=5, norm="frozen")
        assert straight.loss.tolist() == pytest.approx([objective.value()] * 5, rel=1e-6)


@NETWORKS
def test_another_network_is_the_same_function_nearer_by(name):
    objective, other = network(name), network(name, seed=1)
    found = align(objective, other)
    assert distance(objective, found) < distance(objective, other)
    assert found.value() == pytest.approx(other.value(), rel=1e-10)
    assert sorted(found.position.tolist()) == pytest.approx(sorted(other.position.tolist()))
    assert torch.equal(align(objective, other, seed=0).position, found.position)


def test_of_one_hidden_layer_it_is_the_nearest_of_all_orders():
    torch.manual_seed(0)
    nets = [mlp(3, 5, 2).double() for _ in range(2)]
    data = (torch.randn(6, 3).double(), torch.randint(0, 2, (6,)))
    ours, theirs = (cv.Objective.of(net, "cross-entropy", data) for net in nets)
    nearest = min(
        sum(
            float((ours.params[name] - t).square().sum())
            for name, t in {
                "0.weight": theirs.params["0.weight"][list(order)],
                "0.bias": theirs.params["0.bias"][list(order)],
                "2.weight": theirs.params["2.weight"][:, list(order)],
                "2.bias": theirs.params["2.bias"],
            }.items()
        )
        for order in itertools.permutations(range(5))
    )
    assert distance(ours, align(ours, theirs)) == pytest.approx(nearest**0.5, rel=1e-12)


def test_between_two_trained_networks_the_barrier_falls():
    torch.manual_seed(0)
    y = torch.arange(4).repeat(64)
    x = torch.randn(4, 10)[y] + torch.randn(256, 10)
    trained = []
    for _ in range(2):
        net = mlp(10, 40, 40, 4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(400):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        trained.append(cv.Objective.of(net, "cross-entropy", (x, y)))
    start, end = trained
    before, after = interpolate(start, end).barrier, interpolate(start, align(start, end)).barrier
    assert before > 0.1 and after < before / 10


def test_the_end_is_given_as_for_a_path():
    objective, other = network("convolutional"), network("convolutional", seed=1)
    found = align(objective, other)
    assert torch.equal(align(objective, other.function.module.state_dict()).position, found.position)
    flat = align(objective, other.position)  # with the buffers of the objective, permuted likewise
    assert torch.equal(flat.position, found.position)
    assert sorted(flat.buffers["1.running_mean"].tolist()) == sorted(objective.buffers["1.running_mean"].tolist())
    assert flat.value() == pytest.approx(objective.at(other.position).value(), rel=1e-12)


def test_losses_without_outputs_can_be_compared_too():
    objective = network("mlp")
    x, y = next(iter(objective.batches))
    bare = cv.Objective.from_loss(
        objective.function.module, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), [(x, y)]
    )
    assert torch.equal(align(bare, shuffled(bare)).position, bare.position)
    with pytest.raises(cv.BadObjective, match="other outputs"):
        align(bare, network("mlp", 1).position, units={"first": [("0.weight", 0)]})


def test_what_is_not_understood_is_held_in_order():
    assert units_of(network("transformer")) == {"up.weight": [("up.weight", 0), ("up.bias", 0), ("down.weight", 1)]}
    assert list(units_of(network("twice"))) == ["into.weight"]
    groups = units_of(network("residual"))
    assert ("blocks.0.second.weight", 0) in groups["stem.weight"]  # the sum ties them
    assert ("stem.weight", 0) in groups["stem.weight"] and ("blocks.1.first.weight", 1) in groups["stem.weight"]


class Odd(nn.Module):
    """Two hidden layers, with something done to the first."""

    def __init__(self, odd, **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.odd = odd
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.odd(self, torch.relu(self.first(x))))))


ODD = {
    "sorted": lambda self, x: x.sort(dim=1).values,
    "cumulative": lambda self, x: x.cumsum(1),
    "joined": lambda self, x: torch.cat([x[:, :3], x[:, 3:]], 1),
    "turned": lambda self, x: x.flip(1),
    "weights used directly": lambda self, x: F.linear(x, self.first.weight @ self.first.weight.T),
    "transposed": lambda self, x: x.T.T,
    "grouped": lambda self, x: F.group_norm(x, 2),
    "a constant": lambda self, x: x * torch.linspace(0, 1, 6, dtype=x.dtype),
    "averaged": lambda self, x: x - x.mean(1, keepdim=True),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_so_is_what_odd_things_are_done_to(odd):
    net = Odd(odd).double()
    objective = cv.Objective.of(net, "mse", (torch.randn(8, 4).double(), torch.randn(8, 3).double()))
    assert list(units_of(objective)) == ["second.weight"]
    end = objective.at(objective.space.draw(1, seed=1, kind="normal")[0])
    assert align(objective, end).value() == pytest.approx(end.value(), rel=1e-10)


ELEMENTWISE = {
    "shape": lambda self, x: x.view(x.shape[0], -1),
    "reshape": lambda self, x: x.reshape(x.size(0), -1),
    "flatten": lambda self, x: torch.flatten(x, start_dim=1),
    "arithmetic": lambda self, x: 2 * x + x.square() / (1 + x.abs()),
    "functions": lambda self, x: F.gelu(F.dropout(x, 0.0)),
    "method": lambda self, x: x.tanh().add(x),
}


@pytest.mark.parametrize("odd", ELEMENTWISE.values(), ids=list(ELEMENTWISE))
def test_elementwise_functions_pass_units_on(odd):
    net = Odd(odd).double()
    objective = cv.Objective.of(net, "mse", (torch.randn(8, 4).double(), torch.randn(8, 3).double()))
    assert list(units_of(objective)) == ["first.weight", "second.weight"]
    assert torch.equal(align(objective, shuffled(objective)).position, objective.position)


def test_parameters_that_are_computed_or_fixed_are_held():
    net = mlp(4, 6, 6, 3)
    spectral_norm(net[2])
    objective = cv.Objective.of(net, "mse", (torch.randn(8, 4), torch.randn(8, 3)))
    with pytest.raises(cv.BadObjective, match="No hidden units"):
        units_of(objective)
    case = next(case for case in zoo() if case.name == "frozen")
    with pytest.raises(cv.BadObjective, match="No hidden units"):
        units_of(case.objective())
    assert list(units_of(network("mlp"))) == ["0.weight", "2.weight"]
    assert list(units_of(network("mlp").narrowed(["2", "4"]))) == ["2.weight"]


def test_tied_parameters_are_permuted_together():
    case = next(case for case in zoo() if case.name == "tied-head")
    (axes,) = units_of(case.objective()).values()
    assert {("embedding.weight", 1), ("middle.weight", 0), ("middle.weight", 1), ("norm.weight", 0)} <= set(axes)
    objective = case.objective()
    assert torch.equal(align(objective, shuffled(objective)).position, objective.position)


def test_units_can_be_given_by_hand():
    objective, other = network("transformer"), network("transformer", seed=1)
    by_hand = {"hidden": [("up.weight", 0), ("up.bias", 0), ("down.weight", 1)]}
    assert torch.equal(align(objective, other, units=by_hand).position, align(objective, other).position)
    with pytest.raises(cv.BadObjective, match=r"other outputs.*hidden"):
        align(objective, other, units={"hidden": by_hand["hidden"][:2]})
    for units, match in (
        ({"hidden": [("up.weight", 0), ("gone", 0)]}, "no such axes.*gone"),
        ({"hidden": [("up.weight", 2)]}, "no such axes"),
        ({"hidden": [("up.weight", 0), ("down.bias", 0)]}, "cannot count the same units"),
        ({"a": [("up.weight", 0)], "b": [("up.weight", 0)]}, "each axis once"),
        ({"hidden": []}, "each axis once"),
        ({}, "each axis once"),
    ):
        with pytest.raises(ValueError, match=match):
            align(objective, other, units=units)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) if x.sum() > -1e9 else x)


def test_a_graph_that_depends_on_the_data_is_not_guessed():
    objective = cv.Objective.of(Branching(), "mse", (torch.randn(8, 4), torch.randn(8, 3)))
    with pytest.raises(cv.BadObjective, match=r"cannot be traced.*units="):
        align(objective, objective.position)
    by_hand = {"hidden": [("first.weight", 0), ("first.bias", 0), ("second.weight", 1)]}
    flipped = objective.at({**objective.params, "first.weight": objective.params["first.weight"].flip(0),
                            "first.bias": objective.params["first.bias"].flip(0),
                            "second.weight": objective.params["second.weight"].flip(1)})  # fmt: skip
    assert torch.equal(align(objective, flipped, units=by_hand).position, objective.position)


class Remembering(nn.Module):
    """Writes to itself, and draws random numbers, whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        torch.rand(3)
        return self.second(self.first(x).relu())


def test_the_model_never_notices():
    torch.manual_seed(0)
    normed = mlp(4, 6, 6, 6, 3)
    spectral_norm(normed[0])
    flat, images = torch.randn(8, 4), torch.randn(8, 1, 4, 4)
    for net, x in ((normed, flat), (Remembering(), flat), (convolutional(), images)):
        objective = cv.Objective.of(net.train(), "mse", (x, torch.randn(8, 3)))
        objective.value()  # which keeps what it is called with
        with untouched(net):
            align(objective, objective.position)


def test_bad_input_is_refused():
    objective = network("mlp")
    with pytest.raises(ValueError, match="sweep"):
        align(objective, objective, sweeps=0)
    with pytest.raises(TypeError, match="takes an Objective"):
        align(copy.deepcopy(objective.function.module), objective)
    with pytest.raises(ValueError, match="Expected an objective"):
        align(objective, objective.narrowed("4"))
