"""PSGD with a matrix of low rank for all parameters together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from curvature.linalg.congruence import Congruence
from curvature.linalg.operator import LinearOperator
from curvature.linalg.outer import Outer
from curvature.linalg.structured import Diagonal
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence
from curvature.optim.preconditioner import Need, State
from curvature.optim.rules.psgd_fit import Fit, capped, check, first_scale, fits, noise_like, pair, tracked

START = 0.1  # |U|^2 and |V|^2


@dataclass(frozen=True)
class LowRankWhitening:
    """D (I + V U^T) (I + U V^T) D for all parameters at once: Q^T Q with Q = (I + U V^T) D, D diagonal, U and V (n, r).

    With white noise v, a = Q h and b = Q^-T v, a fit makes d <- d - rate / L (h * P h - v * P^-1 v) * d, and by chance
    U <- U - rate / L (a a^T - b b^T) V (I + V^T U) or V <- V - rate / L (I + V U^T) (a a^T - b b^T) U, where L bounds
    what it divides. `eps`, `every` and `fit` mean what they do for KroneckerWhitening.
    """

    rank: int = 10
    rate: float = 0.1
    eps: float = 1e-9
    every: int = 33
    fit: Fit = "gradient"
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "model"

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.fit, self.rate, self.eps, self.every)
        if not self.rank >= 1:
            raise ValueError(f"rank is 1 or more, or None for Kronecker factors, but got {self.rank}.")

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        space = block.space
        U, V = space.draw(2 * self.rank, seed=0, kind="normal").chunk(2)  # one start for all seeds, as rows
        factors = START**0.5 * torch.cat([U / U.norm(), V / V.norm()])
        return {
            "diagonal": block.zeros().fill_(1),
            "factors": factors,
            "block.gram": space.inner(factors, factors),
            "block.slopes": torch.zeros(3, dtype=block.dtype, device=space.device),
        }

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        if not fits(evidence, due, self.needs):
            return
        generator = torch.Generator(block.space.device).manual_seed(evidence.seed)
        h, v = pair(self.fit, evidence, generator)
        d, slopes, gram = state["diagonal"], state["block.slopes"], state["block.gram"].to(block.dtype)
        seen = h.any()
        d *= torch.where(seen & (slopes == 0).all(), first_scale(h, self.eps), 1.0)
        h = h + (self.eps + block.space.eps * h.abs()) * noise_like(h, generator)
        v = noise_like(h, generator) if v is None else v
        U, V = state["factors"].chunk(2)
        one = _one(gram) + gram[: self.rank, self.rank :]  # I + U^T V
        a, b = d * h, v / d
        a = a + (V @ a) @ U
        a, h = capped(a) * a, capped(a) * h
        b = b - torch.linalg.solve_ex(one, U @ b).result @ V
        hPh = h * d * (a + (U @ a) @ V)
        vPv = v / d * (b - torch.linalg.solve_ex(one.mT, V @ b).result @ U)  # with P^-1
        which, ends = 1 + evidence.seed % 2, (a, b)
        if which == 1:
            moves, other, inside = U, V, [V @ x for x in ends]
            outside = [(one @ c, x) for c, x in zip(inside, ends, strict=True)]
        else:
            moves, other, inside = V, U, [U @ x for x in ends]
            outside = [(c, x + c @ V) for c, x in zip(inside, ends, strict=True)]
        lengths = torch.stack([x.norm() * (c @ other).norm() for c, x in zip(inside, ends, strict=True)])
        slope = torch.stack([hPh.abs().max() + vPv.abs().max(), lengths.sum()])
        bounds = torch.where(seen, tracked(slopes[[0, which]], slope), slopes[[0, which]])
        gains = torch.where(seen, self.rate / bounds, 0.0)
        slopes[[0, which]] = bounds
        d -= gains[0] * (hPh - vPv) * d
        for sign, (c, x) in zip((-1, 1), outside, strict=True):
            moves.addr_(gains[1] * c, x, alpha=sign)
        gram = block.space.roughly(state["factors"], state["factors"])
        squares = gram.diagonal().view(2, -1).sum(1)
        balance = (squares.prod().sqrt() / squares).sqrt().repeat_interleave(self.rank)  # |U| and |V| become the same
        state["factors"].mul_(balance.to(block.dtype)[:, None])
        state["block.gram"].copy_(balance[:, None] * gram * balance)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        gram = state["block.gram"]
        one = _one(gram)
        core = torch.cat([torch.cat([0 * one, one], 1), torch.cat([one, gram[: self.rank, : self.rank]], 1)])
        inner = Outer(state["factors"], core, shift=1.0, gram=gram, psd=True)  # (I + V U^T) (I + U V^T)
        return Congruence(Diagonal(state["diagonal"], psd=True), inner)


@dataclass(frozen=True)
class LowRankNewton(LowRankWhitening):
    """The same of pairs h = H v, as in KroneckerNewton: a product for each fit."""

    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})


def _one(gram: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(gram) // 2, dtype=gram.dtype, device=gram.device)
