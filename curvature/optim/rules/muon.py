"""Muon: the momentum of a matrix with all its singular values near one, as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.structured import Kronecker
from curvature.optim.block import Block, Grain
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.update import MatchRMS, MatchSpectral, Momentum

QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0: singular values end between 0.68 and 1.13 (Jordan et al. 2024)
CONVERGENT = (3.0, -3.2, 1.2)  # slower, and 1 in the limit
TINY = 1e-7


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

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block: Block) -> str | None:
        return None if block.role == "matrix" else block.role

    def init(self, block: Block) -> State:
        return {}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        pass

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> Kronecker:
        rows, columns = block.matrix
        M = evidence.momentum.view(-1, rows, columns)
        wide = rows <= columns
        Q = polar_factor(M if wide else M.mT, self.steps, CONVERGENT if self.convergent else QUINTIC)
        one = torch.ones(columns if wide else rows, dtype=Q.dtype, device=Q.device)
        return Kronecker(Q, one, psd=True) if wide else Kronecker(one, Q, psd=True)


def polar_factor(M: Float[Tensor, "b m n"], steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Q (b, m, m) with Q M near the polar factor U V^T of each matrix M, by so many steps; zero where M is."""
    a, b, c = coefficients
    scale = 1 / (torch.linalg.matrix_norm(M) + TINY)[:, None, None]
    S = M @ M.mT * scale**2
    Q = torch.eye(M.shape[-2], dtype=M.dtype, device=M.device) * scale
    for step in range(steps):
        P = b * S + c * (S @ S)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P @ Q
        if step < steps - 1:
            S = P @ S @ P
    return Q


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
        finish = {"rms": (MatchRMS(),), "spectral": (MatchSpectral(),), "none": ()}[match]
        super().__init__(
            params,
            lr,
            NewtonSchulz(steps, convergent),
            momentum=Momentum(momentum, nesterov=nesterov),
            finish=finish,
            weight_decay=weight_decay,
            **options,
        )
