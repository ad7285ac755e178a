"""The loss at many points: whatever is computed together, at each of them it is the loss there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from matrices import Stopping
from objectives import zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.probes import points as probed
from curvature.probes import together
from curvature.probes.points import Points
from curvature.probes.together import Together, resized

CASES = {case.name: case for case in zoo()}


def around(objective: cv.Objective, count: int, size: float = 0.3) -> Tensor:
    """Points in its neighbourhood, as rows."""
    return objective.position + size * objective.space.draw(count, seed=1, kind="normal")


def there(objective: cv.Objective, rows: Tensor) -> Tensor:
    """The value at each, one by one."""
    return torch.tensor([objective.at(row).value() for row in rows], dtype=torch.float64)


def program(objective: cv.Objective) -> Callable[[Tensor, Any], Tensor]:
    return lambda row, batch: objective.total(objective.space.named(row), batch).reshape(1)


def batches_of(objective: cv.Objective) -> int:
    return len(list(resized(objective, program(objective)).batches))


def counted(module: nn.Module) -> list[int]:
    """A list that grows with every call of the module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


class Centred(nn.Module):
    """A layer after which every example depends on all others of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Slope(nn.Module):
    """The derivative of a network in its input, which asks for autograd inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


class Reading(nn.Module):
    """What it does depends on its weights in a way that no tracer sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.inner.parameters())
        return self.inner(x) * (1 if weight.detach().numpy().sum() > 0 else 3)


def images(*layers: nn.Module) -> cv.Objective:
    """A small convolutional network with the given layers before its last, on images in batches of 5."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), *layers, nn.Linear(12, 3)).double()
    x, y = torch.randn(12, 1, 4, 4).double(), torch.randint(0, 3, (12,))
    return cv.Objective.of(net, "cross-entropy", (x, y), batch_size=5)


def curve(module: nn.Module) -> cv.Objective:
    x = torch.linspace(-1, 1, 12).double().unsqueeze(1)
    return cv.Objective.of(module.double(), "mse", (x, x.sin()), batch_size=5)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_the_loss_of_batches_made_one_is_theirs(case):
    objective = case.objective((3, 1, len(case.inputs) - 4))
    rows = around(objective, 5)
    assert batches_of(objective) == 1
    with untouched(objective.function.module):
        found = Points(objective)(rows)
    torch.testing.assert_close(found[:, 0], there(objective, rows), rtol=1e-10, atol=1e-12)


def test_batches_are_made_one_up_to_a_size(monkeypatch):
    objective = CASES["classifier"].objective((2, 2, 2, 2, 1))  # whose largest tensor has 20 numbers of 8 bytes
    monkeypatch.setitem(together.SMALL, "cpu", 2 * 160 // together.TOGETHER)
    assert [len(y) for _, y in resized(objective, program(objective)).batches] == [4, 4, 1]
    monkeypatch.setitem(together.SMALL, "cpu", 1)
    assert resized(objective, program(objective)) is objective


def test_batches_are_cut_down_to_a_size_where_their_examples_make_tensors_large(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3)).double()  # 10 numbers of 8 bytes an example
    objective = cv.Objective.of(net, "cross-entropy", (torch.randn(70, 4).double(), torch.randint(0, 3, (70,))))
    rows, whole = around(objective, 3), objective.batches
    monkeypatch.setitem(together.SMALL, "cpu", 20 * 80 // together.TOGETHER)
    assert [len(y) for _, y in resized(objective, program(objective)).batches] == [18, 18, 18, 16]
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)
    assert objective.batches is whole
    monkeypatch.setitem(together.SMALL, "cpu", 10 * 80 // together.TOGETHER)
    assert resized(objective, program(objective)) is objective  # batches of so few are not made


def test_batches_are_not_cut_because_of_large_weights(monkeypatch):
    torch.manual_seed(0)
    net = nn.Linear(300, 3).double()
    objective = cv.Objective.of(net, "cross-entropy", (torch.randn(40, 300).double(), torch.randint(0, 3, (40,))))
    monkeypatch.setitem(together.SMALL, "cpu", 2400 // together.TOGETHER)
    assert resized(objective, program(objective)) is objective


def test_what_couples_its_examples_keeps_its_batches():
    torch.manual_seed(0)
    x, y = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    net = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Tanh(), nn.Linear(5, 3)).double()
    objective = cv.Objective.of(net, "cross-entropy", list(zip(x.split(4), y.split(4), strict=True)))
    assert resized(objective, program(objective)) is objective
    rows = around(objective, 5)
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)


def test_what_sees_batches_in_training_keeps_them():
    normalisation = nn.BatchNorm1d(12)
    nn.init.zeros_(normalisation.weight).requires_grad_(False)  # which hides it: the value says nothing
    objective = images(normalisation)
    assert batches_of(objective) == 1
    objective = objective.in_mode("train")
    assert resized(objective, program(objective)) is objective


def test_batches_of_several_kinds_are_made_one_where_they_fit():
    module = CASES["tokens"].module
    torch.manual_seed(0)
    lengths = (5, 5, 3, 3, 3, 5)
    batches = [{"input": torch.randint(0, 7, (2, n)), "labels": torch.randint(0, 6, (2, n))} for n in lengths]
    batches[0]["labels"][:] = -100  # a batch without terms, which does not show how large tensors are
    objective = cv.Objective.of(module, cv.CrossEntropy(axis=-1), batches)
    assert resized(objective, program(objective)) is objective
    rows = around(objective, 5)
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)
    objective = cv.Objective.of(module, cv.CrossEntropy(axis=-1), batches[1:])
    assert batches_of(objective) == 3
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)


def test_what_is_no_tensor_of_examples_is_left_alone():
    net = nn.Linear(2, 1).double()
    batches = [(torch.randn(n, 2).double(), "a name") for n in (3, 2, 4)]
    objective = cv.Objective.from_loss(net, lambda m, batch: m(batch[0]).square().mean(), batches, terms=lambda b: 3)
    rows = around(objective, 5)
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)
    assert batches_of(objective) == 3


def test_arrays_and_loaders_are_read_as_they_are():
    case = CASES["classifier"]
    arrays = cv.Objective.of(case.module, "cross-entropy", (case.inputs.numpy(), case.targets.numpy()), batch_size=2)
    pairs = torch.utils.data.TensorDataset(case.inputs, case.targets)
    loader = torch.utils.data.DataLoader(pairs, batch_size=2, shuffle=True)
    whole = case.objective()
    rows = around(whole, 5)
    for objective in (arrays, cv.Objective.of(case.module, "cross-entropy", loader)):
        assert batches_of(objective) == 1
        torch.testing.assert_close(Points(objective)(rows)[:, 0], there(whole, rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["together", "one by one"])
def test_random_masks_are_those_of_the_objective_at_every_point(kind):
    if kind == "together":
        case = CASES["classifier"]
        net = nn.Sequential(case.module, nn.Dropout(0.5))
        objective = cv.Objective.of(net, "cross-entropy", (case.inputs, case.targets), batch_size=4, mode="train")
    else:
        objective = images(nn.Dropout(0.5)).in_mode("train")
    rows, points = around(objective, 7), Points(objective)
    first, again = points(rows)[:, 0], points(rows)[:, 0]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, there(objective, rows), rtol=1e-12, atol=0)


def test_points_of_small_networks_go_together():
    case = CASES["classifier"]
    objective = case.objective((4, 5))
    points, rows = Points(objective), around(objective, 64)
    points(rows)
    calls = counted(objective.function.module)
    points(rows)
    assert len(calls) == 1


def test_parts_are_even_and_small_enough(monkeypatch):
    objective = CASES["classifier"].objective()  # 9 examples of 5 numbers of 8 bytes at most
    monkeypatch.setitem(together.SMALL, "cpu", 6 * 360 // together.TOGETHER)
    calls, rows = counted(objective.function.module), around(objective, 7)
    points = Points(objective)
    points(rows)
    calls.clear()
    torch.testing.assert_close(points(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)
    assert len(calls) == 2 + len(rows)  # those of the values one by one, too


def normed() -> cv.Objective:
    return images(nn.BatchNorm1d(12))


@pytest.mark.parametrize("make", [lambda: curve(Slope()), images, normed], ids=["derivative inside", "conv", "normed"])
def test_operations_that_were_traced_make_the_same_bits(make, monkeypatch):
    monkeypatch.setattr(together, "PATIENCE", 4)
    objective = make()
    calls, rows, points = counted(objective.function.module), around(objective, 6), Points(objective)
    first = points(rows)
    calls.clear()
    assert torch.equal(points(rows), first) and not calls
    torch.testing.assert_close(first[:, 0], there(objective, rows), rtol=1e-10, atol=0)


@pytest.mark.parametrize("make", [lambda: curve(Reading(Slope())), lambda: images(Reading(nn.Linear(12, 12)))])
def test_what_reads_its_weights_is_not_taken_for_constant(make, monkeypatch):
    monkeypatch.setattr(together, "PATIENCE", 4)
    objective = make()
    rows = around(objective, 12, size=1.0)
    name = next(name for name in objective.space.names if "inner" in name)
    signs = {bool(objective.space.named(row)[name].sum() > 0) for row in rows}
    assert signs == {True, False}
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-10, atol=0)


def test_what_vmap_gets_wrong_goes_one_by_one(monkeypatch):
    objective = CASES["classifier"].objective()
    wrong = Mock(side_effect=lambda program, rows, *_, **__: 1.01 * torch.vmap(program)(rows))
    monkeypatch.setattr(together, "vmapped", wrong)
    rows = around(objective, 5)
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-12, atol=0)
    assert wrong.called


@pytest.mark.parametrize("norm", ["frozen", "recalibrated", "batch"])
def test_a_run_that_goes_on_has_the_same_bits_before_and_after_tracing(norm, monkeypatch, tmp_path):
    monkeypatch.setattr(together, "PATIENCE", 25)
    monkeypatch.setattr(probed, "AT_ONCE", 16)
    objective, path = normed(), tmp_path / "line.ckpt"
    look = partial(cv.line, objective, cv.random_directions(objective, 1)[0], points=31, norm=norm)
    whole = look()
    with pytest.raises(cv.Interrupted):
        look(run=cv.Run(progress=Stopping(1), checkpoint=path))
    assert torch.equal(look(run=cv.Run(checkpoint=path)).loss, whole.loss)


class Last(nn.Module):
    """What a recurrent layer says at the end."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layer, self.head = layer(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("error")
def test_recurrent_layers_have_their_loss_without_warnings(layer):
    """In single precision torch has a kernel for LSTM layers that vmap runs in a loop of its own."""
    torch.manual_seed(0)
    objective = cv.Objective.of(Last(layer), "cross-entropy", (torch.randn(12, 5, 3), torch.randint(0, 2, (12,))))
    rows = around(objective, 5)
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-5, atol=0)
    with together.Sizes() as sizes:
        objective.value()
    assert sizes.slow == (layer is nn.LSTM)


def test_a_penalty_leaves_the_bits_of_the_value():
    case = CASES["classifier"]
    objective = cv.Objective.of(case.module, "cross-entropy", (case.inputs, case.targets), l2=0.3)
    assert float(Points(objective).alone(objective.position)) == objective.value()


def test_operations_are_shared_by_batches_of_the_same_shapes(monkeypatch):
    monkeypatch.setattr(together, "PATIENCE", 1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(12, 1, 4, 4).double(), torch.randint(0, 3, (12,))
    objective = cv.Objective.of(net, "cross-entropy", [(x[i : i + 5], y[i : i + 5]) for i in (0, 5, 7)] * 2)
    monkeypatch.setitem(together.SMALL, "cpu", 1)
    each = Together(objective, program(objective))
    rows = around(objective, 3)
    sums, terms = each(rows)
    torch.testing.assert_close(sums[:, 0] / terms, there(objective, rows), rtol=1e-12, atol=0)
    assert len(each.single.bare.known) == 1 and None not in each.single.bare.known.values()


def test_what_goes_by_the_numbers_of_a_batch_is_not_taken_from_another(monkeypatch):
    monkeypatch.setattr(together, "PATIENCE", 1)
    monkeypatch.setitem(together.SMALL, "cpu", 1)
    net = nn.Linear(2, 1).double()
    torch.manual_seed(0)
    batches = [torch.randn(6, 2).double() for _ in range(4)]
    assert len({int((batch[:, 0] > 0).sum()) for batch in batches}) > 1

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        kept = model(batch)[batch[:, 0] > 0]
        return kept.square().sum() / len(kept)

    objective = cv.Objective.from_loss(net, loss, batches)
    rows = around(objective, 3)
    each = Together(objective, program(objective))
    sums, terms = each(rows)
    torch.testing.assert_close(sums[:, 0] / terms, there(objective, rows), rtol=1e-12, atol=0)
    assert set(each.single.bare.known.values()) == {None}


def test_layer_norms_whose_derivative_is_taken_have_the_right_one():
    """In torch, forward over reverse derivatives of this layer are wrong when they are batched."""
    torch.manual_seed(0)
    slope = Slope()
    slope.net = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    objective = curve(slope)
    rows = around(objective, 6)
    torch.testing.assert_close(Points(objective)(rows)[:, 0], there(objective, rows), rtol=1e-10, atol=0)


def test_accuracies_and_other_data_in_single_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(300, 4), torch.randint(0, 3, (300,))
    objective = cv.Objective.of(net, "cross-entropy", (x[:200], y[:200]), batch_size=7, l2=0.1)
    rows = around(objective, 20)
    found = Points(objective, accuracy=True, held_out=(x[200:], y[200:]))(rows)
    for row, values in zip(rows.double(), found, strict=True):
        for data, (loss, accuracy) in ((slice(200), values[:2]), (slice(200, 300), values[2:])):
            outputs = torch.func.functional_call(net.double(), objective.space.named(row), (x[data].double(),))
            expected = float(F.cross_entropy(outputs, y[data]).detach() + 0.05 * row.square().sum())
            assert float(loss) == pytest.approx(expected, rel=1e-5)
            assert float(accuracy) == pytest.approx(float((outputs.argmax(1) == y[data]).double().mean()), abs=1e-7)


def test_what_is_not_finite_is_kept_where_batches_are_made_one():
    net = nn.Linear(1, 1, bias=False).double()
    batches = [torch.ones(2, 1).double(), -torch.ones(2, 1).double()]
    objective = cv.Objective.from_loss(net, lambda m, x: (m(x) * 1e3).exp().mean(), batches)
    found = Points(objective)(torch.tensor([[0.0], [1.0]]).double())[:, 0]
    assert float(found[0]) == 1.0 and torch.isinf(found[1])


def test_errors_of_the_model_say_where():
    def fails(model: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("no such shape")

    objective = cv.Objective.from_loss(nn.Linear(1, 1), fails, torch.ones(3, 1))
    with pytest.raises(cv.BadObjective, match="no such shape"):
        Points(objective)(around(objective, 2))
