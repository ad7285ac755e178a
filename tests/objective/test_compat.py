"""Every stand-in against torch's own function (value, gradient) and against differences of gradients (product)."""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from untouched import untouched

from curvature.objective import compat
from curvature.objective.call import call_with
from curvature.objective.compat import twice_differentiable
from curvature.objective.guard import frozen_randomness

Tensors = list[Tensor]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Case:
    """A function of tensors, and what is rewritten in it."""

    name: str
    make: Callable[[], tuple[Callable[..., Tensor], Tensors]]
    rewritten: dict[str, int]
    exact: float = 1e-11  # how closely torch computes its own gradient

    def __str__(self) -> str:
        return self.name


def of(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable:
    """The function at random tensors of these shapes."""
    return lambda: (function, [torch.randn(shape) for shape in shapes])


def layer(make: Callable[[], nn.Module], *inputs: tuple[int, ...] | Tensor) -> Callable:
    """A module as a function of its parameters and of those inputs that are given as shapes."""

    def made() -> tuple[Callable[..., Tensor], Tensors]:
        module = make()
        names = [name for name, _ in module.named_parameters()]
        args = [torch.randn(i) if isinstance(i, tuple) else i for i in inputs]

        def function(*tensors: Tensor) -> Tensor:
            free = iter(tensors[len(names) :])
            given = [next(free) if isinstance(i, tuple) else i for i in inputs]
            buffers = {name: b.clone() for name, b in module.named_buffers()}
            out = call_with(module, dict(zip(names, tensors, strict=False)) | buffers, tuple(given))
            return out[0] if isinstance(out, tuple) else out

        parameters = [p.detach() for p in module.parameters()]
        return function, parameters + [a for a, i in zip(args, inputs, strict=True) if isinstance(i, tuple)]

    return made


ids = torch.tensor([[1, 2, 2, 9], [0, 3, 4, 2], [2, 2, 2, 2]])
flat, offsets = ids.reshape(-1), torch.tensor([0, 3, 3, 12])  # the second bag is empty


def bag(**options) -> Callable[[Tensor], Tensor]:
    return lambda weight: F.embedding_bag(flat, weight, offsets, **options)


def self_attention(need_weights: bool) -> nn.Module:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    return SelfAttention()


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a model does that insists on its kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inplace(x: Tensor) -> Tensor:
    y = x * 2
    F.hardsigmoid(y, inplace=True)
    return y


heads = (1, 2, 5, 4)
encoder = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
old_weight_norm, new_weight_norm = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm
one = {"weight_norm": 1}

REWRITES = [
    Case("batch_norm, evaluation", layer(lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 2)), {"batch_norm": 1}),
    Case("batch_norm, no affine", layer(lambda: nn.BatchNorm1d(3, affine=False).eval(), (4, 3)), {"batch_norm": 1}),
    Case("batch_norm, training", layer(lambda: nn.BatchNorm1d(3).train(), (4, 3)), {}),
    Case("weight_norm, old", layer(lambda: old_weight_norm(nn.Linear(3, 4)), (5, 3)), one),
    Case("weight_norm, new", layer(lambda: new_weight_norm(nn.Linear(3, 4)), (5, 3)), one),
    Case("weight_norm, dim=None", layer(lambda: new_weight_norm(nn.Linear(3, 4), dim=None), (5, 3)), one),
    Case("weight_norm, convolution", layer(lambda: new_weight_norm(nn.Conv2d(2, 3, 3)), (2, 2, 4, 4)), one),
    Case("weight_norm, dim=1", layer(lambda: new_weight_norm(nn.Conv1d(2, 3, 3), dim=1), (2, 2, 4)), one),
    # In float64 too, torch multiplies the gradient of hardsigmoid by 1/6 in float32.
    Case("hardsigmoid", of(lambda x: F.hardsigmoid(3 * x), (5, 4)), {"hardsigmoid": 1}, exact=4e-8),
    Case("hardsigmoid in place", of(inplace, (5, 4)), {"hardsigmoid": 1}, exact=4e-8),
    Case("embedding, sparse", layer(lambda: nn.Embedding(10, 3, sparse=True), ids), {"embedding": 1}),
    Case("embedding, max_norm", layer(lambda: nn.Embedding(10, 3, max_norm=9.0), ids), {"embedding": 1}),
    *(
        Case(f"embedding_bag, {mode}, {options}", of(bag(mode=mode, **options), (10, 3)), {"embedding_bag": 1})
        for mode in ("sum", "mean", "max")
        for options in (
            {},
            {"padding_idx": 2},
            {"padding_idx": -8},
            {"include_last_offset": True},
            {"max_norm": 9.0},
            *([] if mode == "max" else [{"sparse": True}]),
        )
    ),
    Case("embedding_bag, rows", layer(lambda: nn.EmbeddingBag(10, 3, mode="max"), ids), {"embedding_bag": 1}),
    Case(
        "embedding_bag, per_sample_weights",
        of(lambda w, s: F.embedding_bag(ids, w, mode="sum", per_sample_weights=s), (10, 3), (3, 4)),
        {"embedding_bag": 1},
    ),
    *(
        Case(f"cdist, p={p}", of(lambda x, y, p=p: torch.cdist(x, y, p=p), (2, 4, 3), (5, 3)), {"cdist": 1})
        for p in (0.5, 1.0, 1.5, 2.0, 3.0, float("inf"))
    ),
    *(
        Case(f"cdist, {mode}", of(lambda x, y, m=mode: torch.cdist(x, y, 2.0, m), (n, 3), (5, 3)), {"cdist": 1})
        for mode, n in [
            ("use_mm_for_euclid_dist", 4),
            ("use_mm_for_euclid_dist_if_necessary", 30),
            ("donot_use_mm_for_euclid_dist", 30),
        ]
    ),
    *(Case(f"pdist, p={p}", of(lambda x, p=p: F.pdist(x, p), (5, 3)), {"pdist": 1}) for p in (1.0, 2.0, 3.0)),
    Case("attention", of(F.scaled_dot_product_attention, heads, heads, heads), {"attention": 1}),
    Case("attention, another kernel asked for", of(fused, heads, heads, heads), {"attention": 1}),
    Case("multi-head attention", layer(lambda: self_attention(False), (2, 5, 8)), {"attention": 1}),
    Case("multi-head attention, eval", layer(lambda: self_attention(False).eval(), (2, 5, 8)), {"attention": 1}),
    Case("encoder", layer(lambda: nn.TransformerEncoderLayer(**encoder), (2, 5, 8)), {"attention": 1}),
    Case(
        "encoder, eval",
        layer(lambda: nn.TransformerEncoderLayer(**encoder).eval(), (2, 5, 8)),
        {"attention": 1},
    ),
    Case(
        "decoder",
        layer(lambda: nn.TransformerDecoderLayer(**encoder), (2, 5, 8), (2, 3, 8)),
        {"attention": 2},
    ),
]

AS_IS = [
    Case("multi-head attention with weights", layer(lambda: self_attention(True), (2, 5, 8)), {}),
    Case("embedding", layer(lambda: nn.Embedding(10, 3), ids), {}),
    *(
        Case(name, layer(lambda make=make: make(3, 4, num_layers=2, bidirectional=True), (5, 2, 3)), {})
        for name, make in [("LSTM", nn.LSTM), ("GRU", nn.GRU), ("RNN", nn.RNN)]
    ),
    Case("BatchNorm", layer(lambda: nn.BatchNorm1d(4), (5, 4)), {}),
    Case(
        "spectral_norm, eval",
        layer(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).eval(), (5, 3)),
        {},
    ),
]


def loss_of(function: Callable[..., Tensor], tensors: Tensors) -> Tensor:
    """A scalar that couples all outputs and has curvature even where the function has none."""
    out = function(*tensors)
    return (out.sin() * torch.linspace(0.3, 1.7, out.numel()).view(out.shape)).sum() + out.mean() ** 3


def gradient_of(function: Callable[..., Tensor], tensors: Tensors, context=twice_differentiable) -> Tensors:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with context():
        loss = loss_of(function, leaves)
    return [g.to_dense() for g in torch.autograd.grad(loss, leaves)]


def product_of(function: Callable[..., Tensor], tensors: Tensors, *vectors: Tensors) -> list[Tensors]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with twice_differentiable():
        loss = loss_of(function, leaves)
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    return [list(torch.autograd.grad(gradient, leaves, v, retain_graph=True, materialize_grads=True)) for v in vectors]


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).detach()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", REWRITES + AS_IS, ids=str)
class TestFunction:
    def test_has_the_value_and_gradient_that_torch_gives(self, case):
        function, tensors = case.make()
        with twice_differentiable() as rewritten:
            value = function(*tensors)
        assert rewritten == Counter(case.rewritten)
        torch.testing.assert_close(value, function(*[t.clone() for t in tensors]), rtol=1e-12, atol=1e-14)
        ours, stock = gradient_of(function, tensors), gradient_of(function, tensors, nullcontext)
        torch.testing.assert_close(ours, stock, rtol=case.exact, atol=1e-13)

    def test_has_products_that_are_differences_of_gradients_and_symmetric(self, case):
        function, tensors = case.make()
        u, v = ([torch.randn_like(t) for t in tensors] for _ in range(2))
        hu, hv = (joined(product) for product in product_of(function, tensors, u, v))
        step = 1e-6
        ahead, behind = (
            gradient_of(function, [t + s * d for t, d in zip(tensors, v, strict=True)]) for s in (step, -step)
        )
        difference = (joined(ahead) - joined(behind)) / (2 * step)
        assert (hv - difference).norm() < 1e-7 * difference.norm()
        assert abs(joined(u) @ hv - joined(v) @ hu) < 1e-12 * joined(u).norm() * hv.norm()

    def test_leaves_its_arguments_alone(self, case):
        function, tensors = case.make()
        copies = [t.clone() for t in tensors]
        with twice_differentiable():
            function(*tensors)
        assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's forward mode imports it
@pytest.mark.parametrize(
    "case", [c for c in REWRITES if c.name.startswith(("embedding_bag", "cdist", "pdist"))], ids=str
)
def test_stand_ins_agree_under_forward_mode_and_vmap(case):
    function, tensors = case.make()
    vectors = [[torch.randn_like(t) for t in tensors] for _ in range(3)]
    expected = product_of(function, tensors, *vectors)

    def product(*vector: Tensor) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(lambda *ts: loss_of(function, ts), argnums=tuple(range(len(tensors))))
        return torch.func.jvp(gradient, tuple(tensors), vector)[1]

    with twice_differentiable():
        rows = torch.func.vmap(product)(*(torch.stack(vs) for vs in zip(*vectors, strict=True)))
    for row, products in zip(zip(*rows, strict=True), expected, strict=True):
        torch.testing.assert_close(list(row), products, rtol=1e-10, atol=1e-12)


def test_weight_norm_has_the_explicit_hessian():
    v, g, x = torch.randn(3, 2), torch.randn(3, 1), torch.randn(4, 2)

    def loss(v: Tensor, g: Tensor) -> Tensor:
        with twice_differentiable():
            return (x @ torch._weight_norm(v, g, 0).T).sin().sum()

    def written_out(v: Tensor, g: Tensor) -> Tensor:
        return (x @ (v * g / v.square().sum(1, keepdim=True).sqrt()).T).sin().sum()

    blocks, expected = (torch.autograd.functional.hessian(f, (v, g)) for f in (loss, written_out))
    torch.testing.assert_close(blocks, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, float("inf")])
def test_distance_zero_has_the_gradient_zero_and_finite_products(p):
    x = torch.randn(4, 3)
    y = torch.cat([x[:2], torch.randn(2, 3)])

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist")

    torch.testing.assert_close(gradient_of(function, [x, y]), gradient_of(function, [x, y], nullcontext))
    (product,) = product_of(function, [x, y], [torch.randn_like(x), torch.randn_like(y)])
    assert joined(product).isfinite().all()


@pytest.mark.parametrize("width", [3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_of_a_set_to_itself_have_no_noise_on_the_diagonal(width, dtype):
    x, v = torch.randn(40, width), torch.randn(40, width)
    (exact,) = product_of(lambda x: torch.cdist(x, x, 2.0, "donot_use_mm_for_euclid_dist"), [x], [v])
    (ours,) = product_of(lambda x: torch.cdist(x, x), [x.to(dtype)], [v.to(dtype)])
    tolerance = 20 * torch.finfo(dtype).eps  # torch's own matrix form is off by 6e-6 in float32, 2e-10 in float64
    assert (joined(ours) - joined(exact)).norm() < tolerance * joined(exact).norm()


def test_equals_in_a_bag_give_the_gradient_to_the_first_as_torch_does():
    weight = torch.ones(10, 3)
    function = bag(mode="max")
    torch.testing.assert_close(gradient_of(function, [weight]), gradient_of(function, [weight], nullcontext))


def test_the_padding_row_of_a_sparse_embedding_has_no_gradient():
    weight = torch.randn(10, 3)
    ours, stock = (
        gradient_of(lambda w, sparse=sparse: F.embedding(ids, w, padding_idx=2, sparse=sparse), [weight])
        for sparse in (True, False)
    )
    assert not ours[0][2].any()
    torch.testing.assert_close(ours, stock)


def test_embeddings_scaled_by_frequency_have_the_gradient_of_the_loss():
    weight = torch.randn(10, 3)

    def scaled(weight: Tensor) -> Tensor:
        return F.embedding(ids, weight, scale_grad_by_freq=True)

    ours, true = gradient_of(scaled, [weight]), gradient_of(lambda w: F.embedding(ids, w), [weight])
    torch.testing.assert_close(ours, true)


def test_embedding_rows_beyond_max_norm_are_scaled_down_but_not_in_the_weight():
    weight = torch.randn(10, 3, requires_grad=True)
    copy = weight.detach().clone().requires_grad_()
    expected = F.embedding(ids, copy, max_norm=0.5)
    with twice_differentiable():
        rows = F.embedding(ids, weight, max_norm=0.5)
    torch.testing.assert_close(rows, expected)
    assert not torch.equal(weight, copy)
    torch.testing.assert_close(
        *(torch.autograd.grad(r.sin().sum(), w)[0] for r, w in ((rows, weight), (expected, copy)))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda w: F.embedding_bag(ids, w, offsets),
            ValueError,
            "if input is 2D, then offsets has to be None",
        ),
        (lambda w: F.embedding_bag(flat, w), ValueError, "offsets has to be a 1D Tensor but got None"),
        (lambda w: F.embedding_bag(ids, w, mode="min"), ValueError, "mode has to be one of sum, mean or max"),
        (
            lambda w: F.embedding_bag(ids, w, mode="mean", per_sample_weights=torch.ones(3, 4)),
            NotImplementedError,
            "per_sample_weights is only supported for mode='sum'",
        ),
        (
            lambda w: torch.cdist(w, w, compute_mode="fast"),
            ValueError,
            "fast is not a valid value for compute_mode",
        ),
    ],
)
def test_what_torch_refuses_it_refuses_in_its_own_words(call, error, message):
    with twice_differentiable() as rewritten, pytest.raises(error, match=message):
        call(torch.randn(10, 3))
    assert not rewritten


def test_attention_mended_in_a_padded_encoder_in_eval_mode():
    layers = nn.TransformerEncoderLayer(**encoder)
    module = nn.TransformerEncoder(layers, 2, enable_nested_tensor=True).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    with twice_differentiable(module) as rewritten:
        out = call_with(module, params, (x,), {"src_key_padding_mask": padding})
    assert rewritten == {"attention": 2}
    gradient = torch.autograd.grad(out[~padding].sin().sum(), list(params.values()), create_graph=True)
    product = torch.autograd.grad(gradient, list(params.values()), [torch.ones_like(g) for g in gradient])
    assert joined(list(product)).isfinite().all()
    torch.testing.assert_close(out[~padding], module(x, src_key_padding_mask=padding)[~padding])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_attention_is_mended_inside_torchscript_too():
    tensors, vector = ([torch.randn(heads) for _ in range(3)] for _ in range(2))
    q, k, v = tensors
    function = torch.jit.trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (q, k, v))
    ours, expected = (product_of(f, tensors, vector) for f in (function, F.scaled_dot_product_attention))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_dropout_repeats_inside_attention_with_the_same_seed(drop):
    def function(q: Tensor) -> Tensor:
        with frozen_randomness(5):
            return F.dropout(F.scaled_dot_product_attention(q, q, q, dropout_p=drop), drop)

    x, v = torch.randn(heads), torch.randn(heads)
    ((product,),) = product_of(function, [x], [v])
    (ahead,), (behind,) = (gradient_of(function, [x + s * v]) for s in (1e-6, -1e-6))
    torch.testing.assert_close(product, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_need_nothing_on_the_cpu_in_float32(kind):
    """oneDNN has an LSTM of its own for float32."""
    module = kind(3, 8, num_layers=2, batch_first=True).double()
    x = torch.randn(5, 4, 3)
    products = []
    for dtype in (torch.float32, torch.float64):
        params = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
        with twice_differentiable(module) as rewritten:
            loss = call_with(module, params, (x.to(dtype),))[0].square().sum()
        gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        product = torch.autograd.grad(gradient, list(params.values()), [torch.ones_like(g) for g in gradient])
        products.append(joined(list(product)).double())
    assert not rewritten
    assert (products[0] - products[1]).norm() < 1e-6 * products[1].norm()


def test_recurrent_layers_run_without_cudnn_on_cuda_and_only_while_called():
    on_cuda = SimpleNamespace(is_cuda=True)
    before = torch._C._get_cudnn_enabled()
    assert compat._rnn(lambda _: torch._C._get_cudnn_enabled(), on_cuda) is False
    with pytest.raises(ZeroDivisionError):
        compat._rnn(lambda _: 1 / 0, on_cuda)
    assert torch._C._get_cudnn_enabled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_the_products_of_the_cpu_on_cuda(kind):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module, x = kind(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    products = []
    for device in ("cpu", "cuda"):
        params = {name: p.detach().to(device).requires_grad_() for name, p in module.named_parameters()}
        with twice_differentiable(module) as rewritten:
            loss = call_with(module, params, (x.to(device),))[0].sin().sum()
        gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        product = torch.autograd.grad(gradient, list(params.values()), [torch.ones_like(g) for g in gradient])
        products.append(joined([p.cpu() for p in product]))
    assert rewritten == {"rnn": 1}
    torch.testing.assert_close(products[1], products[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("function", [F.scaled_dot_product_attention, torch._weight_norm], ids=["attention", "norm"])
def test_checkpointed_code_is_called_once_and_mended(function, use_reentrant):
    def checkpointed(*tensors: Tensor) -> Tensor:
        return checkpoint(function, *tensors, use_reentrant=use_reentrant)

    shapes = [heads] * 3 if function is F.scaled_dot_product_attention else [(3, 3), (3, 1)]
    tensors, vector = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    expected = product_of(function, tensors, vector)
    torch.testing.assert_close(product_of(checkpointed, tensors, vector), expected)
    with twice_differentiable() as rewritten:
        checkpointed(*tensors)
    assert rewritten["checkpoint"] == 1


def test_checkpointing_is_as_before_outside():
    before = torch.utils.checkpoint.CheckpointFunction
    with pytest.raises(ZeroDivisionError), twice_differentiable():
        checkpoint(lambda x: x / 0 if x.sum() else 1 / 0, torch.zeros(2), use_reentrant=False)
    assert torch.utils.checkpoint.CheckpointFunction is before
    with pytest.raises(RuntimeError, match="incompatible with"):
        x = torch.ones(2, requires_grad=True)
        torch.autograd.grad(checkpoint(torch.sin, x, use_reentrant=True).sum(), x)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_as_before_when_the_body_raises(error):
    module = nn.MultiheadAttention(4, 2)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # a setting of the user's
    try:
        with untouched(module), pytest.raises(error), twice_differentiable(module):
            assert not torch.backends.cuda.flash_sdp_enabled()
            raise error
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)


def test_contexts_nest():
    x = torch.randn(heads)
    with untouched(nn.Identity()), twice_differentiable() as outer:
        with twice_differentiable() as inner:
            F.scaled_dot_product_attention(x, x, x)
        F.scaled_dot_product_attention(x, x, x)
    assert inner == {"attention": 1}
    assert outer["attention"] >= 1


def compile_in_place(module: nn.Module) -> nn.Module:
    module[1].compile(backend="aot_eager")
    return module


def compile_a_part(module: nn.Module) -> nn.Module:
    module[1] = torch.compile(module[1], backend="aot_eager")
    return module


@pytest.mark.parametrize("compiled", [compile_in_place, compile_a_part])
def test_compiled_parts_run_eagerly(compiled):
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    tensors, x = [p.detach() for p in plain.parameters()], torch.randn(5, 3)
    vector = [torch.randn_like(t) for t in tensors]
    products = []
    for module in (plain, compiled(nn.Sequential(*plain))):
        leaves = [t.clone().requires_grad_() for t in tensors]
        params = dict(zip([name for name, _ in module.named_parameters()], leaves, strict=True))
        with untouched(module), twice_differentiable(module):
            loss = call_with(module, params, (x,)).sin().sum()
        gradient = torch.autograd.grad(loss, leaves, create_graph=True)
        products.append(torch.autograd.grad(gradient, leaves, vector))
    torch.testing.assert_close(*products)


def test_compiled_functions_run_eagerly_unless_a_module_without_any_is_named():
    function = torch.compile(lambda x: x.sin(), backend="aot_eager")
    (product,) = product_of(function, [torch.ones(3)], [torch.ones(3)])
    assert joined(product).isfinite().all()
    with twice_differentiable(nn.Linear(3, 3)):
        assert sys.modules["torch._dynamo.eval_frame"]._stance.stance == "default"


def test_the_compiler_is_not_imported():
    code = (
        "import sys, torch\n"
        "from curvature.objective.compat import twice_differentiable\n"
        "module = torch.nn.MultiheadAttention(4, 2)\n"
        "with twice_differentiable(module), twice_differentiable():\n"
        "    module(*[torch.ones(3, 4)] * 3)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_entering_costs_microseconds():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def enter() -> None:
        with twice_differentiable(module):
            pass

    assert min(timeit.repeat(enter, number=100, repeat=10)) / 100 < 200e-6  # measured: 13e-6, 17e-6 with dynamo


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama"])
def test_hugging_face_models_with_fused_attention_have_products(name):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "Bert": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
        },
        "GPT2": {"n_embd": 16, "n_head": 2, "n_layer": 2},
        "Llama": {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
        }
        | {"intermediate_size": 32},
    }[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=50, attn_implementation="sdpa", **sizes)
    module = getattr(transformers, f"{name}Model")(config).double().eval()
    tokens = torch.randint(50, (2, 7))
    params = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    with untouched(module), twice_differentiable(module) as rewritten:
        out = call_with(module, params, (), {"input_ids": tokens}).last_hidden_state
    assert rewritten["attention"] == 2
    used = {"allow_unused": True, "materialize_grads": True}
    gradient = torch.autograd.grad(out.sin().sum(), list(params.values()), create_graph=True, **used)
    u, v = ([torch.randn_like(p) for p in params.values()] for _ in range(2))
    hu, hv = (
        joined(list(torch.autograd.grad(gradient, list(params.values()), w, retain_graph=True, **used))) for w in (u, v)
    )
    asymmetry = abs(joined(u) @ hv - joined(v) @ hu)
    assert asymmetry < 1e-8 * joined(u).norm() * hv.norm()  # Llama's norms and angles are float32 in any dtype
