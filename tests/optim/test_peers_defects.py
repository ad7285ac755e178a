"""Defects that other packages of second-order optimizers have, as tests that ours have none of them.

Those that every optimizer is tried for are in test_conformance: states that are cast to half precision or lose strings
when they are loaded (HeavyBall 3.2, kron_torch), need code to be read (Distributed Shampoo), or stay behind (M-FAC,
ASDL); closures without gradients (SOAP); float64, CPUs and frozen parameters that crash (SOAP, HeavyBall, M-FAC, MKOR).
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import awkward, batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import curvature as cv
from curvature.optim import (
    EFCP,
    EGN,
    EKFAC,
    KFAC,
    MFAC,
    PSGD,
    SOAP,
    AdaHessian,
    KLShampoo,
    Muon,
    NewtonCG,
    PreconditionedOptimizer,
    Shampoo,
    SophiaG,
    SophiaH,
)
from curvature.optim.rules import psgd_fit

GRADIENT_ONLY = [Muon, PSGD, Shampoo, SOAP, KLShampoo, MFAC, EFCP]
OTHERS = [KFAC, EKFAC, EGN, NewtonCG, SophiaG, SophiaH, AdaHessian]
DENSE = [kind for kind in GRADIENT_ONLY if kind is not EFCP]  # of whose steps no entry is zero
ANY = pytest.mark.parametrize("kind", GRADIENT_ONLY + OTHERS)
Kind = Callable[..., PreconditionedOptimizer]


def small(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def data(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=generator, dtype=torch.float64).to(dtype), torch.arange(12) % 3


def stepped(net: nn.Module, optimizer: PreconditionedOptimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [batch]))


# What is saved


@pytest.mark.parametrize("rank", [None, 2])
def test_the_schedule_of_fits_is_saved(rank):
    """kron_torch: how often it has fitted, and its random numbers, are on the object alone; a run that goes on fits at
    other steps."""
    net, twin = small(), small()
    run, resumed = (PSGD(n.named_parameters(), 1e-2, rank=rank, every=7) for n in (net, twin))
    run.param_groups[0]["taken"] = 3000  # where few steps are scheduled
    stepped(net, run, data())
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(run.state_dict())
    for seed in range(1, 9):
        stepped(net, run, data(seed))
        stepped(twin, resumed, data(seed))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [SOAP, PSGD, Shampoo, KLShampoo, Muon])
def test_factors_of_half_precision_parameters_are_loaded_in_single_precision(kind):
    """HeavyBall 3.2: torch casts a state that is loaded to the dtype of the parameters, and it stays there."""
    net, twin = small(torch.bfloat16), small(torch.bfloat16)
    run, resumed = kind(net.named_parameters(), lr=1e-2), kind(twin.named_parameters(), lr=1e-2)
    for seed in range(3):
        stepped(net, run, data(seed, torch.bfloat16))
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(run.state_dict())
    for _ in range(2):
        stepped(twin, resumed, data(9, torch.bfloat16))
        for state in resumed.state.values():
            assert {t.dtype for t in state.values() if t.is_floating_point()} <= {torch.float32, torch.float64}


def test_the_window_is_in_the_state():
    """M-FAC: its gradients are on an object beside the optimizer, and `state_dict` is empty."""
    net, twin = small(), small()
    run, fresh = (MFAC(n.named_parameters(), 1e-2, window=4) for n in (net, twin))
    for seed in range(6):
        stepped(net, run, data(seed))
    twin.load_state_dict(net.state_dict())
    fresh.load_state_dict(run.state_dict())
    torch.testing.assert_close(fresh.operator().dense(), run.operator().dense(), rtol=0, atol=0)


# What is asked for, and when


def test_pairs_with_the_hessian_are_products_with_it(monkeypatch):
    """HeavyBall 3.2, `hessian_approx=True`: with its default interval of one no product is ever made, and what is fitted
    is the gradient."""
    made = []
    monkeypatch.setattr(psgd_fit, "hessian", lambda objective: made.append(objective) or cv.hessian(objective))
    net = small()
    optimizer = PSGD(net.named_parameters(), 1e-2, fit="hessian", rank=2)
    for seed in range(5):
        stepped(net, optimizer, data(seed))
        assert len(made) == seed + 1


@pytest.mark.parametrize("kind", [SophiaH, AdaHessian])
def test_an_estimate_is_of_the_parameters_it_is_used_at(kind):
    """pytorch_optimizer 3.9, `update_period=10`: made at steps 11, 21, ... and taken in nine steps later."""
    net = nn.Linear(3, 1, bias=False).double()

    def fourth(net: nn.Module, batch: Tensor) -> Tensor:  # with the Hessian diag(w^2), which one probe tells exactly
        return (net.weight**4).sum() / 12

    optimizer = kind(net.parameters(), lr=1e-2, betas=(0.0, 0.0), every=3)
    for step in range(8):
        if step % 3 == 0:
            expected = net.weight.detach().square()
        optimizer.zero_grad()
        fourth(net, torch.zeros(1)).backward()
        optimizer.step(objective=cv.Objective.from_loss(net, fourth, [torch.zeros(1).double()]))
        found = optimizer.state[net.weight]["curvature"].view(1, 3)
        torch.testing.assert_close(found.sqrt() if kind is AdaHessian else found, expected, rtol=1e-12, atol=0)
        assert not torch.equal(expected, net.weight.detach().square())


@pytest.mark.parametrize("kind", OTHERS)
def test_a_forgotten_mini_batch_is_an_error(kind):
    """Sophia: without its second backward pass it becomes a method of signs, and says nothing."""
    net = small()
    optimizer = kind(net.named_parameters())
    F.cross_entropy(net(data()[0]), data()[1]).backward()
    with pytest.raises(
        cv.NeedsEvidence, match=r"Call step\(objective=curvature.Objective.of\(model, loss, \[batch\]\)\)"
    ):
        optimizer.step()


@pytest.mark.parametrize("kind", [SophiaG, SophiaH, AdaHessian])
def test_graphs_are_not_kept(kind):
    """AdaHessian: backward(create_graph=True), and the user's gradients keep the whole graph alive."""
    net = small()
    stepped(net, kind(net.named_parameters()), data())
    assert not any(p.grad.requires_grad or p.grad.grad_fn for p in net.parameters() if p.grad is not None)


def test_convolutions_of_one_axis_have_a_curvature():
    """AdaHessian: UnboundLocalError for the three axes of nn.Conv1d."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    batch = torch.randn(4, 2, 3).double(), torch.arange(4) % 3
    before = net[0].weight.detach().clone()
    stepped(net, AdaHessian(net.named_parameters()), batch)
    assert net[0].weight.isfinite().all() and not torch.equal(net[0].weight, before)


# Scales and averages


@pytest.mark.parametrize("own", [True, False])
def test_factors_do_not_depend_on_how_often_each_example_is_given(own):
    """kfac-pytorch: G from gradients of the mean loss falls with the square of the batch; at its default damping the
    direction is then the gradient times 1 / damping."""
    found = []
    for copies in (1, 4, 16):
        net, (x, y) = small(), data()
        options = {"fisher": "empirical", "damping": 1e-3, "match": "none", "model": net if own else None}
        optimizer = KFAC(net.parameters(), 0.0, momentum=0.0, **options)
        stepped(net, optimizer, (x.repeat(copies, 1), y.repeat(copies)))
        state = optimizer.state[net[0].weight]
        g = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        d = optimizer.operator() @ g
        found.append((float(state["block.0.left"].diagonal(dim1=1, dim2=2).sum()), float(d @ g / d.norm() / g.norm())))
    assert found[1] == pytest.approx(found[0], rel=1e-9) and found[2] == pytest.approx(found[0], rel=1e-9)
    assert found[0][1] < 0.95  # more than the gradient times a number


def test_factors_are_averages_and_not_rescaled():
    """AdaFisher: `current *= 0.1 gamma; current += 0.01 gamma new`, after which all factors are nearly constant; and each
    is mapped to [0, 1] by its least and largest entry."""
    net, batch = small(), data()
    optimizer = KFAC(net.parameters(), 0.0, fisher="type-2", beta=0.9)
    expected = cv.kfac(cv.Objective.of(net, "cross-entropy", [batch]), fisher="type-2").blocks["0"]
    for _ in range(30):
        stepped(net, optimizer, batch)
        state = optimizer.state[net[0].weight]
        torch.testing.assert_close(state["block.0.left"], expected.left, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(state["block.0.right"], expected.right, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_convolutions_are_seen_with_their_dilation_and_groups(options, own):
    """kfac-pytorch: patches without dilation, off by 68 %, and an error of shapes for groups."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 2, bias=False, **options), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(6, 2, 4, 4).double(), torch.arange(6) % 3
    net(x)
    optimizer = KFAC(net.parameters(), 0.0, fisher="empirical", model=net if own else None)
    stepped(net, optimizer, (x, y))
    groups = options.get("groups", 1)
    patches = F.unfold(x, 2, **{k: v for k, v in options.items() if k != "groups"}).movedim(1, -1)
    rows = patches.reshape(-1, groups, 2 // groups, 4).transpose(2, 3).flatten(2)  # channels last
    expected = torch.einsum("rgi,rgj->gij", rows, rows) / len(rows)
    torch.testing.assert_close(optimizer.state[net[0].weight]["block.0.right"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 70)])
def test_momentum_is_not_turned_out_of_its_basis_and_back_at_each_step(shape):
    """SOAP: at every step the momentum leaves the eigenbasis and enters it again, though that did not change: two more
    products for each axis."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = SOAP([("w", p)], every=10)
    torch.manual_seed(0)
    counts = []
    for _ in range(3):
        p.grad = torch.randn(shape, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        counts.append(counter.get_total_flops())
    once = 2 * p.numel() * sum(shape)  # one product with a matrix for each axis
    # the gradient, the momentum, and back; what the moments take in may be counted or, in place, not
    assert 3 * once <= counts[1] == counts[2] <= 4 * once


def test_second_moments_stay_with_the_directions_they_are_of():
    """Distributed Shampoo and others: eigenvectors are sorted anew at a refresh, and the second moments are not. Two
    eigenvalues change places here; along each eigenvector the second moment is that of the gradients in it."""
    p = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = SOAP([("w", p)], lr=0.0, betas=(0.0, 0.5), every=1)
    sizes = [(4.0, 1.0)] * 3 + [(0.1, 3.0)] * 4
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for large, other in sizes:
        p.grad = torch.zeros(2, 3, dtype=torch.float64)
        p.grad[0, 0], p.grad[1, 1] = large, other
        optimizer.step()
        expected = expected / 2 + p.grad.square() / 2
    expected /= 1 - 0.5 ** len(sizes)
    dense = optimizer.operator().dense().diagonal().view(2, 3)
    torch.testing.assert_close(dense[[0, 1], [0, 1]], expected[[0, 1], [0, 1]].rsqrt(), rtol=1e-6, atol=0)


# What users write


@pytest.mark.parametrize("kind", DENSE)
def test_parameters_of_a_model_are_enough(kind):
    """pytorch_optimizer: Muon(model.parameters()) raises "Tensor.__contains__ only supports Tensor or scalar"."""
    net = awkward()
    before = [p.detach().clone() for p in net.parameters()]
    stepped(net, kind(net.parameters(), lr=1e-2), batches(1)[0])
    assert not any(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def choices() -> list[tuple[Kind, str, Any]]:
    """Each value of each argument that has names for values, of all classes."""
    found = []
    for kind in GRADIENT_ONLY + OTHERS:
        for name, hint in typing.get_type_hints(kind.__init__).items():
            found += [(kind, name, value) for value in typing.get_args(hint) if isinstance(value, str)]
    return found


@pytest.mark.parametrize(("kind", "name", "value"), choices(), ids=str)
def test_what_an_argument_may_be_is_taken(kind, name, value):
    """MKOR: its README says optimizer="adamw", its code takes "sgd" and "adam" alone."""
    net = small()
    before = [p.detach().clone() for p in net.parameters()]
    stepped(net, kind(net.named_parameters(), **{name: value}), data())
    assert all(p.isfinite().all() for p in net.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


@ANY
def test_a_step_prints_nothing_and_changes_no_flag(kind, capfd):
    """M-FAC and ISTA DenseMFAC turn TF32 off for all when they are imported, and log to wandb inside `step`; kron_torch
    prints."""

    def flags() -> tuple:
        matmul = torch.backends.cuda.matmul
        return (
            matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
        )

    before, net = flags(), small()
    optimizer = kind(net.named_parameters())
    for seed in range(2):
        stepped(net, optimizer, data(seed))
    assert flags() == before and capfd.readouterr() == ("", "")


@ANY
def test_gradients_are_read_and_not_written(kind):
    """Muon writes its look-ahead into p.grad, HeavyBall clears it."""
    net, batch = small(), data()
    optimizer = kind(net.named_parameters())
    stepped(net, optimizer, batch)
    twin = small()
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("kind", DENSE)
def test_a_first_gradient_of_zero_is_no_division_by_zero(kind):
    """HeavyBall, ISTA: 0/0 where layers begin with zeros, as projections do."""
    torch.manual_seed(0)
    net = small()
    nn.init.zeros_(net[2].weight)  # then the first layer has no gradient
    optimizer = kind(net.named_parameters(), lr=1e-2)
    start = net[0].weight.detach().clone()
    for seed in range(3):
        stepped(net, optimizer, data(seed))
        assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[0].weight, start)


@pytest.mark.parametrize("kind", [PSGD, Shampoo, SOAP, KLShampoo])
def test_a_large_vocabulary_has_no_matrix_of_its_size(kind):
    """HeavyBall: PSGD tries to take 64 GB for a convolutional model, whose axes it has merged."""
    net = nn.Sequential(nn.Embedding(20_000, 8), nn.Flatten(), nn.Linear(16, 3))
    optimizer = kind([("embed.weight", net[0].weight), *nn.Module.named_parameters(net[2])])
    x = torch.randint(0, 20_000, (4, 2), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(net(x), torch.arange(4) % 3).backward()
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values())
    assert held < 8 * sum(p.numel() for p in net.parameters())
