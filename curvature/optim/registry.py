"""Optimizers by name, for comparisons: without weight decay, all else as it is when nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

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

Make = Callable[[nn.Module, float, int], torch.optim.Optimizer]  # of a model, with a learning rate and a seed

OURS: dict[str, Callable[..., PreconditionedOptimizer]] = {
    "soap": SOAP,
    "shampoo": Shampoo,
    "kl-shampoo": KLShampoo,
    "muon": Muon,
    "psgd": PSGD,
    "mfac": MFAC,
    "efcp": EFCP,
    "kfac": KFAC,
    "ekfac": EKFAC,
    "egn": EGN,
    "newton-cg": NewtonCG,
    "sophia-g": SophiaG,
    "sophia-h": SophiaH,
    "adahessian": AdaHessian,
}


def _ours(
    kind: Callable[..., PreconditionedOptimizer], module: nn.Module, lr: float, seed: int
) -> torch.optim.Optimizer:
    return kind(_trained(module), lr=lr, weight_decay=0.0, seed=seed)


def _adamw(module: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(module), lr=lr, weight_decay=0.0)


def _sgd(module: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(_trained(module), lr=lr, momentum=0.9)


def _trained(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


OPTIMIZERS: dict[str, Make] = {
    "sgd": _sgd,
    "adamw": _adamw,
    **{name: partial(_ours, kind) for name, kind in OURS.items()},
}
