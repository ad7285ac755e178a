"""K-FAC and EKFAC against dense matrices, and what theory says of single steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from optimizers import awkward, batches
from reference.kfac import DenseKFAC
from torch import Tensor, nn

import curvature as cv
from curvature.linalg.roots import Eigen
from curvature.optim.control import LevenbergMarquardt
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.rules import kfac as rules
from curvature.optim.rules.kfac import EKFAC, KFAC

BOTH = pytest.mark.parametrize("kind", [KFAC, EKFAC])
NEWTON = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "match": "none", "fisher": "type-2"}


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def data(widths: tuple[int, ...], loss: str, count: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, widths[0], generator=generator, dtype=torch.float64)
    if loss == "mse":
        return x, torch.randn(count, widths[-1], generator=generator, dtype=torch.float64)
    return x, torch.randint(0, widths[-1], (count,), generator=generator)


def weights(net: nn.Module) -> list[Tensor]:
    """[W | b] of each linear layer."""
    linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
    return [torch.cat([part.weight, part.bias[:, None]], 1).detach().clone() for part in linear]


def grads(net: nn.Module) -> list[Tensor]:
    linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
    return [torch.cat([part.weight.grad, part.bias.grad[:, None]], 1).clone() for part in linear]


def stepped(optimizer: PreconditionedOptimizer, net: nn.Module, loss: str, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    {"mse": F.mse_loss, "cross-entropy": F.cross_entropy}[loss](net(batch[0]), batch[1]).backward()
    optimizer.step(objective=cv.Objective.of(net, loss, [batch]))


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@BOTH
@pytest.mark.parametrize(
    "widths, loss", [((3, 4, 2), "mse"), ((2, 3, 3, 3), "cross-entropy"), ((4, 3), "cross-entropy")]
)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_twenty_steps_are_those_of_the_dense_matrix(kind, widths, loss, fisher):
    net = mlp(*widths)
    options = {"momentum": 0.5, "weight_decay": 0.1, "damping": 0.1, "beta": 0.8, "match": "none", "fisher": fisher}
    optimizer = kind(net.parameters(), 0.05, every=5, **options)
    name = f"{'squares' if loss == 'mse' else 'classes'}, {fisher}"
    reference, expected = DenseKFAC(name, 0.05, 0.1, 0.8, 0.5, 0.1, 5, kind is EKFAC), weights(net)
    for step in range(20):
        x, y = data(widths, loss, seed=step)
        optimizer.zero_grad()
        (F.mse_loss if loss == "mse" else F.cross_entropy)(net(x), y).backward()
        expected = reference.step(expected, x, y, grads(net))
        optimizer.step(objective=cv.Objective.of(net, loss, [(x, y)]))
        for found, W in zip(weights(net), expected, strict=True):
            torch.testing.assert_close(found, W, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "widths, loss", [((3, 4, 2), "mse"), ((2, 3, 3, 3), "cross-entropy"), ((4, 3), "cross-entropy")]
)
@pytest.mark.parametrize("own, factored", [(True, False), (True, True), (False, True)])
def test_twenty_steps_of_own_passes_or_factored_damping_are_those_of_the_dense_matrix(widths, loss, own, factored):
    net = mlp(*widths)
    options = {"momentum": 0.5, "weight_decay": 0.1, "damping": 0.1, "beta": 0.8, "match": "none"}
    optimizer = KFAC(
        net.parameters(), 0.05, every=5, fisher="empirical", factored=factored, model=net if own else None, **options
    )
    name = f"{'squares' if loss == 'mse' else 'classes'}, empirical"
    reference = DenseKFAC(name, 0.05, 0.1, 0.8, 0.5, 0.1, 5, corrected=False, factored=factored)
    expected = weights(net)
    for step in range(20):
        x, y = data(widths, loss, seed=step)
        optimizer.zero_grad()
        (F.mse_loss if loss == "mse" else F.cross_entropy)(net(x), y).backward()
        expected = reference.step(expected, x, y, grads(net))
        optimizer.step(objective=None if own else cv.Objective.of(net, loss, [(x, y)]))
        for found, W in zip(weights(net), expected, strict=True):
            torch.testing.assert_close(found, W, rtol=1e-9, atol=1e-11)


def test_factored_damping_is_exact_where_a_factor_is_a_number():
    """And more in all elsewhere: Martens & Grosse 2015, section 6.3."""
    batch = data((3, 1), "mse")
    for net, more in ((nn.Linear(3, 1).double(), 0), (mlp(3, 4, 1), 1)):
        exact, factored = (
            KFAC(net.parameters(), 0.0, damping=0.2, fisher="type-2", factored=factored) for factored in (False, True)
        )
        for optimizer in (exact, factored):
            stepped(optimizer, net, "mse", batch)
        apart = torch.linalg.eigvalsh(exact.operator().dense() - factored.operator().dense())
        assert float(apart[0]) > -1e-12 and (float(apart[-1]) > 1e-3) == bool(more)


def test_factored_damping_of_a_factor_that_is_zero_is_even():
    net = mlp(3, 4, 2)
    optimizer = KFAC(net.parameters(), 0.0, damping=0.04, fisher="empirical", factored=True)
    x = data((3, 2), "mse")[0]
    stepped(optimizer, net, "mse", (x, net(x).detach()))  # no gradient at all
    A = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    expected = torch.linalg.inv(torch.kron(torch.eye(4).double() * 0.2, A.T @ A / len(x) + 0.2 * torch.eye(4).double()))
    torch.testing.assert_close(optimizer.operator().dense()[:16, :16].trace(), expected.trace(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind, make", [(KFAC, cv.kfac), (EKFAC, cv.ekfac)])
@pytest.mark.parametrize("fisher", ["sampled", "type-2", "empirical"])
def test_the_first_matrix_is_the_damped_inverse_of_that_of_the_first_batch(kind, make, fisher):
    """Of all kinds of layers, and with the same labels drawn."""
    net, batch = awkward(), batches(1, 64)[0]
    objective = cv.Objective.of(net, "cross-entropy", [batch])
    optimizer = kind(net.named_parameters(), fisher=fisher, damping=0.02)
    seed = int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(0)))
    expected = cv.inverse(make(objective, fisher=fisher, seed=seed), damping=0.02).dense()
    names = [name for name, _ in net.named_parameters()]
    order = torch.cat([objective.space.places("parameter")[name] for name in names])
    stepped(optimizer, net, "cross-entropy", batch)
    torch.testing.assert_close(optimizer.operator().dense(), expected[order][:, order], rtol=1e-8, atol=1e-9)


@BOTH
def test_a_step_of_a_linear_model_is_the_least_squares_solution(kind):
    """The Hessian is a Kronecker product."""
    net, (x, y) = nn.Linear(4, 3, bias=False).double(), data((4, 3), "mse")
    stepped(kind(net.parameters(), damping=1e-11, **NEWTON), net, "mse", (x, y))
    torch.testing.assert_close(net.weight.detach().T, torch.linalg.lstsq(x, y).solution, rtol=1e-8, atol=1e-9)


@BOTH
def test_of_deep_linear_networks_it_has_the_blocks_of_the_gauss_newton_matrix(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    batch = data((4, 3), "mse")
    G = cv.ggn(cv.Objective.of(net, "mse", [batch])).dense()
    expected = torch.block_diag(
        *(torch.linalg.inv(b + 0.1 * torch.eye(len(b)).double()) for b in (G[:25, :25], G[25:, 25:]))
    )
    optimizer = kind(net.parameters(), 0.0, damping=0.1, fisher="type-2")
    stepped(optimizer, net, "mse", batch)
    torch.testing.assert_close(optimizer.operator().dense(), expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_the_regulariser_is_part_of_the_curvature(kind):
    """A step of a linear model with weights that are penalised is the solution of ridge regression."""
    net, (x, y) = nn.Linear(4, 3, bias=False).double(), data((4, 3), "mse")
    kind(net.parameters(), damping=1e-12, **NEWTON).step(objective=cv.Objective.of(net, "mse", [(x, y)], l2=0.3))
    A = x.T @ x * 2 / y.numel() + 0.3 * torch.eye(4).double()
    expected = torch.linalg.solve(A, x.T @ y * 2 / y.numel())
    torch.testing.assert_close(net.weight.detach().T, expected, rtol=1e-8, atol=1e-9)


class Turned(nn.Module):
    """tanh(B^-1 W C^-1 x) times V: with the weight B W C the same function."""

    def __init__(self, B: Tensor, C: Tensor) -> None:
        super().__init__()
        net = mlp(3, 4, 2, bias=False)
        self.first, self.last = net[0], net[2]
        self.B, self.C = torch.linalg.inv(B), torch.linalg.inv(C)
        with torch.no_grad():
            self.first.weight.copy_(B @ self.first.weight @ C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x @ self.C.T) @ self.B.T))


def test_without_damping_the_change_of_the_function_does_not_depend_on_coordinates():
    torch.manual_seed(3)
    B, C = torch.randn(4, 4).double(), torch.randn(3, 3).double()
    batch, outputs = data((3, 2), "mse", 64), []
    for net in (Turned(torch.eye(4).double(), torch.eye(3).double()), Turned(B, C)):
        before = net(batch[0]).detach()
        stepped(KFAC(net.parameters(), damping=1e-13, **{**NEWTON, "lr": 0.1}), net, "mse", batch)
        outputs.append(net(batch[0]).detach() - before)
    assert outputs[0].norm() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-7)


def test_a_convolution_of_single_pixels_is_a_linear_layer_at_every_position():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 4, 1).double(), nn.Linear(3, 4).double()
    linear.load_state_dict({name: p.view(p.shape[:2]) for name, p in conv.state_dict().items()})
    x, y = torch.randn(6, 3, 2, 5).double(), torch.randn(6, 4, 2, 5).double()
    stepped(KFAC(conv.parameters(), damping=0.1, **NEWTON), conv, "mse", (x, y))
    stepped(KFAC(linear.parameters(), damping=0.1, **NEWTON), linear, "mse", (x.movedim(1, -1), y.movedim(1, -1)))
    torch.testing.assert_close(conv.weight.view(4, 3), linear.weight, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(conv.bias, linear.bias, rtol=1e-9, atol=1e-11)


@BOTH
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_steps_do_not_depend_on_how_often_each_example_is_given(kind, fisher):
    """kfac-pytorch 0.4: factors of gradients of the mean, which fall with the square of the number of examples."""
    x, y = data((3, 4, 2), "mse")
    ends = []
    for copies in (1, 4):
        net = mlp(3, 4, 2)
        optimizer = kind(net.parameters(), 0.1, match="none", fisher=fisher, damping=1e-2)
        for _ in range(3):
            stepped(optimizer, net, "mse", (x.repeat(copies, 1), y.repeat(copies, 1)))
        ends.append(flat(net))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"groups": 2}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}], ids=str)  # fmt: skip
def test_factors_of_convolutions_are_those_of_the_patches_they_see(options):
    """kfac-pytorch 0.4: patches without dilation, and an error for groups."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 2, bias=False, **options).double()
    x = torch.randn(8, 2, 6, 6).double()
    patches = F.unfold(x, 2, **{name: value for name, value in options.items() if name != "groups"})
    groups = options.get("groups", 1)
    rows = patches.movedim(1, -1).reshape(-1, groups, 2 // groups, 4).transpose(2, 3).flatten(2)  # channels last
    expected = torch.einsum("rgi,rgj->gij", rows, rows) / len(rows)
    optimizer = KFAC(conv.parameters(), fisher="type-2")
    stepped(optimizer, conv, "mse", (x, conv(x).detach() + 1))
    factors = optimizer.state[conv.weight]["block.Conv2d.right"]
    torch.testing.assert_close(factors, expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_all_parameters_are_trained_with_a_layer_or_without(kind):
    """SINGD leaves those of other layers where they are. Tied, alone, or a number: the diagonal."""
    net = awkward()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = kind(net.named_parameters(), 1e-2)
    for batch in batches(2):
        stepped(optimizer, net, "cross-entropy", batch)
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())
    state = optimizer.state[next(net.parameters())]
    alone = {name.removesuffix(".square") for name in state if name.endswith(".square")}
    layers = {name.removesuffix(".left") for name in state if name.endswith(".left")}
    assert alone == {"block.second.weight", "block.shift", "block.scale"}
    assert layers == {f"block.{name}" for name in ("embed", "first", "norm", "conv", "second", "third", "head")}


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_averages_begin_as_means_and_go_on_with_their_decay(beta):
    net, widths = mlp(3, 4, 2), (3, 4, 2)
    optimizer = KFAC(net.parameters(), 0.0, beta=beta, fisher="type-2")
    expected = torch.zeros(1, 4, 4).double()
    for k in range(1, 15):
        batch = data(widths, "mse", seed=k)
        rho = min(1 - 1 / k, beta)
        fresh = cv.kfac(cv.Objective.of(net, "mse", [batch]), fisher="type-2").blocks["0"]
        expected = rho * expected + (1 - rho) * fresh.right
        stepped(optimizer, net, "mse", batch)
        torch.testing.assert_close(optimizer.state[net[0].weight]["block.0.right"], expected, rtol=1e-12, atol=1e-14)


@BOTH
def test_of_statistics_that_do_not_change_the_matrix_is_the_same_however_often_it_is_made(kind):
    net, batch = mlp(3, 4, 2), data((3, 4, 2), "mse")
    matrices = []
    for every in (1, 4):
        optimizer = kind(net.parameters(), 0.0, every=every, fisher="type-2")
        for _ in range(6):
            stepped(optimizer, net, "mse", batch)
        matrices.append(optimizer.operator().dense())
    torch.testing.assert_close(*matrices, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kl", [1e-4, 1e6])
def test_a_direction_is_shortened_to_the_divergence_and_never_made_longer(kl):
    ends = []
    for match in ("none", "kl"):
        net, batch = mlp(3, 4, 2), data((3, 4, 2), "mse")
        before = flat(net)
        stepped(KFAC(net.parameters(), **{**NEWTON, "match": match}, kl=kl), net, "mse", batch)
        g = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        ends.append((before - flat(net), g))
    (whole, g), (short, _) = ends
    share = float(short.norm() / whole.norm())  # d . P^-1 d, where P^-1 whole = g
    assert share**2 * float(whole @ g) == pytest.approx(min(kl, float(whole @ g)), rel=1e-9)
    torch.testing.assert_close(short / short.norm(), whole / whole.norm(), rtol=1e-9, atol=1e-12)


@BOTH
def test_with_the_length_of_adam_the_learning_rate_is_that_of_adamw(kind):
    net, batch = mlp(3, 4, 2), data((3, 4, 2), "mse")
    before = flat(net)
    stepped(kind(net.parameters(), 1e-2, weight_decay=0.0), net, "mse", batch)
    assert float((flat(net) - before).norm()) == pytest.approx(1e-2 * len(before) ** 0.5, rel=1e-6)


@BOTH
def test_the_mini_batch_is_needed_only_when_statistics_are_collected(kind):
    net, batch = mlp(3, 4, 2), data((3, 4, 2), "mse")
    optimizer = kind(net.parameters(), every=6, collect=3)
    for step in range(7):
        F.mse_loss(net(batch[0]), batch[1]).backward()
        if step % 3:
            optimizer.step()
            continue
        with pytest.raises(cv.NeedsEvidence, match="needs the mini-batch as a function"):
            optimizer.step()
        optimizer.step(objective=cv.Objective.of(net, "mse", [batch]))


@BOTH
def test_statistics_that_are_not_finite_are_left_out(kind):
    net, twin, batch = mlp(3, 4, 2), mlp(3, 4, 2), data((3, 4, 2), "mse")
    optimizer = kind(net.parameters(), fisher="type-2", weight_decay=0.0)
    stepped(optimizer, net, "mse", batch)
    before, P = flat(net), optimizer.operator(copy=True).dense()
    stepped(optimizer, net, "mse", (batch[0] * math.nan, batch[1]))
    assert torch.equal(flat(net), before) and torch.equal(optimizer.operator().dense(), P)
    factor = optimizer.state[net[0].weight]["block.0.right"].clone()
    double = (2 * batch[0], batch[1])
    fresh = cv.kfac(cv.Objective.of(net, "mse", [double]), fisher="type-2").blocks["0"].right
    stepped(optimizer, net, "mse", double)  # the second that counts
    torch.testing.assert_close(optimizer.state[net[0].weight]["block.0.right"], (factor + fresh) / 2)
    assert flat(net).isfinite().all() and not torch.equal(flat(net), before)
    first, start = kind(twin.parameters(), fisher="type-2", weight_decay=0.0), flat(twin)
    first._checked.append(cv.Objective.of(twin, "mse", [batch]).check())
    stepped(first, twin, "mse", (batch[0] * math.nan, batch[1]))  # there are none yet
    assert torch.equal(flat(twin), start)


def test_a_decomposition_that_fails_leaves_the_last_one_and_three_end_the_run(monkeypatch):
    net, batch = mlp(3, 4, 2), data((3, 4, 2), "mse")
    optimizer = KFAC(net.parameters(), 0.0, every=1, fisher="type-2")
    stepped(optimizer, net, "mse", batch)
    P = optimizer.operator(copy=True).dense()

    def failing(S: Tensor) -> Eigen:
        return Eigen(S[..., 0] * math.nan, S * math.nan, torch.zeros(len(S), dtype=torch.bool))

    monkeypatch.setattr(rules, "eigen", failing)
    for _ in range(2):
        stepped(optimizer, net, "mse", batch)
        assert torch.equal(optimizer.operator().dense(), P)
    with pytest.raises(cv.NonFinite, match=r"factor block\..*\.(left|right) has no eigenvectors"):
        stepped(optimizer, net, "mse", batch)


class Sometimes(nn.Module):
    """A network with a layer that only some batches go through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.also, self.used = nn.Linear(3, 3), nn.Linear(3, 3), True

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.also(x.tanh()) if self.used else x


@BOTH
@pytest.mark.parametrize("first", [True, False])
def test_layers_may_come_and_go(kind, first):
    """One that was not called at first has a diagonal, and statistics when it is called."""
    net, batch = Sometimes(), tuple(part.float() for part in data((3, 3), "mse"))
    optimizer = kind(net.named_parameters(), fisher="type-2", damping=1e-2)
    for step in range(6):
        net.used = (step % 2 == 0) is first
        before = net.also.weight.detach().clone()
        stepped(optimizer, net, "mse", batch)
        moved = float((net.also.weight.detach() - before).norm())
        assert moved < 0.1 and (moved > 0 or not net.used)


def test_a_layer_that_is_used_outside_is_found_out_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) @ self.first.weight).tanh())

    torch.manual_seed(0)
    net, batch = Twice().double(), data((3, 2), "mse")
    objective = cv.Objective.of(net, "mse", [batch])
    before = cv.kfac(objective, fisher="type-2").dense()
    assert set(objective.check().altered) == {"first"}
    torch.testing.assert_close(cv.kfac(objective, fisher="type-2").dense(), before, rtol=0, atol=0)
    optimizer = KFAC(net.named_parameters(), 0.0, fisher="type-2")
    stepped(optimizer, net, "mse", batch)
    assert {"block.first.weight.square", "block.last.left"} <= optimizer.state[net.first.weight].keys()


def test_damping_may_be_adapted():
    net, batch = mlp(3, 4, 2), data((3, 4, 2), "mse")
    optimizer = KFAC(net.parameters(), **NEWTON, damping=1.0, control=LevenbergMarquardt())
    losses = []
    for _ in range(40):
        losses.append(float(F.mse_loss(net(batch[0]), batch[1]).detach()))
        stepped(optimizer, net, "mse", batch)
    assert all(b <= a for a, b in itertools.pairwise(losses)) and losses[-1] < 0.7 * losses[0]
    assert optimizer.param_groups[0]["damping"] != 1.0
