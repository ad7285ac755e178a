"""PSGD: P = Q^2, fitted by small steps of symmetric positive definite Q until P h is white."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.packed import from_triangles, triangles
from curvature.linalg.structured import BlockDiagonal, Diagonal, Kronecker, Places
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.rules.psgd_fit import (
    Fit,
    capped,
    check,
    first_scale,
    fits,
    pair,
    spectral_norm,
    tracked,
)
from curvature.optim.rules.psgd_lowrank import LowRankNewton, LowRankWhitening
from curvature.optim.update import ClipEntries, ClipNorm, Momentum


@dataclass(frozen=True)
class KroneckerWhitening:
    """P1 ⊗ P2 with P_j = Q_j^2, which minimises E h^T P h + tr P^-1 over gradients h: then P = (E h h^T)^(-1/2), and
    P h is white, where that is a Kronecker product. Q_j is symmetric and positive definite.

    A fit makes Q_j <- (I - G_j) Q_j (I - G_j) with G_j = rate (T_j - N_j) / (2 L_j), of the Gram matrices over side j
    of P h (T_j) and of white noise (N_j). L_j bounds |T_j + N_j|. Noise of the size `eps` is added to h, so that P
    stays below 1 / eps; of all noise it is the mean that is taken. Where h is all zero nothing is fitted.

    A side of d entries of a matrix of n has a diagonal factor where d > `max_size` or d^2 > `max_skew` n. Q is fitted
    at each of the first 500 steps, then at ever fewer, and at one in `every` for ever.
    """

    rate: float = 0.1
    eps: float = 1e-9
    every: int = 33
    max_size: float = 8192
    max_skew: float = 1.0
    fit: Fit = "gradient"
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.fit, self.rate, self.eps, self.every)

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        state = {"slopes": torch.zeros(block.stack, 2, dtype=block.dtype, device=block.space.device)}
        for side, size in zip(("left", "right"), block.matrix, strict=True):
            one = torch.ones(block.stack, size, dtype=block.dtype, device=block.space.device)
            state[f"Q_{side}"] = triangles(one.diag_embed()) if self._dense(size, block) else one
        return state

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        if not fits(evidence, due, self.needs):
            return
        generator = torch.Generator(block.space.device).manual_seed(evidence.seed)
        h, v = pair(self.fit, evidence, generator)
        H = h.view(block.stack, *block.matrix)
        V = None if v is None else v.view_as(H)
        slopes, seen = state["slopes"], H.flatten(1).any(1)
        start = torch.where(seen & (slopes == 0).all(1), first_scale(H.flatten(1), self.eps).sqrt(), 1.0)
        Q = [_times(start, q) for q in self._factors(state, block)]
        P = [_squared(q) for q in Q]
        X = _from_left(P[1], _from_left(P[0], H).mT).mT  # P h
        X = _times(capped(X.flatten(1)), X)
        for j, (white, noise) in enumerate(((X, V), (X.mT, None if V is None else V.mT))):
            dense, other = Q[j].ndim == 3, P[1 - j].flatten(1)
            T = _gram(white, dense) + _times(self.eps**2 * other.square().sum(1), _squared(P[j]))
            N = _white(white, dense) if noise is None else _gram(noise, dense)
            slope = spectral_norm(T + N, generator) if dense else (T + N).amax(1)
            slope = torch.where(seen, tracked(slopes[:, j], slope), slopes[:, j])
            G = _times(torch.where(seen, self.rate / (2 * slope), 0.0), T - N)
            Q[j] = _congruent(Q[j], G)
            slopes[:, j] = slope
        sizes = [q.flatten(1).abs().amax(1) for q in Q]
        for side, q, size in zip(("left", "right"), Q, sizes, strict=True):
            q = _times((sizes[0] * sizes[1]).sqrt() / size, q)  # their product stays
            state[f"Q_{side}"].copy_(triangles(q) if q.ndim == 3 else q)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        left, right = self._factors(state, block)
        return _kronecker(_squared(left), _squared(right), block)

    def _factors(self, state: State, block: Block) -> list[Tensor]:
        """Q of both sides: matrices (b, d, d), or diagonals (b, d)."""
        held = zip((state["Q_left"], state["Q_right"]), block.matrix, strict=True)
        return [from_triangles(q, size) if self._dense(size, block) else q for q, size in held]

    def _dense(self, size: int, block: Block) -> bool:
        return size <= self.max_size and size**2 <= self.max_skew * math.prod(block.matrix)


@dataclass(frozen=True)
class KroneckerNewton(KroneckerWhitening):
    """The same of pairs h = H v with the Hessian of the mini-batch and white noise v: P is near |H|^-1, whatever the
    signs of the eigenvalues of H. N_j is the Gram matrix of v; a fit takes one product for each shape of parameters."""

    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})


class PSGD(PreconditionedOptimizer):
    """Momentum times a preconditioner that whitens gradients, fitted by small steps without inverses or roots.

    Without `rank` each matrix has a Kronecker factor for each side, dense where it is short, and convolutions are
    matrices with a row for each filter; with it all parameters together have a diagonal and a matrix of that rank.

    What is whitened is the gradient, so that updates have the root mean square of AdamW's and `lr` is of the order of
    the one there, or a third of it; or the "momentum", with updates of root mean square 1: lr is then sqrt((1 -
    momentum) / (1 + momentum)) times that. With "hessian" P is fitted to 1 / |H| by products with the Hessian of the
    mini-batch: lr is 0.01 to 1, and step takes the `objective`. Updates are at most 2 in root mean square for each
    parameter (with `rank` for all of them), and 10 in each entry. Lower `rate` towards 0.01 where P is to be exact
    rather than quick.

    Li 2015 (arXiv:1512.04202); Pooladzandi & Li 2024 (arXiv:2402.04553), with steps in quadratic form.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        fit: Fit = "gradient",
        rank: int | None = None,
        rate: float = 0.1,
        every: int = 33,
        eps: float = 1e-9,
        max_size: float = 8192,
        max_skew: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        newton = fit == "hessian"
        if rank is None:
            rule = (KroneckerNewton if newton else KroneckerWhitening)(rate, eps, every, max_size, max_skew, fit)
        else:
            rule = (LowRankNewton if newton else LowRankWhitening)(rank, rate, eps, every, fit)
        super().__init__(
            params,
            lr,
            rule,
            momentum=Momentum(momentum, corrected=True),
            finish=(ClipNorm(2.0, mean=True), ClipEntries(10.0)),
            weight_decay=weight_decay,
            **options,
        )


def _kronecker(left: Tensor, right: Tensor, block: Block) -> LinearOperator:
    """left_i ⊗ right_i for each matrix of a stack, where factors (b, d) are diagonals."""
    if left.ndim == right.ndim == 2:
        return Diagonal((left.unsqueeze(2) * right.unsqueeze(1)).flatten(), space=block.space, psd=True)
    if left.ndim == right.ndim:
        return Kronecker(left, right, psd=True)
    each = [Kronecker(*factors, psd=True) for factors in zip(left, right, strict=True)]
    size = block.shape.numel()
    places = Places({str(i): slice(i * size, (i + 1) * size) for i in range(len(each))})
    return BlockDiagonal(dict(zip(places, each, strict=True)), places, block.space)


def _times(scales: Float[Tensor, " b"], stack: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (stack.ndim - 1)) * stack


def _from_left(P: Tensor, X: Float[Tensor, "b d e"]) -> Float[Tensor, "b d e"]:
    return P @ X if P.ndim == 3 else P.unsqueeze(2) * X


def _gram(X: Float[Tensor, "b d e"], dense: bool) -> Tensor:
    """X X^T, or its diagonal."""
    return X @ X.mT if dense else X.square().sum(2)


def _white(like: Float[Tensor, "b d e"], dense: bool) -> Tensor:
    """The mean of `_gram` of white noise."""
    ones = like.new_ones(like.shape[1])
    return like.shape[2] * (ones.diag() if dense else ones)


def _squared(Q: Tensor) -> Tensor:
    """Q^2, or its diagonal."""
    return Q @ Q if Q.ndim == 3 else Q.square()


def _congruent(Q: Tensor, A: Tensor) -> Tensor:
    """(I - A) Q (I - A) for symmetric matrices, or for diagonals."""
    if Q.ndim == 2:
        return (1 - A).square() * Q
    half = Q - A @ Q
    return half - half @ A
