"""Muon: the momentum of a matrix with all its singular values near one, as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.tensors import TensorKronecker
from curvature.optim.block import Block, Grain
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.update import MatchRMS, MatchSpectral, Momentum

QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0: singular values end between 0.68 and 1.13 (Jordan et al. 2024)
CONVERGENT = (3.0, -3.2, 1.2)  # slower, and 1 in the limit
TINY = 1e-7
LARGE = 256  # from here on half a product is faster than the whole, on a CPU by a quarter


@dataclass(frozen=True)
class NewtonSchulz:
    """Q ⊗ I (or I ⊗ Q, where a matrix is tall) with Q M ~ U V^T for the singular value decomposition of the momentum M.

    Every step of the iteration multiplies X by a I + b S + c S^2 with S = X X^T, a polynomial in M M^T: so Q is made of
    the smaller Gram matrix alone, in float32 at least. It is the matrix of this step's momentum only.
    """

    steps: int = 5
    convergent: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise ValueError(f"steps is 1 or more, but got {self.steps}.")

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block: Block) -> str | None:
        return None if block.role == "matrix" else block.role

    def init(self, block: Block) -> State:
        return {}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        pass

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> TensorKronecker:
        rows, columns = block.matrix
        M = evidence.momentum.view(-1, rows, columns)
        wide = rows <= columns
        Q = polar_factor(M if wide else M.mT, self.steps, CONVERGENT if self.convergent else QUINTIC)
        return TensorKronecker((Q, None) if wide else (None, Q), block.matrix, psd=True)


def polar_factor(
    M: Float[Tensor, "b m n"], steps: int, coefficients: tuple[float, float, float]
) -> Float[Tensor, "b m m"]:
    """Q with Q M near the polar factor U V^T of each matrix M, by so many steps; zero where M is."""
    a, b, c = coefficients
    S = symmetric_product(M, M.mT)
    scale = 1 / (S.diagonal(dim1=1, dim2=2).sum(1).sqrt() + TINY)[:, None, None]
    S *= scale**2
    Q = scale * torch.eye(S.shape[1], dtype=S.dtype, device=S.device)
    for step in range(steps):
        N = symmetric_product(S, S, c, S, b)
        Q = a * Q + N * scale if step == 0 else symmetric_product(N, Q, 1.0, Q, a)
        if step < steps - 1:
            T = symmetric_product(N, S, 1.0, S, a)
            S = symmetric_product(N, T, 1.0, T, a)
    return Q


def symmetric_product(
    A: Float[Tensor, "b m k"],
    B: Float[Tensor, "b k m"],
    times: float = 1.0,
    C: Float[Tensor, "b m m"] | None = None,
    weight: float = 0.0,
) -> Float[Tensor, "b m m"]:
    """times A B + weight C where that is symmetric: of large ones the lower half is computed, in four blocks of
    rows."""
    m = A.shape[1]
    if m < LARGE:
        return torch.bmm(A, B) if C is None else torch.baddbmm(C, A, B, beta=weight, alpha=times)
    total = A.new_empty(len(A), m, m) if C is None else C.clone()
    for start in range(0, m, -(-m // 4)):
        rows = slice(start, start + -(-m // 4))
        below = total[:, rows, : rows.stop]
        below.baddbmm_(A[:, rows], B[:, :, : rows.stop], beta=weight, alpha=times)
        total[:, :start, rows] = total[:, rows, :start].mT
    return total


class Muon(PreconditionedOptimizer):
    """Orthogonalised momentum for hidden matrices, AdamW for all else: embeddings, output layers, vectors.

    With `match="rms"` an update has the root mean square of AdamW's, so that its learning rate and decay carry over;
    with "spectral" its largest singular value is sqrt(rows / columns), so that they carry over between widths; with
    "none" it is 1. Convolutions are matrices with a row for each filter.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv:2502.16982).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        steps: int = 5,
        convergent: bool = False,
        match: Literal["rms", "spectral", "none"] = "rms",
        **options: Unpack[Options],
    ) -> None:
        finish = {"rms": (MatchRMS(),), "spectral": (MatchSpectral(),), "none": ()}
        if match not in finish:
            raise ValueError(f"match is rms, spectral or none, but got {match}.")
        super().__init__(
            params,
            lr,
            NewtonSchulz(steps, convergent),
            momentum=Momentum(momentum, nesterov=nesterov),
            finish=finish[match],
            weight_decay=weight_decay,
            **options,
        )
