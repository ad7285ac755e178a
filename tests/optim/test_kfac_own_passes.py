"""K-FAC of the passes of the training loop itself: what it records, and what of it counts."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from optimizers import awkward, batches
from torch import Tensor, nn

import curvature as cv
from curvature.operators.layer_record import LayerRecord, number_of_terms
from curvature.optim import KFAC

LAYERS = ("embed", "first", "norm", "conv", "head")


def recorded(net: nn.Module, **options) -> KFAC:
    return KFAC(net.named_parameters(), **{"lr": 0.0, "fisher": "empirical", "model": net, "damping": 1e-2, **options})


def factors(optimizer: KFAC) -> dict[str, Tensor]:
    first = optimizer.param_groups[0]["params"][0]
    return {n: t for n, t in optimizer.state[first].items() if n.endswith((".left", ".right", ".square"))}


def backward(net: nn.Module, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    (F.cross_entropy(net(batch[0]), batch[1]) * scale).backward()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=1e-14, msg=name)


def test_factors_of_all_kinds_of_layers_are_those_of_a_pass_of_its_own():
    net, batch = awkward(), batches(1)[0]
    optimizer = recorded(net)
    backward(net, batch)
    optimizer.step()
    expected = cv.kfac(cv.Objective.of(net, "cross-entropy", [batch]), fisher="empirical").blocks
    found = factors(optimizer)
    for name in LAYERS:
        torch.testing.assert_close(found[f"block.{name}.left"], expected[name].left, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found[f"block.{name}.right"], expected[name].right, rtol=1e-10, atol=1e-14)
    square = 16 * net.shift.grad.square()  # of the mean of 16 terms
    torch.testing.assert_close(found["block.shift.square"], square, rtol=1e-12, atol=0)
    tied = 16 * net.second.weight.grad.square().flatten()
    torch.testing.assert_close(found["block.second.weight.square"], tied, rtol=1e-12, atol=0)


def test_parts_of_a_batch_are_taken_together():
    x, y = batches(1)[0]
    found = []
    for parts in (1, 4):
        net = awkward()
        optimizer = recorded(net)
        for part in range(parts):
            rows = slice(part * 16 // parts, (part + 1) * 16 // parts)
            backward(net, (x[rows], y[rows]), 1 / parts)
        optimizer.step()
        found.append(factors(optimizer))
    assert_same(found[1], found[0])


def test_gradients_that_were_scaled_and_given_back_count_as_they_are_given():
    """As by a GradScaler: whatever the scale was."""
    found = []
    for scale in (1.0, 2.0**12):
        net = awkward()
        optimizer = recorded(net)
        backward(net, batches(1)[0], scale)
        for p in net.parameters():
            p.grad.div_(scale)
        optimizer.step()
        found.append(factors(optimizer))
    assert_same(found[1], found[0])


def test_gradients_that_were_clipped_have_second_moments_that_are():
    found, lengths = [], []
    for longest in (math.inf, 0.01):
        net = awkward()
        optimizer = recorded(net)
        backward(net, batches(1)[0])
        lengths.append(float(nn.utils.clip_grad_norm_(net.parameters(), longest)))
        optimizer.step()
        found.append(factors(optimizer))
    share = (0.01 / (lengths[1] + 1e-6)) ** 2
    inputs = {f"block.{name}.{'left' if name == 'embed' else 'right'}" for name in LAYERS if name != "norm"}
    of_others = {"block.norm.left", "block.second.right", "block.third.right"}  # ones
    expected = {n: t if n in inputs | of_others else t * share for n, t in found[0].items()}
    assert_same(found[1], expected, rtol=1e-8)


def test_groups_may_cut_layers():
    """Biases are often in a group of their own, without decay."""
    net, twin, batch = awkward(), awkward(), batches(1)[0]
    named = list(net.named_parameters())
    biases = [(n, p) for n, p in named if n.endswith("bias")]
    groups = [{"params": [pair for pair in named if pair not in biases]}, {"params": biases}]
    others = [{"params": [(n, dict(twin.named_parameters())[n]) for n, _ in g["params"]]} for g in groups]
    optimizer = KFAC(groups, 0.0, fisher="empirical", model=net)
    other = KFAC(others, 0.0, fisher="empirical")
    for model, opt in ((net, optimizer), (twin, other)):
        backward(model, batch)
        opt.step(objective=cv.Objective.of(model, "cross-entropy", [batch]) if opt is other else None)
    for group, same in zip(optimizer.param_groups, other.param_groups, strict=True):
        found, expected = optimizer.state[group["params"][0]], other.state[same["params"][0]]
        names = [f"block.{n}.{side}" for n in LAYERS for side in ("left", "right")]
        compared = [n for n in names if n in expected]
        assert len(compared) >= 8
        for name in compared:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-14)


def test_passes_that_are_not_due_or_have_other_parameters_are_not_seen(monkeypatch):
    net, batch = awkward(), batches(1)[0]
    optimizer, seen = recorded(net, every=6, collect=3), []
    take, counts = LayerRecord.take, []

    def counted(self: LayerRecord, *call) -> None:
        seen.append(call)
        take(self, *call)

    monkeypatch.setattr(LayerRecord, "take", counted)
    for _ in range(7):
        optimizer.zero_grad()
        objective = cv.Objective.of(net, "cross-entropy", [batch])
        cv.hessian(objective) @ torch.ones(objective.space.size).double()
        with torch.no_grad():
            net(batch[0])
        backward(net, batch)
        counts.append(len(seen))
        optimizer.step()
    assert [b - a for a, b in zip([0, *counts], counts, strict=False)] == [8, 0, 0, 8, 0, 0, 8]


def test_a_pass_that_was_not_stepped_is_forgotten():
    """As where a GradScaler leaves a step out."""
    net, twin, (first, second) = awkward(), awkward(), batches(2)
    optimizer, other = recorded(net), recorded(twin)
    backward(net, first)
    optimizer.zero_grad()
    for model, opt in ((net, optimizer), (twin, other)):
        backward(model, second)
        opt.step()
    assert_same(factors(optimizer), factors(other))


def test_models_are_left_as_they_are():
    """Running statistics move once a pass; copies have no hooks, nor the model after its optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    twin, x, y = copy.deepcopy(net), torch.randn(8, 4).double(), torch.arange(8) % 3
    optimizer = recorded(net)
    for model in (net, twin):
        state = torch.get_rng_state()
        backward(model, (x, y))
        assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    pickle.loads(pickle.dumps(net))(x)
    optimizer.step()
    assert optimizer.state[net[0].weight].keys() >= {"block.0.left", "block.1.right", "block.3.left"}
    copied = copy.deepcopy(net)
    backward(copied, (x, y))
    assert optimizer.preconditioner.record.terms == 8
    del optimizer
    gc.collect()
    assert not net[0]._forward_hooks and not net._forward_hooks


def test_layers_that_are_used_elsewhere_have_the_diagonal():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) @ self.first.weight).tanh())

    torch.manual_seed(0)
    net = Twice().double()
    optimizer = recorded(net)
    backward(net, (torch.randn(6, 3).double(), torch.arange(6) % 2))
    optimizer.step()
    assert {"block.first.weight.square", "block.first.bias.square", "block.last.left"} <= factors(optimizer).keys()


def test_tokens_that_are_ignored_are_no_terms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11)).double()
    x, y = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    y[0, 2:] = -100
    optimizer = recorded(net)
    F.cross_entropy(net(x).transpose(1, 2), y).backward()
    optimizer.step()
    assert optimizer.preconditioner.record.terms == 12
    expected = cv.kfac(cv.Objective.of(net, "cross-entropy", [(x, y)]), fisher="empirical").blocks
    found = factors(optimizer)
    torch.testing.assert_close(found["block.1.left"], expected["1"].left, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found["block.0.right"], expected["0"].right, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "loss", "terms"),
    [
        ((6, 4), lambda f: F.cross_entropy(f, torch.arange(6) % 4), 6),
        ((6, 4, 5), lambda f: F.cross_entropy(f, torch.arange(30).view(6, 5) % 4), 30),
        ((6, 5, 4), lambda f: F.cross_entropy(f.flatten(0, 1), torch.arange(30) % 4), 30),
        ((6, 4, 2, 3), lambda f: F.cross_entropy(f, torch.arange(36).view(6, 2, 3) % 4), 36),
        ((6, 4), lambda f: F.cross_entropy(f, torch.tensor([0, 1, 2, 3, -100, -100]), label_smoothing=0.1), 4),
        ((6, 4), lambda f: F.mse_loss(f, torch.ones_like(f)), 24),
        ((6, 4), lambda f: F.binary_cross_entropy_with_logits(f, torch.eye(6, 4).to(f)), 24),
        ((6,), lambda f: F.binary_cross_entropy_with_logits(f, (torch.arange(6) % 2).to(f)), 6),
        ((6, 4), lambda f: F.nll_loss(f.detach() * 0 + f, torch.arange(6) % 4), 6),
    ],
)
def test_terms_are_counted_by_their_gradients(shape, loss, terms, dtype):
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs), outputs)
    assert number_of_terms(gradient) == terms


def test_without_a_pass_of_the_model_or_with_that_of_another_it_says_what_to_do():
    net, batch = awkward(), batches(1)[0]
    optimizer = recorded(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(cv.NeedsEvidence, match="Call the model itself, and backward, between zero_grad"):
        optimizer.step()
    net.zero_grad()
    inside = nn.Sequential(net)
    part = recorded(inside)
    backward(net, batch)
    with pytest.raises(cv.NeedsEvidence, match="No layer of the Sequential has the gradients"):
        part.step()
    other = KFAC(net.named_parameters(), fisher="empirical", model=awkward())
    backward(net, batch)
    with pytest.raises(cv.NeedsEvidence, match="The Awkward given as model= has no parameter shift"):
        other.step()
    with pytest.raises(ValueError, match="give fisher='empirical', not 'sampled'"):
        KFAC(net.named_parameters(), model=net)
