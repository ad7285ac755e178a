"""Muon: the momentum of a matrix with all its singular values near one, as a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import Space
from curvature.linalg.tensors import TensorKronecker
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.update import MatchRMS, MatchSpectral, Momentum

QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0: singular values end between 0.68 and 1.13 (Jordan et al. 2024)
CONVERGENT = (3.0, -3.2, 1.2)  # slower, and 1 in the limit
DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # float16 holds no small gradients
TINY = 1e-7
STEADY = 3  # steps that bfloat16 carries, whose unit is 1/256: Q grows by 3.4 at each, where M has little
NARROW = 128  # below this products in bfloat16 are no faster, and there are more of them
LARGE = 256  # from here on half a product is faster than the whole, on a CPU by a quarter


@dataclass(frozen=True)
class NewtonSchulz:
    """Q ⊗ I (or I ⊗ Q, where a matrix is tall) with Q M ~ U V^T for the singular value decomposition of the momentum M.

    Every step of the iteration multiplies X by a I + b S + c S^2 with S = X X^T, a polynomial in M M^T: so Q is made of
    the smaller Gram matrix alone. It is the matrix of this step's momentum only.

    In bfloat16, which `dtype` may ask for, Q M is wrong by the unit of that precision times how far Q has grown: there
    Q is made in stages of three steps, each from the Gram matrix of what the one before has made of M.
    """

    steps: int = 5
    convergent: bool = False
    dtype: torch.dtype | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.steps >= 1:
            raise ValueError(f"steps is 1 or more, but got {self.steps}.")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is {', '.join(map(str, DTYPES))} or None, but got {self.dtype}.")

    @property
    def every(self) -> int:
        return 1

    def refuses(self, block: Block) -> str | None:
        return None if block.role == "matrix" else block.role

    def init(self, block: Block) -> State:
        return {}

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        pass

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        rows, columns = block.matrix
        M = evidence.momentum.view(-1, rows, columns)
        wide = rows <= columns
        narrow = self.dtype == torch.bfloat16 and min(rows, columns) < NARROW
        X = (M if wide else M.mT).to(M.dtype if narrow else self.dtype or M.dtype)
        left, stages = self.steps, []
        while left:
            steps = min(left, STEADY) if X.dtype == torch.bfloat16 else left
            Q = polar_factor(X, steps, CONVERGENT if self.convergent else QUINTIC, first=not stages)
            stages.append(TensorKronecker((Q, None) if wide else (None, Q), block.matrix, psd=True))
            left -= steps
            X = torch.bmm(Q, X) if left else X
        return Stages(stages, block.space) if X.dtype != M.dtype or len(stages) > 1 else stages[0]


class Stages(LinearOperator):
    """Symmetric operators that commute but for rounding, one after another, in their precision; vectors have that of
    `space`."""

    symmetric = psd = True

    def __init__(self, stages: Sequence[LinearOperator], space: Space) -> None:
        self.domain = self.codomain = space
        self.stages = tuple(stages)
        self.source = {"operator": "Stages"}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        X = rows.to(self.stages[0].dtype)
        for stage in self.stages:
            X = stage.apply(X)
        return X.to(rows.dtype)


def polar_factor(
    M: Float[Tensor, "b m n"], steps: int, coefficients: tuple[float, float, float], *, first: bool = True
) -> Float[Tensor, "b m m"]:
    """Q with Q M nearer to the polar factor U V^T of each matrix M by so many steps; zero where M is. At the `first`
    of them M may be of any length."""
    a, b, c = coefficients
    scale = 1 / (M.norm(dim=(1, 2), keepdim=True) + TINY) if first else None
    X = M if scale is None else M * scale
    S = symmetric_product(X, X.mT)
    N = symmetric_product(S, S, c, S, b)
    Q = N.clone()
    Q.diagonal(dim1=1, dim2=2).add_(a)
    for _ in range(steps - 1):
        T = symmetric_product(N, S, 1.0, S, a)
        S = symmetric_product(N, T, 1.0, T, a)
        N = symmetric_product(S, S, c, S, b)
        Q = symmetric_product(N, Q, 1.0, Q, a)
    return Q if scale is None else Q * scale


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
    "none" it is 1. Convolutions are matrices with a row for each filter. `dtype` is that of the iteration, float32 or
    better where it is not given: torch.bfloat16, which the authors take, is up to twice as fast on a processor that has
    it, and many times on a GPU, for matrices of 128 rows and columns or more; smaller ones are left in float32.

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
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        finish = {"rms": (MatchRMS(),), "spectral": (MatchSpectral(),), "none": ()}
        if match not in finish:
            raise ValueError(f"match is rms, spectral or none, but got {match}.")
        super().__init__(
            params,
            lr,
            NewtonSchulz(steps, convergent, dtype),
            momentum=Momentum(momentum, nesterov=nesterov),
            finish=finish[match],
            weight_decay=weight_decay,
            **options,
        )
