"""What the doctor says of models that are ill, repaired and healthy; and that it leaves them as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from untouched import untouched

import curvature as cv
from curvature.linalg import memory
from curvature.operators import vitals

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's forward mode imports it
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]


class Between(nn.Module):
    """A function or a module between two linear layers, on tensors of a given shape."""

    def __init__(self, middle: Callable, *shape: int, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.LazyLinear(3)
        if isinstance(middle, nn.Module):
            self.middle = middle
        self.function, self.shape = middle, shape or (width,)
        with torch.no_grad():
            self.eval()(torch.zeros(2, 4))  # the last layer learns its width

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.function(self.first(x).view(len(x), *self.shape))
        return self.last((hidden[0] if isinstance(hidden, tuple) else hidden).flatten(1))


def data(n: int = 12, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=generator), torch.arange(n) % 3


def classifier(module: nn.Module, **options) -> cv.Objective:
    return cv.Objective.of(module, "cross-entropy", data(), **options)


def between(middle: Callable, *shape: int, width: int = 8, **options) -> Callable[[], cv.Objective]:
    return lambda: classifier(Between(middle, *shape, width=width), **options)


def layer(make: Callable[[], nn.Module], *shape: int, width: int = 8, **options) -> Callable[[], cv.Objective]:
    return lambda: classifier(Between(make(), *shape, width=width), **options)


def bare(loss: Callable, **options) -> Callable[[], cv.Objective]:
    """A scalar loss of logits and targets."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return lambda: cv.Objective.from_loss(net, lambda model, batch: loss(model(batch[0]), batch[1]), data(), **options)


def bag(make: Callable[[], nn.Module]) -> Callable[[], cv.Objective]:
    """Three tokens in, classes out."""
    net = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    tokens, labels = torch.randint(0, 7, (12, 3)), torch.arange(12) % 3
    net(tokens)
    return lambda: cv.Objective.of(net, "cross-entropy", (tokens, labels))


def found(diagnosis: cv.Diagnosis) -> dict[str, cv.Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


# ------------------------------------------------------------------------------------------------- what is ill


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Detaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


class InNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(np.cos(ctx.saved_tensors[0].detach().numpy()) * g.detach().numpy())


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class ChangingItsOutput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid().add_(1)


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1e3 * x.abs() + 100).exp()


class Restless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.01 * self.generator.random())


def with_nan() -> cv.Objective:
    net = Between(nn.Tanh())
    net.last.weight.data[0, 1] = torch.nan
    return classifier(net)


def frozen() -> cv.Objective:
    return classifier(Between(nn.Tanh()).requires_grad_(False))


def scripted_weight_norm() -> cv.Objective:
    inner = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))
    return classifier(torch.jit.trace(inner, data()[0]))


def counted_twice() -> cv.Objective:
    shuffled = torch.utils.data.DataLoader(
        list(zip(*data(), strict=True)), batch_size=4, shuffle=True, generator=torch.Generator()
    )
    return cv.Objective.of(Between(nn.Tanh()), "cross-entropy", shuffled)


def attend(x: Tensor) -> Tensor:
    return flex_attention(x, x, x)


def of_spectral_norm(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], cv.Objective]:
    return layer(lambda: norm(nn.Linear(8, 8)), mode="train")


ILL: dict[str, tuple[Callable[[], cv.Objective], str, str, str]] = {  # objective, finding, what is seen, fix
    "once_differentiable": (layer(lambda: Custom(OnceDifferentiable)), "graph", r"OnceDifferentiable in middle \(Custom\)", "custom autograd Function"),
    "detaching backward": (layer(lambda: Custom(Detaching)), "difference", r"off the finite difference.*Detaching in middle \(Custom\)", "no detach()"),
    "NumPy backward": (layer(lambda: Custom(InNumPy)), "difference", r"InNumPy in middle \(Custom\)", "torch's operations"),
    "spectral_norm, training": (of_spectral_norm(nn.utils.parametrizations.spectral_norm), "difference", "middle.parametrizations.weight.0._u", "mode='eval'"),
    "old spectral_norm, training": (of_spectral_norm(nn.utils.spectral_norm), "difference", "middle.weight_u", "mode='eval'"),
    "ctc_loss": (bare(lambda o, y: F.ctc_loss(o.log_softmax(1)[:, None], y[None, :1] + 1, [12], [1])), "graph", "CtcLoss in the loss", "plain torch"),
    "multilabel_margin_loss": (bare(lambda o, y: F.multilabel_margin_loss(o, y[:, None].expand(-1, 3))), "graph", "MultilabelMarginLoss in the loss", "plain torch"),
    "flex_attention": (between(attend, 1, 4, 16, width=64), "gradient", r"FlexAttention does not support backward on CPU.*in the model \(Between\)", "another attention"),
    "in-place sigmoid": (layer(ChangingItsOutput), "gradient", r"inplace operation, in middle \(ChangingItsOutput\)", "x = x + 1"),
    "no_grad forward": (lambda: classifier(Silent()), "gradient", r"no gradient goes through inner \(Linear\)", "without detach(), no_grad()"),
    "argmax": (bare(lambda o, y: (o.argmax(1) == y).float().mean()), "gradient", "changes with the selected parameters, but no gradient goes through the loss", "argmax"),
    "weight_norm in TorchScript": (scripted_weight_norm, "graph", "weight_norm inside TorchScript", "eager model"),
    "random loss": (layer(Restless), "loss", "The loss is random", "global generators"),
    "nan in the weights": (with_nan, "parameters", "last.weight has 1 of", "earlier checkpoint"),
    "overflow": (layer(Overflowing), "loss", r"is (nan|inf): it begins in middle \(Overflowing\)", "overflow"),
    "infinite gradient": (between(lambda x: (0 * x).sqrt()), "gradient", r"begins in the backward of Sqrt in the model \(Between\)", "overflow"),
    "wrong width": (between(nn.Identity(), 2, 4), "loss", r"shapes cannot be multiplied.*in last \(Linear\)", "shapes and dtypes"),
    "vector loss": (bare(lambda o, y: F.cross_entropy(o, y, reduction="none")), "loss", "scalar", "mean"),
    "shuffling data": (counted_twice, "data", "A second pass over the data", "shuffle=False"),
    "all frozen": (frozen, "objective", "no trainable parameters", "requires_grad_"),
    "no such parameter": (lambda: classifier(Between(nn.Tanh()), select="decoder.*"), "objective", "No trainable parameter matches", "names are"),
    "lazy parameters": (lambda: classifier(nn.LazyLinear(3)), "objective", "weight has no values yet", "one batch"),
    "meta parameters": (lambda: classifier(nn.Linear(4, 3, device="meta")), "objective", "weight has no values yet", "load the weights"),
    "complex parameters": (lambda: classifier(nn.Linear(4, 3, dtype=torch.cfloat)), "objective", "is complex", "real"),
    "empty data": (lambda: cv.Objective.of(nn.Linear(4, 3), "cross-entropy", []), "data", "no batch came", "path"),
}  # fmt: skip


def wrong_width() -> cv.Objective:
    net = Between(nn.Tanh())
    net.last = nn.Linear(7, 3)
    return classifier(net)


ILL["wrong width"] = (wrong_width, *ILL["wrong width"][1:])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "flex" in n else n for n in ILL])  # 5 s
def test_what_is_ill_is_found_with_its_place_and_a_fix(name, monkeypatch):
    make, place, seen, fix = ILL[name]
    passes = counted_backwards(monkeypatch)
    objective = make() if place != "objective" else make
    with untouched(objective.function.module) if place != "objective" else nullcontext():
        diagnosis = cv.check(objective)
    (failure,) = diagnosis.failures
    assert failure.name == place and not diagnosis.healthy
    with pytest.raises(cv.CurvatureError, match=seen) as caught:
        raise getattr(cv, failure.error)(failure.seen, failure.fix)
    assert fix in failure.fix
    later = diagnosis.findings[diagnosis.findings.index(failure) + 1 :]
    assert all(finding.status == "skipped" and f"{place} failed" in finding.seen for finding in later)
    assert diagnosis.cost.products <= 10 and len(passes) <= 24
    if place != "objective":
        with pytest.raises(type(caught.value), match=seen):  # what any operator says
            objective.check()


def counted_backwards(monkeypatch) -> list[int]:
    """A list that grows by one with every backward pass to all parameters; those inside of losses have one input."""
    passes, grad = [], torch.autograd.grad

    def counting(outputs, inputs, *args, **kwargs):
        passes.extend([1] * isinstance(inputs, list))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    return passes


# --------------------------------------------------------------------------------------------- what is repaired


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def flash(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(x, x, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = nn.Linear(8, 8), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=self.use_reentrant)


encoder = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "batch_first": True}
new_norm = nn.utils.parametrizations.weight_norm

REPAIRED: dict[str, tuple[Callable[[], cv.Objective], str]] = {
    "weight_norm": (layer(lambda: new_norm(nn.Linear(8, 5))), "weight_norm"),
    "old weight_norm": (layer(lambda: nn.utils.weight_norm(nn.Linear(8, 5))), "weight_norm"),
    "attention": (between(sdpa, 1, 2, 4), "attention"),
    "flash attention": (between(flash, 1, 2, 4), "attention"),
    "multi-head attention": (layer(Attention, 2, 4), "attention"),
    "encoder layer": (layer(lambda: nn.TransformerEncoderLayer(**encoder), 2, 4), "attention"),
    "encoder layer, training": (
        layer(lambda: nn.TransformerEncoderLayer(**encoder, dropout=0.0), 2, 4, mode="train"),
        "attention",
    ),
    "embedding bag": (bag(lambda: nn.EmbeddingBag(7, 4)), "embedding_bag"),
    "embedding bag, max": (bag(lambda: nn.EmbeddingBag(7, 4, mode="max")), "embedding_bag"),
    "sparse embedding": (bag(lambda: nn.Embedding(7, 4, sparse=True)), "embedding"),
    "cdist": (between(lambda x: torch.cdist(x, x + 1), 2, 4), "cdist"),
    "hardsigmoid": (layer(nn.Hardsigmoid), "hardsigmoid"),
    "checkpoint": (layer(lambda: Checkpointed(False)), "checkpoint"),
    "reentrant checkpoint": (layer(lambda: Checkpointed(True)), "checkpoint"),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_repaired_is_said_and_right(name):
    make, rewritten = REPAIRED[name]
    objective = make()
    with untouched(objective.function.module):
        diagnosis = cv.check(objective)
    assert diagnosis.healthy and not diagnosis.warnings, diagnosis
    assert diagnosis.rewrites[rewritten] > 0 and rewritten in found(diagnosis)["rewrites"].seen
    assert objective.to(dtype=torch.float64).check().difference < 1e-6


# ----------------------------------------------------------------------------------------------- what is healthy


def tied() -> cv.Objective:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7, bias=False))
    net[2].weight = net[0].weight
    tokens = torch.randint(0, 7, (12,))
    return cv.Objective.of(net, "cross-entropy", (tokens, tokens.roll(1)))


def made_in_inference_mode() -> cv.Objective:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return classifier(net)


def branching(x: Tensor) -> Tensor:
    return x.tanh() if x.sum().item() > 0 else x.sin()


class OfOldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class WithContext(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def sampled(x: Tensor) -> Tensor:
    grid = torch.linspace(-0.9, 0.9, 9, dtype=x.dtype).view(1, 3, 3, 1).expand(len(x), 3, 3, 2)
    return F.grid_sample(x, grid, align_corners=False)


def scattered(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 3).scatter_reduce(1, (torch.arange(8) % 3).expand(len(x), 8), x, "sum")


def in_order(x: Tensor) -> Tensor:
    return nn.utils.rnn.pad_packed_sequence(nn.utils.rnn.pack_padded_sequence(x, [4] * len(x), batch_first=True))[0]


HEALTHY: dict[str, Callable[[], cv.Objective]] = {
    **{
        kind.__name__: layer(kind)
        for kind in (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.ReLU,
                     nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.Hardtanh, nn.ReLU6, nn.Softsign, nn.LogSigmoid)
    },
    "ReLU in place": layer(lambda: nn.ReLU(inplace=True)),
    "softmax": between(lambda x: x.softmax(1)),
    "GLU": layer(nn.GLU),
    "Linear": layer(lambda: nn.Linear(8, 5)),
    "Bilinear": between(lambda x: F.bilinear(x, x, torch.ones(2, 8, 8, dtype=x.dtype))),
    "LayerNorm": layer(lambda: nn.LayerNorm(8)),
    "RMSNorm": layer(lambda: nn.RMSNorm(8)),
    "GroupNorm": layer(lambda: nn.GroupNorm(2, 4), 4, 2),
    "InstanceNorm": layer(lambda: nn.InstanceNorm1d(2), 2, 4),
    "LocalResponseNorm": layer(lambda: nn.LocalResponseNorm(2), 2, 4),
    "BatchNorm, evaluation": layer(lambda: nn.BatchNorm1d(8)),
    "Dropout, training": layer(lambda: nn.Dropout(0.5), mode="train"),
    "Conv1d": layer(lambda: nn.Conv1d(2, 3, 2), 2, 4),
    "Conv2d": layer(lambda: nn.Conv2d(2, 3, 2), 2, 4, 4, width=32),
    "Conv3d": layer(lambda: nn.Conv3d(1, 2, 2), 1, 2, 4, 4, width=32),
    "depthwise": layer(lambda: nn.Conv2d(2, 2, 3, groups=2, padding=1), 2, 4, 4, width=32),
    "dilated, circular": layer(lambda: nn.Conv2d(2, 2, 2, dilation=2, padding=1, padding_mode="circular"), 2, 4, 4, width=32),
    "ConvTranspose2d": layer(lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), 2, 4, 4, width=32),
    "Embedding": bag(lambda: nn.Embedding(7, 4)),
    "tied": tied,
    "MaxPool": layer(lambda: nn.MaxPool2d(2), 2, 4, 4, width=32),
    "AvgPool": layer(lambda: nn.AvgPool2d(2), 2, 4, 4, width=32),
    "AdaptiveMaxPool": layer(lambda: nn.AdaptiveMaxPool2d(2), 2, 4, 4, width=32),
    "AdaptiveAvgPool": layer(lambda: nn.AdaptiveAvgPool2d(2), 2, 4, 4, width=32),
    "LPPool": between(lambda x: F.lp_pool1d(x + 5, 2.0, 2), 2, 4),
    "bilinear upsampling": layer(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 2, 4, 4, width=32),
    "bicubic upsampling": layer(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), 2, 4, 4, width=32),
    "PixelShuffle": layer(lambda: nn.PixelShuffle(2), 4, 2, 2, width=16),
    "Unfold": layer(lambda: nn.Unfold(2), 2, 4, 4, width=32),
    "grid_sample": between(sampled, 2, 4, 4, width=32),
    "RNN": layer(lambda: nn.RNN(2, 3, batch_first=True), 4, 2),
    "GRU": layer(lambda: nn.GRU(2, 3, batch_first=True), 4, 2),
    "LSTM": layer(lambda: nn.LSTM(2, 3, batch_first=True), 4, 2),
    "attention with weights": layer(lambda: SelfAttention(), 2, 4),
    "fft": between(lambda x: torch.fft.rfft(x).abs()),
    "complex": between(lambda x: torch.view_as_real(torch.complex(x, 2 * x) ** 2)),
    "cumprod": between(lambda x: x.tanh().cumprod(1)),
    "topk": between(lambda x: x.topk(3, 1).values),
    "scatter_reduce": between(scattered),
    "svdvals": between(lambda x: torch.linalg.svdvals(x), 2, 4),
    "solve": between(lambda x: torch.linalg.solve(x @ x.mT + torch.eye(2, dtype=x.dtype), x), 2, 4),
    "logsumexp": between(lambda x: x.logsumexp(1, keepdim=True)),
    "einsum": between(lambda x: torch.einsum("bij,bkj->bik", x, x), 2, 4),
    "branching": between(branching),
    "Function of the old style": layer(lambda: Custom(OfOldStyle)),
    "Function with a context": layer(lambda: Custom(WithContext)),
    "spectral_norm, evaluation": layer(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5))),
    "inference mode": made_in_inference_mode,
    "scalar loss": bare(F.cross_entropy),
}  # fmt: skip


class SelfAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x)[0]


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_healthy_raises_no_alarm(name, monkeypatch):
    objective = HEALTHY[name]()
    passes = counted_backwards(monkeypatch)
    with untouched(objective.function.module):
        diagnosis = cv.check(objective)
    assert diagnosis.healthy and not diagnosis.warnings, diagnosis
    answers = found(diagnosis)
    open_ones = {n for n, finding in answers.items() if finding.status == "skipped"}
    assert open_ones <= {"engine batched", "engine forward"}
    assert all(len(answers[n].seen) > 30 and "not for this model" in answers[n].seen for n in open_ones)
    assert diagnosis.cost.products <= 10 and len(passes) <= 24
    assert diagnosis.gradient_seconds >= 0 and diagnosis.product_seconds > 0
    assert objective.check() is objective._health[0] and objective.check().difference < 1e-5


def test_the_healthy_are_many():
    assert len(HEALTHY) >= 54 and len(ILL) + len(REPAIRED) >= 24


# ---------------------------------------------------------------------------------------------- what else is said


class Forgetting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().tanh()


def test_parameters_behind_a_cut_are_a_warning_with_the_place_of_the_cut():
    (warning,) = cv.check(classifier(Between(Forgetting()))).warnings
    assert warning.name == "gradient" and "first.weight, first.bias" in warning.seen
    assert "the loss changes with 2 parameters that no gradient reaches" in warning.seen
    assert warning.seen.endswith("No gradient goes through middle (Forgetting)")
    assert "take them as constants: remove detach()" in warning.fix and "Leave out" not in warning.fix


class Aside(nn.Module):
    """A layer whose outputs nothing comes of, beside one whose outputs are taken as numbers."""

    def __init__(self, *, taken: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh()) if taken else None
        self.extra, self.head = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.extra(x)
        return self.head(x if self.encoder is None else self.encoder(x).detach())


def test_layers_that_do_nothing_are_a_warning_of_other_words_than_those_that_are_cut_off():
    (idle,), (both,) = (cv.check(classifier(Aside(taken=taken))).warnings for taken in (False, True))
    nothing = "the loss does not depend on 2 parameters: extra.weight, extra.bias"
    assert nothing in idle.seen and "no gradient reaches" not in idle.seen
    assert idle.seen.endswith("No gradient goes through extra (Linear)")
    assert idle.fix.startswith("Leave out what it does not depend on (--exclude, select=)")
    cut = "the loss changes with 2 parameters that no gradient reaches: encoder.0.weight, encoder.0.bias"
    assert f"{cut}; {nothing}" in both.seen and both.seen.endswith("No gradient goes through encoder (Sequential)")
    assert both.fix.startswith("Derivatives take them as constants: remove") and idle.fix in both.fix


def test_batch_normalisation_in_training_is_a_warning_and_keeps_its_statistics():
    objective = classifier(Between(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3))), mode="train")
    with untouched(objective.function.module):
        diagnosis = cv.check(objective)
    (warning,) = diagnosis.warnings
    assert warning.name == "mode" and "1 batch norm by the statistics of each batch" in warning.seen
    assert "1 dropout with a fixed mask" in warning.seen and "--mode eval" in warning.fix
    seen = found(cv.check(objective.in_mode("eval")))["mode"].seen
    assert seen == "eval: 1 batch norm by running statistics, 1 dropout off"


class Scaled(nn.Module):
    """Divided by a number that hangs a little on the parameters before, which derivatives do not see."""

    def __init__(self, hanging: float) -> None:
        super().__init__()
        self.hanging = hanging

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + self.hanging * float(x.detach().square().mean()))


def test_a_little_that_derivatives_do_not_see_is_a_warning():
    for hanging, status in ((0.0, "ok"), (1.0, "warning")):
        torch.manual_seed(0)
        seen = found(cv.check(layer(partial(Scaled, hanging))()))["difference"]
        assert seen.status == status and ("item()" in seen.fix) == (status == "warning")


def test_a_gradient_of_zero_is_a_warning():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    gradient = found(cv.check(cv.Objective.of(net, "cross-entropy", data())))["gradient"]
    assert gradient.status == "warning" and "exactly zero" in gradient.seen and "dead" in gradient.fix


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_what_is_drawn_is_told_and_in_evaluation_it_is_a_warning():
    noise = found(cv.check(layer(Noisy)()))["randomness"]
    assert noise.status == "warning" and "also in evaluation" in noise.seen and "--seed" in noise.fix
    for options, seen in (({}, "nothing is drawn"), ({"mode": "train"}, "as of dropout")):
        drops = found(cv.check(layer(partial(nn.Dropout, 0.5), **options)()))["randomness"]
        assert drops.status == "ok" and seen in drops.seen


@pytest.mark.parametrize("reduction, told", [("mean", "ok"), ("sum", "warning")])
def test_a_sum_that_counts_as_a_mean_is_a_warning(reduction, told):
    terms = found(cv.check(bare(lambda o, y: F.cross_entropy(o, y, reduction=reduction))()))["terms"]
    assert terms.status == told and ("terms=" in terms.fix) == (told == "warning")
    counted = bare(lambda o, y: F.cross_entropy(o, y, reduction="sum"), terms=lambda batch: 1)
    assert found(cv.check(counted()))["terms"].status == "ok"


@pytest.mark.parametrize(
    "name, engine, words",
    [
        ("LSTM", "forward", "Trying to use forward AD with"),
        ("Function of the old style", "forward", "setup_context"),
    ],
)
def test_an_engine_that_does_not_work_is_told_in_the_words_of_torch(name, engine, words):
    finding = found(cv.check(HEALTHY[name]()))[f"engine {engine}"]
    assert finding.status == "skipped" and words in finding.seen and finding.seen.endswith("and not needed")


def test_an_engine_with_other_numbers_is_a_warning(monkeypatch):
    from curvature.operators import engine

    monkeypatch.setitem(engine.ENGINES, "batched", lambda work: lambda rows: 1.5 * engine._retained(work)(rows))
    (warning,) = cv.check(HEALTHY["Tanh"]()).warnings
    assert warning.name == "engine batched" and "50.0% off" in warning.seen and "engine='retained'" in warning.fix


def test_autocast_outside_is_told_and_float32_with_fewer_bits_is_a_warning():
    objective = HEALTHY["Tanh"]()
    with torch.autocast("cpu"):
        environment = found(cv.check(objective))["environment"]
    assert environment.status == "ok" and "autocast is on, but not inside" in environment.seen
    torch.set_float32_matmul_precision("medium")
    try:
        (warning,) = cv.check(objective).warnings
    finally:
        torch.set_float32_matmul_precision("highest")
    assert warning.name == "environment" and "'medium'" in warning.seen and "'highest'" in warning.fix


def test_a_torch_before_the_safe_one_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    seen = vitals.environment(torch.device("cpu"))
    assert "can corrupt memory before torch 2.10" in seen.text and "newer torch than 2.9" in seen.advice


def test_kinds_of_parameters_are_told():
    net = Between(nn.Tanh()).to(torch.bfloat16)
    net.first.weight.requires_grad_(False)
    seen = found(cv.check(classifier(net)))
    assert "bfloat16 parameters, computed in float32" in seen["model"].seen
    assert "35 numbers in 3 tensors, float32, on cpu; 32 more are held fixed" in seen["parameters"].seen
    assert "tied: 2.weight = 0.weight" in found(cv.check(tied()))["model"].seen


def test_parts_for_several_devices_are_a_warning():
    (warning,) = cv.check(classifier(Between(nn.DataParallel(nn.Linear(8, 5), device_ids=[])))).warnings
    assert "middle is wrapped for several devices" in warning.seen and ".module" in warning.fix


def test_sharded_parameters_are_refused_with_the_way_to_gather_them():
    class DTensor(nn.Parameter):
        """What FSDP makes of a parameter goes by this name."""

    net = Between(nn.Tanh())
    net.first.weight = DTensor(net.first.weight.data)
    (failure,) = cv.check(lambda: classifier(net)).failures
    assert "first.weight is sharded" in failure.seen and "full_state_dict=True" in failure.fix


def test_torchscript_is_told():
    module = torch.jit.trace(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), data()[0])
    diagnosis = cv.check(classifier(module))
    assert diagnosis.healthy and "TorchScript hides its parts" in found(diagnosis)["model"].seen


@pytest.mark.slow
def test_compiled_parts_are_told_and_run_eagerly():
    net = Between(torch.compile(nn.Linear(8, 5), backend="aot_eager"))
    diagnosis = cv.check(classifier(net))
    assert diagnosis.healthy and "middle is compiled, and runs eagerly" in found(diagnosis)["model"].seen


def test_the_forecast_is_of_all_data_and_refuses_what_does_not_fit(monkeypatch):
    x, y = data(64)
    objective = cv.Objective.of(Between(nn.Tanh()), "cross-entropy", (x, y), batch_size=16)
    one, ten = (cv.check(objective, products=n, vectors=20) for n in (1, 1000))
    last = ten.findings[-1]
    assert last.name == "forecast" and "1,000 products, 20 vectors on 64 examples in 4 batches" in last.seen
    graph = 4 * ten.graph_bytes
    assert ten.forecast_bytes == one.forecast_bytes == pytest.approx(20 * objective.space.size * 4 + graph)
    assert ten.forecast_seconds > 100 * one.product_seconds
    assert cv.check(objective).forecast_seconds is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    (failure,) = cv.check(objective, vectors=100).failures
    assert failure.error == "TooLarge" and "KiB are free" in failure.seen and "fewer" in failure.fix


def test_the_objective_may_be_used_after_the_check_and_is_not_checked_again():
    objective = HEALTHY["Tanh"]()
    before = objective.gradient()
    health = (cv.check(objective), objective.check())[1]
    assert torch.equal(objective.gradient(), before) and objective.check() is health
    assert cv.check(objective).cost.products == 9


def test_errors_of_files_are_no_findings():
    def missing() -> cv.Objective:
        raise cv.BadFile("There is no file.", "Look elsewhere.")

    with pytest.raises(cv.BadFile, match="There is no file"):
        cv.check(missing)


def test_a_diagnosis_comes_back_from_a_folder_and_shows_itself(tmp_path):
    diagnosis = cv.check(ILL["overflow"][0]())
    again = cv.Diagnosis.load(diagnosis.save(tmp_path))
    assert again.findings == diagnosis.findings and type(again.findings[0]) is cv.Finding
    assert "failed" in str(again) and "Overflowing" in again._repr_html_()
    assert diagnosis.to_dict()["findings"][0]["kind"] == "Finding"


def test_words_for_times_and_sizes():
    assert [vitals._seconds(s) for s in (3e-4, 0.042, 0.3, 7, 600, 9000)] == [
        "0.3 ms",
        "42 ms",
        "0.3 s",
        "7 s",
        "10 min",
        "2.5 h",
    ]
    assert [vitals._bytes(b) for b in (2048, 3 << 20, 5 << 30)] == ["2 KiB", "3 MiB", "5 GiB"]
