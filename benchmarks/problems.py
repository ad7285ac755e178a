"""Networks and data for timing products with curvature matrices, and what the products should be.

Everything here is plain torch: the problems are what a user would have before choosing a library, and the reference
shares nothing with any of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.assets import data, models, weights

Batch = tuple[Tensor, Tensor]
DATA = ("one batch", "loader")


class Size(NamedTuple):
    """How large the problems are: examples, and where it varies, the width of the network."""

    mlp: tuple[int, int]
    resnet: int
    gpt: tuple[int, int, int]  # and layers
    digits: int


SIZES = {
    "quick": Size(mlp=(64, 64), resnet=4, gpt=(3, 32, 1), digits=64),
    "cpu": Size(mlp=(512, 512), resnet=32, gpt=(8, 128, 4), digits=256),
    "cuda": Size(mlp=(8192, 4096), resnet=1024, gpt=(32, 768, 12), digits=1500),
}
CONTEXT, VOCABULARY = 128, 65  # of the transformer


class Loader:
    """Batches that can be read again and again, and count how often they are."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.handed = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.handed += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def passes(self) -> float:
        """How often all batches have been read."""
        return self.handed / len(self.batches)


class MeanCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with classes along the last axis, averaged over examples or tokens."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Problem:
    """A network in evaluation mode, and data; the loss is the mean cross-entropy of all examples or tokens."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> list[Tensor]:
        return list(self.module.parameters())

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(p.numel() for p in self.params)

    def loader(self, kind: str) -> Loader:
        """All data as "one batch", or as a "loader" of three, the last one smaller."""
        length = len(self.inputs)
        size = length if kind == "one batch" else -(-3 * length // 8)
        return Loader(list(zip(self.inputs.split(size), self.targets.split(size), strict=True)))

    def copied(self) -> nn.Module:
        """The network for a library to keep."""
        return copy.deepcopy(self.module)

    def rows(self, k: int) -> Tensor:
        """Random vectors (k, n), each of length sqrt(n)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(k, self.size, generator=generator).to(self.inputs.device)


def gradient(problem: Problem, loader: Loader) -> list[Tensor]:
    """The gradient of the loss as a training script computes it: the unit of every time and FLOP count."""
    params, length = problem.params, len(problem.inputs)
    sums: list[Tensor] = []
    for inputs, targets in loader:
        loss = MeanCrossEntropy()(problem.module(inputs), targets) * (len(inputs) / length)
        grads = torch.autograd.grad(loss, params)
        sums = [total.add_(grad) for total, grad in zip(sums, grads, strict=True)] if sums else list(grads)
    return sums


def mlp(size: Size, device: torch.device) -> Problem:
    """Tanh network on 784 pixels, three layers."""
    examples, width = size.mlp
    module = nn.Sequential(
        nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )  # fmt: skip
    return _problem(module, torch.randn(examples, 784), torch.randint(10, (examples,)), device)


def resnet(size: Size, device: torch.device) -> Problem:
    """ResNet-20 on 32x32 pixels, batch normalisation in evaluation mode with statistics of its data."""
    stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
    blocks = [_Residual(i if n == 0 else o, o, stride if n == 0 else 1) for i, o, stride in stages for n in range(3)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    module = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    inputs = torch.randn(size.resnet, 3, 32, 32)
    with torch.no_grad():
        for _ in range(20):
            module(inputs)
    return _problem(module, inputs, torch.randint(10, (size.resnet,)), device)


def gpt(size: Size, device: torch.device) -> Problem:
    """Transformer over characters with torch's fused attention and a tied head."""
    examples, width, layers = size.gpt
    module = models.CharGPT(VOCABULARY, context=CONTEXT, width=width, heads=4, layers=layers)
    ids = torch.randint(VOCABULARY, (examples, CONTEXT + 1))
    return _problem(module, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), device)


def digits(size: Size, device: torch.device) -> Problem:
    """The embedded convolutional network with its weights, on 8x8 pixels."""
    module = models.digits_cnn()
    module.load_state_dict(load_file(weights("digits-cnn")))
    pixels, labels = data.digits()
    return _problem(module, pixels[: size.digits], labels[: size.digits], device)


PROBLEMS: dict[str, Callable[[Size, torch.device], Problem]] = {
    "mlp": mlp,
    "resnet": resnet,
    "gpt": gpt,
    "digits": digits,
}


def problem_of(name: str, size: str, device: torch.device) -> Problem:
    """The problem of that name, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PROBLEMS[name](SIZES[size], device)


def reference(problem: Problem, matrix: str, rows: Tensor) -> Tensor:
    """The products (k, n) with all data at once in float64, by what autograd has for each: no library takes part."""
    module = problem.copied().double()
    inputs = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    products = {"hessian": _hessian_product, "ggn": _gauss_newton_product, "empirical_fisher": _fisher_product}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        product = products[matrix](module, inputs, problem.targets)
        return torch.stack([_flat(product(_shaped(row, module))) for row in rows.double()])


def _hessian_product(module: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    params = list(module.parameters())
    grads = torch.autograd.grad(MeanCrossEntropy()(module(inputs), targets), params, create_graph=True)
    return lambda vector: torch.autograd.grad(grads, params, vector, retain_graph=True)


def _gauss_newton_product(
    module: nn.Module, inputs: Tensor, targets: Tensor
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    def middle(logits: Tensor, tangent: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        (residual,) = torch.autograd.grad(MeanCrossEntropy()(logits, targets), logits, create_graph=True)
        return torch.autograd.grad(residual, logits, tangent)[0]

    return _around(middle, module, inputs)


def _fisher_product(module: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    def middle(logits: Tensor, tangent: Tensor) -> Tensor:
        residual = logits.softmax(-1) - F.one_hot(targets, logits.shape[-1])
        return residual * (residual * tangent).sum(-1, keepdim=True) / targets.numel()

    return _around(middle, module, inputs)


def _around(
    middle: Callable[[Tensor, Tensor], Tensor], module: nn.Module, inputs: Tensor
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """v -> J^T middle(J v), the first Jacobian by forward derivatives."""
    named = {name: p.detach() for name, p in module.named_parameters()}
    outputs = module(inputs)

    def product(vector: list[Tensor]) -> Sequence[Tensor]:
        tangents = dict(zip(named, vector, strict=True))
        pushed = jvp(lambda params: functional_call(module, params, (inputs,)), (named,), (tangents,))[1]
        return torch.autograd.grad(outputs, list(module.parameters()), middle(outputs, pushed), retain_graph=True)

    return product


def _shaped(row: Tensor, module: nn.Module) -> list[Tensor]:
    params = list(module.parameters())
    return [part.view_as(p) for part, p in zip(row.split([p.numel() for p in params]), params, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _problem(module: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device) -> Problem:
    return Problem(module.eval().to(device), inputs.to(device), targets.to(device))


class _Residual(nn.Module):
    """Two convolutions added to their input, which is thinned out and padded with zeros where the shape changes."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, outward - inward
        self.first = nn.Sequential(
            nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(outward, outward, 3, 1, 1, bias=False), nn.BatchNorm2d(outward))

    def forward(self, x: Tensor) -> Tensor:
        skipped = x
        if self.padding:
            half = self.padding // 2
            skipped = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(self.second(self.first(x)) + skipped)
