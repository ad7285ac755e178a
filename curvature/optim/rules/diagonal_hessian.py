"""Sophia and AdaHessian: gradients over a moving average of the diagonal of curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.structured import Diagonal
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.objective.products import pulled
from curvature.operators.hessian import hessian
from curvature.operators.residuals import residuals_of
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers, decays
from curvature.optim.evidence import Evidence
from curvature.optim.guard import FAILURES
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.update import ClipEntries, Momentum

Averaging = Literal["released", "paper"]


class AveragedDiagonal(ABC):
    """A moving average, `beta`, of estimates of the diagonal of curvature at the steps that are due.

    An estimate that is not finite is left out; three in a row, or the first, raise NonFinite: without curvature these
    optimizers would silently be others. `block.estimates` counts those that are in the average, which begins at zero.
    """

    beta: float
    every: int
    draws: int
    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})
    grain: ClassVar[Grain] = "model"

    @abstractmethod
    def estimate(self, block: Block, evidence: Evidence) -> Float[Tensor, " n"]:
        """What is averaged, from evidence with an objective."""

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        counts = {name: torch.zeros((), dtype=torch.float64) for name in ("block.estimates", "block.missed")}
        return {"curvature": block.zeros(), **{name: t.to(block.space.device) for name, t in counts.items()}}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        if not due:
            return
        estimate = self.estimate(block, evidence).to(block.dtype)
        if bool(torch.isfinite(estimate.sum())):
            state["curvature"].lerp_(estimate, 1 - self.beta)
            state["block.estimates"] += 1
            state["block.missed"].zero_()
            return
        state["block.missed"] += 1
        if state["block.missed"] >= FAILURES or not state["block.estimates"]:
            raise NonFinite(
                f"The estimates of the curvature of {block.names[0]} and others were not finite, "
                f"{int(state['block.missed'])} in a row.",
                "Lower the learning rate, or compute it in float64: Objective.of(..., dtype=torch.float64).",
            )


@dataclass(frozen=True)
class CurvatureRatio(AveragedDiagonal):
    """1 / max(rho h, eps), where h is the average of estimates of the diagonal."""

    beta: float
    rho: float
    eps: float
    every: int
    draws: int

    def __post_init__(self) -> None:
        _check(self)
        if not self.rho > 0:
            raise ValueError(f"rho is above 0, but got {self.rho}.")

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> Diagonal:
        bounded = (state["curvature"] * self.rho).clamp_(min=self.eps)
        return Diagonal(bounded.reciprocal_(), space=block.space, psd=True)


@dataclass(frozen=True)
class GaussNewtonRatio(CurvatureRatio):
    """Of the Gauss-Newton matrix, at sampled labels."""

    def estimate(self, block: Block, evidence: Evidence) -> Float[Tensor, " n"]:
        assert evidence.objective is not None
        return gauss_newton_bartlett(evidence.objective, self.draws, evidence.seed)


@dataclass(frozen=True)
class HessianRatio(CurvatureRatio):
    """Of the Hessian, by random signs."""

    needs: ClassVar[frozenset[Need]] = frozenset({"objective", "signs"})

    def estimate(self, block: Block, evidence: Evidence) -> Float[Tensor, " n"]:
        return _signed(evidence, self.draws)


@dataclass(frozen=True)
class HessianPower(AveragedDiagonal):
    """1 / (s^power + eps), s^2 the average, divided by 1 - beta^t after t estimates, of squared means of z * Hz."""

    beta: float
    power: float
    eps: float
    every: int
    draws: int
    averaging: Averaging
    run: int | None
    needs: ClassVar[frozenset[Need]] = frozenset({"objective", "signs"})

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.power <= 1:
            raise ValueError(f"power is from 0 to 1, but got {self.power}.")
        if self.averaging not in ("released", "paper"):
            raise ValueError(f"averaging is 'released' or 'paper', but got {self.averaging!r}.")
        if self.run is not None and self.run < 1:
            raise ValueError(f"run is 1 entry or more, or None for the kernels of convolutions, but got {self.run}.")

    def estimate(self, block: Block, evidence: Evidence) -> Float[Tensor, " n"]:
        estimate = _signed(evidence, self.draws).to(block.dtype)
        if self.averaging == "released":
            estimate = estimate.abs_()
        if self.run is not None or any(p.ndim > 2 for p in block.params):
            estimate = torch.cat([_smoothed(some, self.run).flatten() for some in block.scattered(estimate)])
        return estimate.square_()

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> Diagonal:
        corrected = state["curvature"] / (1 - self.beta ** state["block.estimates"]).to(block.dtype)
        sizes = corrected.sqrt_() if self.power == 1 else corrected.pow_(self.power / 2)
        return Diagonal(sizes.add_(self.eps).reciprocal_(), space=block.space, psd=True)


def _check(rule: CurvatureRatio | HessianPower) -> None:
    check_numbers(rule)
    if not 0 <= rule.beta < 1:
        raise ValueError(f"The decay of curvature is at least 0 and less than 1, but got {rule.beta}.")
    if not rule.eps > 0:
        raise ValueError(f"eps is above 0, but got {rule.eps}.")
    if rule.every < 1 or rule.draws < 1:
        raise ValueError(
            f"An estimate is of one draw at least, every so many steps, but got {rule.draws} every {rule.every}."
        )


def _signed(evidence: Evidence, draws: int) -> Float[Tensor, " n"]:
    """`hutchinson`, by the products that came along with the gradient where there are any: a vector of its own."""
    assert evidence.objective is not None
    if evidence.drawn is None:
        return hutchinson(evidence.objective, draws, evidence.seed)
    signs, products = evidence.drawn
    estimates = signs * products
    return estimates[0] if draws == 1 else estimates.mean(0)


def hutchinson(objective: Objective, products: int, seed: int) -> Float[Tensor, " n"]:
    """z * Hz, averaged over so many random signs z: its mean is the diagonal of the Hessian H.

    Of one z the variance of entry i is the sum of H_ij^2 over all others j, and the mean of its square that of row i.
    Hutchinson 1990.
    """
    z = objective.space.draw(products, seed=seed)
    return (z * hessian(objective).apply(z)).mean(0)


def gauss_newton_bartlett(objective: Objective, samples: int, seed: int) -> Float[Tensor, " n"]:
    """T g^2, averaged over `samples`: g the gradient of the mean loss of the T terms at targets drawn from the model.

    Its mean is the diagonal of the Fisher information, for most losses the Gauss-Newton matrix; the regulariser adds
    l2. An entry has a relative variance of about 2 / samples however large the batch is. Liu et al. 2023
    (arXiv:2305.14342), Algorithm 2.
    """
    residuals = residuals_of(objective, "Gauss-Newton-Bartlett", "sampled", samples=samples, seed=seed)

    def gradients(numbered: tuple[int, Any]) -> Float[Tensor, "k n"]:
        leaves = objective.leaves()
        outputs, targets = objective.outputs(leaves, numbered[1])
        drawn: Iterator[Tensor] = residuals(numbered[0], outputs.detach(), targets)
        return torch.stack([pulled(objective.space, list(leaves.values()), [outputs], [r]) for r in drawn])

    sums, terms = Passes(objective, lambda index, batch: (index, batch)).total(gradients)
    return sums.square().sum(0) / terms + objective.l2  # a sum: each residual has 1 / sqrt(samples) in it


def _smoothed(diagonal: Tensor, run: int | None) -> Tensor:
    """Each entry as the mean over its kernel of a convolution, the axes after the second; or, of each parameter, over
    its run of so many entries, row-major: the last may be shorter."""
    if run is None:
        if diagonal.ndim <= 2:
            return diagonal
        kernels = diagonal.flatten(2)
        return kernels.mean(-1, keepdim=True).expand_as(kernels)
    entries = diagonal.flatten()
    whole = len(entries) // run * run
    runs, rest = entries[:whole].view(-1, run), entries[whole:]
    return torch.cat([runs.mean(1, keepdim=True).expand_as(runs).flatten(), rest.mean().expand_as(rest)])


class SophiaG(PreconditionedOptimizer):
    """theta <- theta - lr clip(m / max(rho h, eps), 1) by entries: h is the Gauss-Newton diagonal at sampled labels.

    m averages gradients (betas[0]), h estimates of `gauss_newton_bartlett` (betas[1]) at the first step and every
    `every` after it. These take the mini-batch: `step(objective=...)`, which other steps need not have. An entry never
    moves by more than lr, and by lr where h is small: lr is that of AdamW, or a bit less. `rho` says how many entries
    move by less, a tenth to a half when it is well chosen: take more for more. Labels are drawn, and terms counted, by
    the loss, which is a negative log-likelihood.

    Liu, Li, Hall, Liang & Ma 2023 (arXiv:2305.14342). Its code begins after `every` steps with signs of momentum, and
    clips the sampled gradients, which makes h smaller than the diagonal.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        eps: float = 1e-12,
        every: int = 10,
        samples: int = 1,
        **options: Unpack[Options],
    ) -> None:
        betas = decays(betas)
        super().__init__(
            params,
            lr,
            GaussNewtonRatio(betas[1], rho, eps, every, samples),
            momentum=Momentum(betas[0]),
            finish=(ClipEntries(),),
            weight_decay=weight_decay,
            **options,
        )


class SophiaH(PreconditionedOptimizer):
    """theta <- theta - lr clip(m / max(rho h, eps), 1) by entries, as SophiaG: h is the diagonal of the Hessian.

    h averages z * Hz, for `products` vectors z of random signs a time, from `step(objective=...)` at the first step and
    every `every` after it. Where it is negative the entry moves by lr. Any twice differentiable loss will do, of which
    a multiple takes the same steps.

    Liu, Li, Hall, Liang & Ma 2023 (arXiv:2305.14342).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01,
        weight_decay: float = 0.1,
        *,
        eps: float = 1e-12,
        every: int = 10,
        products: int = 1,
        **options: Unpack[Options],
    ) -> None:
        betas = decays(betas)
        super().__init__(
            params,
            lr,
            HessianRatio(betas[1], rho, eps, every, products),
            momentum=Momentum(betas[0]),
            finish=(ClipEntries(),),
            weight_decay=weight_decay,
            **options,
        )


class AdaHessian(PreconditionedOptimizer):
    """theta <- theta - lr m / (s^power + eps): Adam with estimates of the diagonal of the Hessian in place of gradients
    in its second moment s^2.

    They are z * Hz for `products` vectors z of random signs, from `step(objective=...)`, which is needed at the first
    step and every `every` after it. Of one vector s goes to the norms of the rows of H, and not to its diagonal. They
    are averaged over the kernel of each filter of a convolution, or, with `run`, over runs of so many entries of each
    parameter (32 for transformers): "released" averages sizes, as the authors' code does, "paper" the signed estimates.

    lr is that of Newton's method, 1 for a quadratic with a diagonal Hessian, where power is 1; not that of AdamW. Where
    there is no curvature a step is lr m / eps: with the authors' lr and eps, which are these, 1500 times the momentum.
    ReLU networks have many such entries, the more so the better the diagonal is known (`products`): if the loss leaps,
    try eps=1e-2 before a smaller lr.

    Yao, Gholami, Shen, Mustafa, Keutzer & Mahoney 2021 (arXiv:2006.00719).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        power: float = 1.0,
        weight_decay: float = 0.0,
        *,
        every: int = 1,
        products: int = 1,
        averaging: Averaging = "released",
        run: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        betas = decays(betas)
        super().__init__(
            params,
            lr,
            HessianPower(betas[1], power, eps, every, products, averaging, run),
            momentum=Momentum(betas[0], corrected=True),
            weight_decay=weight_decay,
            **options,
        )
