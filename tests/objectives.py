"""The zoo: tiny objectives in float64, and their curvature computed the obvious way, one entry at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature as cv


@dataclass(frozen=True)
class Case:
    """A model, a loss and data; `mean_loss(outputs, targets)` is what torch computes over all data at once.

    Flat vectors hold the trainable parameters.
    """

    name: str
    module: nn.Module
    loss: object
    mean_loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    def objective(self, sizes: tuple[int, ...] | None = None, **options) -> cv.Objective:
        """The objective, its data cut into batches of the given sizes."""
        sizes = sizes or (len(self.inputs),)
        batches = list(zip(self.inputs.split(list(sizes)), self.targets.split(list(sizes)), strict=True))
        return cv.Objective.of(self.module, self.loss, batches, **options)

    def value(self, flat: Tensor) -> Tensor:
        """The loss at the flat parameter vector."""
        return self.mean_loss(self.outputs(flat), self.targets)

    def outputs(self, flat: Tensor) -> Tensor:
        """The model's outputs at the flat parameter vector."""
        params, start = {}, 0
        for name, p in self.trainable.items():
            params[name] = flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return torch.func.functional_call(self.module, params, (self.inputs,))

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def flat(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.trainable.values()).detach()

    def dense_hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.value, self.flat)

    def dense_ggn(self) -> Tensor:
        """J^T M J with J from autograd and M the dense Hessian of the mean loss in the outputs."""
        jacobian = torch.autograd.functional.jacobian(self.outputs, self.flat)
        outputs = self.outputs(self.flat)
        M = torch.autograd.functional.hessian(lambda o: self.mean_loss(o, self.targets), outputs)
        count = outputs.numel()
        return jacobian.reshape(count, -1).T @ M.reshape(count, count) @ jacobian.reshape(count, -1)

    def __str__(self) -> str:
        return self.name


def zoo() -> list[Case]:
    """Every case, made afresh from fixed seeds."""
    makers = [
        softmax_regression,
        classifier,
        smoothed,
        weighted,
        soft_targets,
        regression,
        tokens,
        convolution,
        grouped_convolution,
        attention,
        recurrent,
        tied,
        binary,
        counts,
        distillation,
        frozen,
    ]
    cases = []
    for maker in makers:
        torch.manual_seed(1)
        case = maker()
        cases.append(case)
    return cases


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def softmax_regression() -> Case:
    x, y = torch.randn(9, 3).double(), torch.randint(0, 4, (9,))
    return Case("softmax-regression", _mlp(3, 4), "cross-entropy", F.cross_entropy, x, y)


def classifier() -> Case:
    x, y = torch.randn(9, 4).double(), torch.randint(0, 3, (9,))
    return Case("classifier", _mlp(4, 5, 3), nn.CrossEntropyLoss(), F.cross_entropy, x, y)


def smoothed() -> Case:
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    return Case("label-smoothing", _mlp(4, 3, 3), loss, loss, x, y)


def weighted() -> Case:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.3, 2.0]).double(), label_smoothing=0.1)
    x, y = torch.randn(8, 4).double(), torch.tensor([0, 1, 2, -100, 1, 1, 0, -100])
    return Case("class-weights-and-ignored", _mlp(4, 3, 3), loss, loss, x, y)


def soft_targets() -> Case:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.3, 2.0]).double(), label_smoothing=0.1)
    x, y = torch.randn(8, 4).double(), torch.rand(8, 3).double()
    return Case("probabilities", _mlp(4, 3, 3), loss, loss, x, y)


def regression() -> Case:
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    return Case("regression", _mlp(3, 4, 2), nn.MSELoss(), F.mse_loss, x, y)


def tokens() -> Case:
    """Sequences with ignored tokens, classes last."""
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 6)).double()
    x, y = torch.randint(0, 7, (8, 5)), torch.randint(0, 6, (8, 5))
    y[2, 1:], y[5, :4] = -100, -100
    return Case("tokens", module, "cross-entropy", lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), x, y)


def grouped_convolution() -> Case:
    """Groups, dilation, stride and batch normalisation with the statistics it has learned."""
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, stride=2, padding_mode="circular", padding=1),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).double()
    x, y = torch.randn(8, 2, 5, 5).double(), torch.randint(0, 3, (8,))
    module.train()(x)
    return Case("grouped-convolution", module.eval(), "cross-entropy", F.cross_entropy, x, y)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def recurrent() -> Case:
    """An LSTM that predicts two numbers at every step."""
    x, y = torch.randn(8, 3, 2).double(), torch.randn(8, 3, 2).double()
    return Case("lstm", _Recurrent().double(), "mse", F.mse_loss, x, y)


class _Tied(nn.Module):
    """A language model whose head is its embedding, with a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.norm = nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for _ in range(2):
            hidden = hidden + F.gelu(self.middle(self.norm(hidden)))
        return self.head(hidden)


def tied() -> Case:
    x, y = torch.randint(0, 6, (8, 3)), torch.randint(0, 6, (8, 3))
    y[1, 2], y[4] = -100, -100
    return Case(
        "tied-head", _Tied().double(), "cross-entropy", lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), x, y
    )


def binary() -> Case:
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 1.0]).double())
    x, y = torch.randn(8, 4).double(), torch.randint(0, 2, (8, 3)).double()
    return Case("binary", _mlp(4, 3, 3), loss, loss, x, y)


def counts() -> Case:
    x, y = torch.randn(8, 3).double(), torch.randint(0, 4, (8, 2)).double()
    return Case("counts", _mlp(3, 4, 2), "poisson-nll", F.poisson_nll_loss, x, y)


def distillation() -> Case:
    x, y = torch.randn(8, 3).double(), torch.randn(8, 4).double().softmax(-1)
    return Case(
        "distillation", _mlp(3, 3, 4), "kl", lambda o, t: F.kl_div(o.log_softmax(-1), t, reduction="batchmean"), x, y
    )


def frozen() -> Case:
    """Parameters that are held fixed, before and between those that are not."""
    module = _mlp(3, 4, 3)
    for p in (module[0].weight, module[2].weight):
        p.requires_grad_(False)
    x, y = torch.randn(8, 3).double(), torch.randint(0, 3, (8,))
    return Case("frozen", module, "cross-entropy", F.cross_entropy, x, y)


def convolution() -> Case:
    module = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 2, 3),
        nn.SiLU(),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    ).double()
    x, y = torch.randn(8, 16).double(), torch.randint(0, 3, (8,))
    return Case("convolution", module, "cross-entropy", F.cross_entropy, x, y)


class _Attention(nn.Module):
    """One causal attention layer with the default backend of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 2, 6).transpose(1, 2).split(2, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


def attention() -> Case:
    x, y = torch.randn(8, 3, 4).double(), torch.randint(0, 3, (8,))
    return Case("attention", _Attention().double(), "cross-entropy", F.cross_entropy, x, y)
