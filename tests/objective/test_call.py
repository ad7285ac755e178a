from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untouched import untouched

from curvature.objective.call import call_with
from curvature.objective.compat import twice_differentiable

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",  # torch 2.13: use torch.export
    "ignore::torch.jit.TracerWarning",
)


class Recurrent(nn.Module):
    """Parameters that are also in a list (LSTM), tied ones, buffers updated in place, state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.calls = 0
        self.last = torch.zeros(1)
        self.seen = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.lstm(x)[0][:, -1])
        out = self.second(torch.tanh(self.first(hidden))) + self.calls
        self.calls += 1
        self.last = out.detach()
        self.seen.append(out.detach())
        return out


class Plain(nn.Module):
    """The same function, written without state: what the other should compute at every call."""

    def __init__(self, module: Recurrent) -> None:
        super().__init__()
        self.lstm, self.norm, self.first, self.second = module.lstm, module.norm, module.first, module.second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.norm(self.lstm(x)[0][:, -1]))))


def tensors_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Other values than the module's for its parameters, and copies of its buffers."""
    generator = torch.Generator().manual_seed(1)
    params = {
        name: (p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).requires_grad_()
        for name, p in module.named_parameters()
    }
    return params, {name: b.clone() for name, b in module.named_buffers()}


def derivatives(module: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor], *args) -> list[Tensor]:
    """Value, gradient and one Hessian product of a scalar function of what the module returns."""
    value = call_with(module, {**params, **buffers}, args).sin().sum()
    gradient = torch.autograd.grad(value, list(params.values()), create_graph=True)
    vector = [torch.ones_like(g) for g in gradient]
    return [value, *gradient, *torch.autograd.grad(gradient, list(params.values()), vector)]


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module)


def loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(Plain(module), (torch.ones(5, 2, 3),), check_trace=False)


class Around(nn.Module):
    """A module as part of another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.fixture
def double():
    """Modules built in float64, where two ways to the same number agree to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", [scripted, loaded, traced])
@pytest.mark.parametrize("around", [False, True])
def test_torchscript_has_the_derivatives_of_the_module_it_came_from(kind, around):
    module = Recurrent()
    other, x = kind(module), torch.randn(5, 2, 3)
    params, buffers = tensors_of(Plain(module))
    expected = derivatives(Plain(module), params, buffers, x)
    if around:
        other = Around(other)
        params = {f"inner.{name}": p for name, p in params.items()}
    for _ in range(4):  # TorchScript profiles the first calls and then replaces its graph
        copies = {f"inner.{name}" if around else name: b.clone() for name, b in buffers.items()}
        with untouched(other):
            torch.testing.assert_close(derivatives(other, params, copies, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [scripted, loaded])
def test_state_that_torchscript_keeps_between_calls_is_put_back(kind):
    module = kind(Recurrent())
    seen, last = module._c.getattr("seen"), module._c.getattr("last")
    call_with(module, {}, (torch.randn(5, 2, 3),))
    assert module._c.getattr("calls") == 0
    assert module._c.getattr("last") is last
    assert len(module._c.getattr("seen")) == 1
    assert module._c.getattr("seen")[0] is seen[0]


def test_torchscript_is_restored_when_the_call_raises():
    module, x = scripted(Recurrent()), torch.randn(5, 2, 9)
    params, buffers = tensors_of(module)
    with (
        untouched(module),
        pytest.raises(torch.jit.Error, match=r"input.size\(-1\) must be equal to input_size"),
    ):
        call_with(module, {**params, **buffers}, (x,))


def test_unknown_names_are_refused_for_torchscript():
    with pytest.raises(KeyError, match="The TorchScript module has no parameter or buffer named 'nonsense'"):
        call_with(scripted(Recurrent()), {"nonsense": torch.zeros(1)}, (torch.randn(5, 2, 3),))


@pytest.mark.parametrize("sample_rate", [16000, 8000])
def test_a_published_torchscript_model_can_be_differentiated_twice(sample_rate):
    silero = pytest.importorskip("silero_vad")
    module = torch.jit.load(Path(silero.__file__).parent / "data" / "silero_vad.jit")
    part = "_model.decoder" if sample_rate == 16000 else "_model_8k.decoder"
    params = {name: p for name, p in tensors_of(module)[0].items() if name.startswith(part)}
    x = torch.randn(4, 512 if sample_rate == 16000 else 256)

    def gradient(at: dict[str, Tensor]) -> list[Tensor]:
        score = call_with(module, at, (x, sample_rate)).logit().square().sum()
        return list(torch.autograd.grad(score, list(at.values()), create_graph=True))

    vector = {name: torch.randn_like(p) for name, p in params.items()}
    length = torch.cat([v.flatten() for v in vector.values()]).norm()

    def moved(step: float) -> dict[str, Tensor]:
        return {name: (p + step * vector[name] / length).detach().requires_grad_() for name, p in params.items()}

    with untouched(module):
        product = torch.autograd.grad(gradient(params), list(params.values()), [v / length for v in vector.values()])
        difference = [(a - b) / 2e-2 for a, b in zip(gradient(moved(1e-2)), gradient(moved(-1e-2)), strict=True)]
    flat, expected = (torch.cat([t.flatten() for t in ts]).detach() for ts in (product, difference))
    assert (flat - expected).norm() < 5e-3 * expected.norm()  # float32: the model casts its input


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_exported_programs_have_the_derivatives_of_the_module_they_came_from(tmp_path):
    module, x = Exportable(), torch.randint(10, (4, 5))
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "model.pt2")
    other = torch.export.load(tmp_path / "model.pt2").module()
    params, buffers = tensors_of(module)
    with twice_differentiable(module) as rewritten:
        expected = derivatives(module, params, {n: b.clone() for n, b in buffers.items()}, x)
    with untouched(other), twice_differentiable(other) as rewritten_too:
        actual = derivatives(other, params, buffers, x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    names = ("embedding", "weight_norm", "attention", "hardsigmoid", "pdist", "cdist", "embedding_bag")
    assert rewritten == rewritten_too == dict.fromkeys(names, 1)


class Exportable(nn.Module):
    """One of everything that compat rewrites, and a BatchNorm that updates its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, 8, sparse=True)
        self.bags = nn.EmbeddingBag(10, 8, mode="max")
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.normed(self.rows(ids))
        x = self.attention(x, x, x, need_weights=False)[0]
        F.hardsigmoid(x, inplace=True)
        x = x + F.pdist(self.rows.weight[:2]) + torch.cdist(x, self.rows.weight[:5]).sum(-1, keepdim=True)
        return self.batch_norm(x.mean(1) + self.bags(ids))


def test_a_batch_size_that_was_not_exported_is_refused_by_the_program():
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(5, 3),))
    with pytest.raises(AssertionError, match=r"Guard failed: \w+.size\(\)\[0\] == 5"):
        call_with(program.module(), {}, (torch.ones(4, 3),))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("training", [False, True])
def test_a_module_is_not_touched_by_calls_with_other_tensors(training):
    module, x = Plain(Recurrent()).train(training), torch.randn(5, 2, 3)
    module(x).sum().backward()
    params, buffers = tensors_of(module)
    before = {name: b.clone() for name, b in buffers.items()}
    with untouched(module):
        derivatives(module, params, buffers, x)
    assert any(not torch.equal(b, before[name]) for name, b in buffers.items()) == training


def test_recurrent_layers_do_not_keep_the_given_tensors():
    module = nn.LSTM(3, 4)
    own = list(module.parameters())
    call_with(module, tensors_of(module)[0], (torch.randn(5, 2, 3),))
    assert all(any(flat is p for p in own) for flat in module._flat_weights)


@pytest.mark.parametrize("make", [Plain, lambda module: scripted(module)])
def test_one_name_stands_for_all_tied_parameters(make):
    module = make(Recurrent())
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(5, 2, 3)
    one = call_with(module, {"first.weight": weight}, (x,))
    with torch.no_grad():
        dict(module.named_parameters())["first.weight"].copy_(weight)
    torch.testing.assert_close(one, module(x))


def test_keyword_arguments_and_partial_tensors_reach_the_module():
    module = nn.Bilinear(3, 4, 2)
    bias = torch.zeros(2)
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    expected = module(x, y) - module.bias
    torch.testing.assert_close(call_with(module, {"bias": bias}, (x,), {"input2": y}), expected)


def test_the_given_dictionary_is_not_written_to():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self) -> Tensor:
            self.count = self.count + 1
            return self.count

    module, count = Counting(), torch.zeros(1)
    tensors = {"count": count}
    with untouched(module):
        assert call_with(module, tensors) == 1
    assert tensors["count"] is count
    assert count == 0


class Collected(nn.Module):
    """Parameters that are also in a dictionary and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.named = {"weight": self.linear.weight}
        self.numbered = (self.linear.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.named["weight"] @ self.numbered[0]


def test_parameters_in_the_collections_of_torchscript_are_replaced_too():
    module, x, weight = scripted(Collected()), torch.randn(2, 3), torch.randn(3, 3)
    expected = (x @ weight.T + module.linear.bias) @ weight @ weight
    with untouched(module):
        torch.testing.assert_close(call_with(module, {"linear.weight": weight}, (x,)), expected)
    torch.testing.assert_close(module(x), module.linear(x) @ module.linear.weight @ module.linear.weight)


def test_calls_of_torchscript_warn_of_nothing():
    module, params = scripted(Recurrent()), {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_with(module, params, (torch.randn(5, 2, 3),))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_layer_under_two_names_keeps_its_parameters(name):
    module = Twice()
    before = dict(module.named_parameters())
    weight = torch.zeros(3, 3)
    output = call_with(module, {f"{name}.weight": weight}, (torch.randn(2, 3),))
    torch.testing.assert_close(output, module.first.bias.expand(2, 3))
    after = dict(module.named_parameters())
    assert all(after[name] is p and isinstance(p, nn.Parameter) for name, p in before.items())
