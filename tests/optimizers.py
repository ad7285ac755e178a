"""The table of optimizers: how each is made, what it refuses, and the network and data that all are tried on."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import curvature as cv
from curvature.optim.control import Armijo, LevenbergMarquardt, QuadraticModel
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.rules.diagonal_hessian import AdaHessian, SophiaG, SophiaH
from curvature.optim.rules.gauss_newton import EGN
from curvature.optim.rules.kfac import EKFAC, KFAC
from curvature.optim.rules.mfac import EFCP, MFAC
from curvature.optim.rules.muon import Muon
from curvature.optim.rules.newton_cg import NewtonCG
from curvature.optim.rules.psgd import PSGD
from curvature.optim.rules.shampoo import Shampoo
from curvature.optim.rules.soap import SOAP, KLShampoo

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class OptimizerCase:
    """A class with the arguments that it is tried with; `invalid` are arguments that it refuses, with the words.

    `lr` is one at which `Awkward` is learnt. `skips` names tests of the conformance table that do not apply, each with
    the reason.
    """

    kind: Callable[..., PreconditionedOptimizer]
    lr: float
    kwargs: dict[str, Any] = field(default_factory=dict)
    invalid: tuple[tuple[dict[str, Any], str], ...] = ()
    objective: bool = False
    name: str = ""
    skips: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or self.kind.__name__  # pyright: ignore[reportAttributeAccessIssue]

    def make(self, params: Any, **more: Any) -> PreconditionedOptimizer:
        return self.kind(params, **{"lr": self.lr, **self.kwargs, **more})

    def step(self, net: nn.Module, optimizer: PreconditionedOptimizer, batch: Batch) -> float:
        """One step on a batch, as a training loop would make it; the loss before."""
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        if self.objective:
            optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [batch]))
        else:
            optimizer.step()
        return loss.item()

    def train(self, net: nn.Module, optimizer: PreconditionedOptimizer, batches: Iterable[Batch]) -> list[float]:
        return [self.step(net, optimizer, batch) for batch in batches]


NULL_SPACE = {
    "test_gradients_can_be_accumulated": "while moments are of less than full rank, rounding chooses a basis of the rest"
}

EVERY_STEP = "no step is between refreshes: each takes its gradient into the window, and solves with it"
WINDOW = {
    name: EVERY_STEP
    for name in (
        "test_a_step_between_refreshes_reads_no_value",
        "test_an_update_between_refreshes_is_one_graph",
        "test_a_step_between_refreshes_does_not_wait_for_the_gpu",
    )
}


def kfac_of_own_passes(params: Any, **options: Any) -> KFAC:
    """K-FAC with the model that has all these parameters, itself and not what wraps it."""
    given = list(params)
    copies = [dict(part) if isinstance(part, dict) else part for part in given]
    wanted = {id(p) for group in torch.optim.SGD(copies, lr=0.0).param_groups for p in group["params"]}
    nets = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    owners = [net for net in nets if wanted <= {id(p) for p in net.parameters()}]
    model = min(owners, key=lambda net: len(list(net.modules())), default=None)  # none where it is not kept
    return KFAC(given, fisher="empirical", model=model, **options)


LOWERS = {"test_ascent_is_descent_of_the_negative": "a control lowers losses, and refuses maximize=True"}

CASES = [
    OptimizerCase(
        Muon,
        2e-2,
        invalid=(
            ({"momentum": 1.0}, "less than 1, but got 1.0"),
            ({"lr": -1.0}, "lr is 0 or more"),
            ({"steps": 0}, "steps is 1 or more, but got 0"),
            ({"match": "adam"}, "match is rms, spectral or none, but got adam"),
            ({"roles": {"*": "layer"}}, "roles are matrix, embedding, head, vector, scalar, but got layer"),
        ),
    ),
    OptimizerCase(
        PSGD,
        1e-2,
        invalid=(
            ({"rate": 0.0}, "rate is more than 0 and at most 1, but got 0"),
            ({"eps": 0.0}, "eps is more than 0, but got 0"),
            ({"every": 0}, "every is 1 or more, but got 0"),
            ({"rank": 0}, "rank is 1 or more, or None for Kronecker factors, but got 0"),
            ({"fit": "loss"}, "fit is gradient, momentum or hessian, but got loss"),
        ),
    ),
    OptimizerCase(PSGD, 3e-3, {"fit": "momentum", "max_skew": math.inf}, name="PSGD of momentum"),
    OptimizerCase(PSGD, 1e-2, {"rank": 3}, name="PSGD of low rank"),
    OptimizerCase(PSGD, 3e-2, {"fit": "hessian"}, objective=True, name="PSGD of the Hessian"),
    OptimizerCase(PSGD, 1e-1, {"fit": "hessian", "rank": 3}, objective=True, name="PSGD of the Hessian, low rank"),
    OptimizerCase(
        Shampoo,
        2e-2,
        {"every": 3},
        invalid=(
            ({"betas": (1.0, 0.9)}, "less than 1, but got 1.0"),
            ({"betas": (0.9, 1.1)}, "from 0 to 1, which makes a sum, but got 1.1"),
            ({"eps": -1.0}, "eps is 0 or more, but got -1.0"),
            ({"every": 0}, "every is a whole number of 1 or more, but got 0"),
            ({"max_dim": 0}, "max_dim is a whole number of 1 or more, but got 0"),
            ({"exponent": 0.0}, r"above 0 and at most 1, or None for 1/\(2k\), but got 0.0"),
            ({"method": "svd"}, '"eigh", "newton" or "qr", but got \'svd\''),
            ({"method": "newton", "exponent": 0.3}, "roots of whole numbers 1/p, but got p = 0.3"),
        ),
    ),
    OptimizerCase(
        Shampoo,
        2e-2,
        {"every": 3, "max_dim": 5, "method": "newton", "graft": None, "eps": 1e-2},
        name="Shampoo in tiles",
    ),
    OptimizerCase(
        Shampoo, 2e-2, {"every": 3, "method": "qr", "betas": (0.9, 1.0), "exponent": 0.5}, name="Shampoo by QR"
    ),
    OptimizerCase(
        SOAP,
        2e-2,
        {"every": 3},
        skips=NULL_SPACE,
        invalid=(
            ({"betas": (0.9, 1.0)}, "at least 0 and less than 1, but got 1.0"),
            ({"eps": -1.0}, "eps is 0 or more, but got -1.0"),
            ({"every": 0}, "every is a whole number of 1 or more, but got 0"),
            ({"refresh": "never"}, '"before" or "after" the step, but got \'never\''),
        ),
    ),
    OptimizerCase(
        SOAP,
        2e-2,
        {"every": 3, "refresh": "after", "one_sided": True},
        name="SOAP of one side, refreshed after",
        skips=NULL_SPACE,
    ),
    OptimizerCase(
        KLShampoo,
        2e-2,
        {"every": 3},
        skips=NULL_SPACE,
        invalid=(({"betas": (0.9, 1.0)}, "at least 0 and less than 1, but got 1.0"), ({"every": 2.5}, "but got 2.5")),
    ),
    OptimizerCase(
        MFAC,
        2e-2,
        {"damping": 1e-3, "window": 16},
        skips=WINDOW,
        invalid=(
            ({"window": 0}, "window is a whole number, 1 or more, but got 0"),
            ({"window": 2.5}, "window is a whole number, but got 2.5"),
            ({"damping": 0.0}, "damping is above 0, but got 0"),
        ),
    ),
    OptimizerCase(
        EFCP,
        2e-2,
        {"damping": 1e-3, "window": 16, "density": 0.5},
        skips=WINDOW,
        invalid=(
            ({"density": 0.0}, "above 0 and up to 1, but got 0"),
            ({"momentum": 0.9}, "Give graft=None"),
            ({"rank": 0}, "rank is 1 or more"),
        ),
    ),
    OptimizerCase(EFCP, 1e-2, {"damping": 1e-3, "window": 16, "rank": 1}, name="EFCP of low rank", skips=WINDOW),
    OptimizerCase(
        SophiaG,
        1e-2,
        {"every": 4},
        objective=True,
        invalid=(
            ({"betas": (0.9, 1.0)}, "less than 1, but got 1.0"),
            ({"every": 0}, "every so many steps, but got 1 every 0"),
            ({"rho": 0.0}, "rho is above 0, but got 0"),
        ),
    ),
    OptimizerCase(SophiaH, 1e-2, {"every": 4}, objective=True, invalid=(({"eps": 0.0}, "eps is above 0, but got 0"),)),
    OptimizerCase(
        AdaHessian,
        5e-2,
        {"every": 2},
        objective=True,
        invalid=(
            ({"power": 2.0}, "power is from 0 to 1, but got 2"),
            ({"averaging": "mean"}, "averaging is 'released' or 'paper', but got 'mean'"),
            ({"run": 0}, "run is 1 entry or more, or None for the kernels of convolutions, but got 0"),
        ),
    ),
    OptimizerCase(
        EGN,
        1.0,
        {"damping": 1e-1},
        objective=True,
        invalid=(
            ({"damping": 0.0}, "damping is above 0, but got 0"),
            ({"maximize": True, "control": LevenbergMarquardt()}, "LevenbergMarquardt lowers a loss"),
        ),
    ),
    OptimizerCase(
        EGN,
        1.0,
        {"damping": 1.0, "control": LevenbergMarquardt(least=1e-1)},
        objective=True,
        name="EGN of Levenberg-Marquardt",
        skips=LOWERS,
    ),
    OptimizerCase(
        KFAC,
        2e-2,
        {"every": 4, "collect": 2, "weight_decay": 0.0},
        objective=True,
        invalid=(
            ({"fisher": "exact"}, "'sampled', 'empirical' or 'type-2', but got 'exact'"),
            ({"sharing": "all"}, "'expand' or 'reduce', but got 'all'"),
            ({"damping": 0.0}, "damping > 0 and 0 <= beta < 1, but got 0.0 and 0.95"),
            ({"collect": 3}, "every is a multiple of collect, which is 1 or more, but got 4 and 3"),
            ({"match": "rms"}, "match is 'adam', 'kl' or 'none', but got 'rms'"),
            ({"match": "kl", "kl": 0.0}, "above 0, but got 0"),
        ),
    ),
    OptimizerCase(
        KFAC,
        1.0,
        {
            "match": "none",
            "momentum": 0.0,
            "weight_decay": 0.0,
            "damping": 1.0,
            "factored": True,
            "control": QuadraticModel(),
        },
        objective=True,
        name="KFAC by a quadratic model, with factored damping",
        skips=LOWERS,
    ),
    OptimizerCase(EKFAC, 2e-2, {"every": 4, "collect": 2}, objective=True),
    OptimizerCase(
        kfac_of_own_passes,
        2e-2,
        {"every": 4, "collect": 2},
        name="KFAC of own passes",
        skips={
            "test_models_may_be_wrapped": "compiled models show no layers",
            "test_shards_are_refused": "there is no model",
            "test_arguments_are_checked_and_the_error_says_what_came": "it is looked for first",
        },
    ),
    OptimizerCase(
        NewtonCG,
        1.0,
        {"damping": 1e-1, "control": Armijo()},
        objective=True,
        skips={
            **LOWERS,
            "test_its_matrix_is_symmetric_positive_definite_and_what_momentum_is_multiplied_by": "truncated: linear only "
            "as far as it converges, see test_newton_cg",
        },
        invalid=(
            ({"matrix": "fisher"}, "matrix is 'ggn' or 'hessian', but got 'fisher'"),
            ({"rtol": 0.0}, "0 < rtol < 1"),
            ({"max_steps": 0}, "max_steps >= 1"),
        ),
    ),
]


class Awkward(nn.Module):
    """Parameters of all shapes: an embedding, a convolution, normalisations, a tied matrix, a vector and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv2d(3, 4, 2)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.head = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.first(self.embed(tokens).flatten(1))).tanh()
        x = self.conv(x.view(-1, 3, 2, 2)).flatten(1) + self.shift
        x = self.third(self.second(x.tanh()).tanh()).tanh()
        return self.head(x) * self.scale


def awkward(dtype: torch.dtype = torch.float64, seed: int = 0) -> Awkward:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Awkward().to(dtype)


def batches(count: int, size: int = 16, seed: int = 0) -> list[Batch]:
    """Pairs of tokens, whose class is the remainder of their sum by 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 7, (size, 2), generator=generator) for _ in range(count)]
    return [(x, x.sum(1) % 3) for x in tokens]
