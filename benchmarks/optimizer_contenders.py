"""The optimizers that `optimizers.py` compares: how each is made, and the values that it is tuned with.

Those of other libraries are optional: `pip install --no-deps heavyball pytorch_optimizer opt_einsum`, and Distributed
Shampoo from the sources of facebookresearch/optimizers, anywhere on PYTHONPATH. heavyball wants to be compiled, which
takes minutes for each optimizer; here it is not, and its times are not those that it is made for.

Decompositions are made anew every 10 steps by all, PSGD is fitted at every step, as by all in their first hundreds,
and has a dense factor for the shorter side of a matrix, or two where it is square. There is no weight
decay. All else is as its authors have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from curvature.optim.control import LevenbergMarquardt

OURS, TORCH, HEAVYBALL, KOZISTR, META = (
    "curvature",
    "torch",
    "heavyball, not compiled",
    "pytorch_optimizer",
    "Distributed Shampoo",
)
EVERY = 10
ROOT = 10**0.5
DIGITS = ("autoencoder", "cnn")
NETWORKS = (*DIGITS, "gpt")
EQUATIONS = ("poisson-1d", "poisson-2d")
CONVEX = ("logistic", "rotated")
DEEPER = ("deeper",)
ALL = NETWORKS + DEEPER + EQUATIONS + CONVEX


def around(centre: float) -> tuple[float, ...]:
    """Five values, two for each factor of ten."""
    return tuple(centre * ROOT**k for k in range(-2, 3))


@dataclass(frozen=True)
class Contender:
    """An optimizer of a library. `path` is its class, "module:name", which gets the parameters, one of `values` for its
    learning rate, and `kwargs`; or `make(class, model, value)` makes it, and it is another number that is tuned.

    `method` is the same for those that do the same. With `objective` a step takes the mini-batch, or one in `every`,
    with `graph` gradients that can be differentiated; with both it computes these on its own. What `solves` a system in
    each step makes fewer of them; the learning rate is `scheduled` where it does not find the length of its steps on
    its own. It is trained on `tasks`, of which there may be none.
    """

    method: str
    source: str
    path: str
    values: tuple[float, ...] = around(3e-3)
    tasks: tuple[str, ...] = ALL
    kwargs: dict[str, Any] = field(default_factory=dict)
    objective: bool = False
    every: int = 1
    graph: bool = False
    solves: bool = False
    scheduled: bool = True
    make: Callable[[Any, nn.Module, float], Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.method}, {self.source}"

    def asks(self, step: int) -> bool:
        """Whether this step takes the mini-batch."""
        return self.objective and step % self.every == 0

    def differentiates(self, step: int) -> bool:
        """Whether this step computes the gradient on its own."""
        return self.graph and self.asks(step)

    @property
    def missing(self) -> bool:
        """Whether it cannot be imported here."""
        try:
            self.kind()
        except (ImportError, AttributeError):
            return True
        return False

    def kind(self) -> Any:
        module, _, name = self.path.partition(":")
        found = import_module(module)
        if module == "heavyball":
            found.utils.compile_mode = None
        return getattr(found, name)

    def optimizer(self, model: nn.Module, value: float) -> Any:
        """A new one."""
        if self.make is not None:
            return self.make(self.kind(), model, value)
        params = model.named_parameters() if self.source == OURS else model.parameters()
        return self.kind()(params, lr=value, **self.kwargs)


class Together:
    """Several optimizers that share the parameters of a model, as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> list[Any]:
        return [part.state for part in self.parts]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def hidden(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of layers, and the other parameters: as Muon is to be used."""
    inside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    matrices = [p for p in model.parameters() if id(p) in inside]
    return matrices, [p for p in model.parameters() if id(p) not in inside]


def muon_of_torch(kind: Any, model: nn.Module, lr: float) -> Together:
    matrices, others = hidden(model)
    return Together(
        kind(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, **FAST),
    )


def muon_of_kozistr(kind: Any, model: nn.Module, lr: float) -> Any:
    matrices, others = hidden(model)
    groups = [{"params": matrices, "use_muon": True, "lr": lr}, {"params": others, "use_muon": False, "lr": lr}]
    return kind(groups, use_adjusted_lr=True)


def meta(kind: Any, model: nn.Module, lr: float, *, config: str) -> Any:
    """Distributed Shampoo on one device, as its documentation has it: with the steps of Adam, but as SOAP."""
    package, graft = import_module("distributed_shampoo"), config == "DefaultShampooConfig"
    return kind(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.999) if graft else (0.95, 0.95),
        precondition_frequency=EVERY,
        grafting_config=package.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8) if graft else None,
        preconditioner_config=getattr(package, config),
    )


def damped(kind: Any, model: nn.Module, damping: float, **kwargs: Any) -> Any:
    return kind(model.named_parameters(), lr=1.0, damping=damping, **kwargs)


PLAIN = {"weight_decay": 0.0}
FAST = {**PLAIN, "foreach": True}
OFTEN = {**PLAIN, "every": EVERY}
PEER = {**PLAIN, "precondition_frequency": EVERY}
ROOTS = {"preconditioning_compute_steps": EVERY, "start_preconditioning_step": 1}
ONE_DENSE = {"memory_save_mode": "smart_one_diag"}
LEVENBERG = partial(damped, control=LevenbergMarquardt())
COARSE, WIDE = around(0.1), around(1.0)


def ours(method: str, path: str, tasks: tuple[str, ...], values: tuple[float, ...] = around(3e-3), **more: Any) -> Any:
    return Contender(method, OURS, f"curvature.optim.rules.{path}", values, tasks, **{"kwargs": PLAIN, **more})


def asking(method: str, path: str, tasks: tuple[str, ...], values: tuple[float, ...], **more: Any) -> Any:
    """One of ours that takes the mini-batch."""
    return ours(method, path, tasks, values, objective=True, **more)


def solving(method: str, path: str, tasks: tuple[str, ...], make: Any, scheduled: bool = False) -> Any:
    """One of ours that solves a system in every step, the damping of which is tuned."""
    return asking(method, path, tasks, WIDE, solves=True, make=make, scheduled=scheduled)


def theirs(method: str, source: str, path: str, tasks: tuple[str, ...] = (), **more: Any) -> Contender:
    return Contender(method, source, path, around(3e-3), tasks, **more)


SHAMPOO, FIRST = "distributed_shampoo:DistributedShampoo", DIGITS[:1]
BASELINES = [
    Contender("AdamW", TORCH, "torch.optim:AdamW", kwargs=FAST),
    Contender("AdamW, beta2 0.95", TORCH, "torch.optim:AdamW", kwargs={**FAST, "betas": (0.9, 0.95)}),
    Contender("SGD, momentum 0.9", TORCH, "torch.optim:SGD", COARSE, kwargs={"momentum": 0.9, "foreach": True}),
]
CONTENDERS = [
    *BASELINES,
    ours("Muon", "muon:Muon", NETWORKS, kwargs={**PLAIN, "dtype": torch.bfloat16}),
    ours("Shampoo", "shampoo:Shampoo", NETWORKS, kwargs=OFTEN),
    ours("SOAP", "soap:SOAP", NETWORKS + DEEPER + EQUATIONS, kwargs=OFTEN),
    ours("KL-Shampoo", "soap:KLShampoo", NETWORKS, kwargs=OFTEN),
    ours("PSGD", "psgd:PSGD", NETWORKS + CONVEX),
    ours("M-FAC", "mfac:MFAC", DIGITS + CONVEX),
    ours("EFCP", "mfac:EFCP", DIGITS + CONVEX),
    asking("SophiaG", "diagonal_hessian:SophiaG", NETWORKS + CONVEX, around(1e-3), every=EVERY),
    asking("SophiaH", "diagonal_hessian:SophiaH", DIGITS + CONVEX, around(1e-3), graph=True, every=EVERY),
    asking("AdaHessian", "diagonal_hessian:AdaHessian", DIGITS + CONVEX, COARSE, graph=True),
    asking("K-FAC", "kfac:KFAC", DIGITS, around(3e-3)),
    asking("EKFAC", "kfac:EKFAC", DIGITS, around(3e-3)),
    solving("EGN", "gauss_newton:EGN", EQUATIONS + CONVEX, damped, scheduled=True),
    solving("EGN, Levenberg-Marquardt", "gauss_newton:EGN", EQUATIONS + CONVEX, LEVENBERG),
    solving("Newton-CG, Levenberg-Marquardt", "newton_cg:NewtonCG", FIRST + EQUATIONS + CONVEX, LEVENBERG),
    theirs("Muon", TORCH, "torch.optim:Muon", make=muon_of_torch),
    theirs("Muon", KOZISTR, "pytorch_optimizer:Muon", make=muon_of_kozistr),
    theirs("Muon", HEAVYBALL, "heavyball:Muon", kwargs=PLAIN),
    theirs("Shampoo", META, SHAMPOO, FIRST, make=partial(meta, config="DefaultShampooConfig")),
    theirs("Shampoo", KOZISTR, "pytorch_optimizer:ScalableShampoo", kwargs=ROOTS),
    theirs("SOAP", META, SHAMPOO, FIRST, make=partial(meta, config="DefaultSOAPConfig")),
    theirs("SOAP", KOZISTR, "pytorch_optimizer:SOAP", FIRST, kwargs=PEER),
    theirs("SOAP", HEAVYBALL, "heavyball:SOAP", FIRST, kwargs=PEER),
    theirs("KL-Shampoo", HEAVYBALL, "heavyball:KLShampoo", kwargs=PEER),
    theirs("PSGD", KOZISTR, "pytorch_optimizer:Kron", kwargs={**ONE_DENSE, "pre_conditioner_update_probability": 1.0}),
    theirs("PSGD", HEAVYBALL, "heavyball:PSGDKron", kwargs={**ONE_DENSE, "preconditioner_update_probability": 1.0}),
    theirs("SophiaH", KOZISTR, "pytorch_optimizer:SophiaH", graph=True),
    theirs("AdaHessian", KOZISTR, "pytorch_optimizer:AdaHessian", graph=True),
]
