"""Shampoo: inverse roots of the second moments of gradients along every axis of a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.operator import LinearOperator
from curvature.linalg.packed import add_gram_, packed_size, unpacked
from curvature.linalg.roots import Roots, basis_roots, eigen_roots, eigenbasis, newton_roots, whole_products
from curvature.linalg.tensors import TensorKronecker, Tiled, Tiling, unfolded
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers, decays
from curvature.optim.evidence import Evidence, debiased
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, Preconditioner, State
from curvature.optim.rules.adam import AdamDiagonal
from curvature.optim.update import Graft, Momentum

Method = Literal["eigh", "newton", "qr"]

LONG = 16  # how many times as long as all others together an axis is that has no factor
FAILURES = 3  # refreshes in a row that a matrix could not be decomposed, after which training has come to an end


class Factor(NamedTuple):
    """A factor for an axis of the tiles of a region: `tiles` matrices for each parameter, with `size` rows."""

    name: str
    region: int
    axis: int
    tiles: int
    size: int


@dataclass(frozen=True)
class KroneckerRoots:
    """S_1^-p ⊗ ... ⊗ S_k^-p times tr(S)^(k p - 1/2), where S_j is the average of G_(j) G_(j)^T over gradients G.

    G_(j) is G as a matrix with a row for every place of axis j. With `exponent` p = 1/(2k), which None stands for, this
    is Shampoo. The trace, the same for all j, keeps updates independent of the scale of gradients for any other p: for
    p = 1/2 this is the inverse root of the covariance of gradients wherever that is a Kronecker product of two. `beta2`
    1 makes S_j a sum.

    A ridge of `eps` times its largest eigenvalue is added to each S_j. Roots are made by eigenvalues ("eigh"), by
    products alone ("newton", for whole 1/p), or of eigenvectors that are followed by a step of orthogonal iteration at
    each refresh ("qr"). An axis longer than `max_dim` is cut into equal pieces, and tiles are treated apart; it has no
    factor if it is the first of an embedding or an output layer, or more than 16 times as long as all others together,
    where those of the pieces would take many numbers for each parameter. Axes after the first are read as one, from the
    last on, while they have at most `merge` places.

    Gupta, Koren & Singer 2018 (arXiv:1802.09568); Anil et al. 2020 (arXiv:2002.09018); Shi et al. 2023
    (arXiv:2309.06497).
    """

    beta2: float = 0.999
    eps: float = 1e-6
    every: int = 10
    exponent: float | None = None
    method: Method = "eigh"
    max_dim: int = 1024
    merge: int = 64
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.eps, every=self.every, max_dim=self.max_dim)
        if not 0 <= self.beta2 <= 1:
            raise ValueError(f"The decay of a second moment is from 0 to 1, which makes a sum, but got {self.beta2}.")
        if self.method not in ("eigh", "newton", "qr"):
            raise ValueError(f'The method is "eigh", "newton" or "qr", but got {self.method!r}.')
        if self.exponent is not None and not 0 < self.exponent <= 1:
            raise ValueError(f"The exponent is above 0 and at most 1, or None for 1/(2k), but got {self.exponent}.")
        if self.method == "newton" and self.exponent and abs(1 / self.exponent - round(1 / self.exponent)) > 1e-9:
            raise ValueError(f'"newton" makes roots of whole numbers 1/p, but got p = {self.exponent}. Take "eigh".')

    def refuses(self, block: Block) -> str | None:
        return block.role if block.role in ("vector", "scalar") else None

    def init(self, block: Block) -> State:
        state = {"missed": torch.zeros(block.stack, dtype=block.dtype, device=block.space.device)}
        for factor in self._factors(block):
            eye = identities(block, factor.tiles, factor.size)
            gram = eye.new_zeros(block.stack, factor.tiles, packed_size(factor.size))
            state |= {f"gram.{factor.name}": gram, f"root.{factor.name}": eye}
            state |= {f"basis.{factor.name}": eye.clone()} if self.method == "qr" else {}
        return state

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        tiling = self._tiling(block)
        pieces = tiling.cut(evidence.grad.view(block.stack, *tiling.shape))
        with whole_products():
            for name, region, axis, _, _ in self._factors(block):
                G = unfolded(pieces[region], axis)
                add_gram_(state[f"gram.{name}"].flatten(0, 1), G, decay=self.beta2, weight=1 - self.beta2 or 1.0)
            if due:
                self._refresh(state, block, evidence)

    def _refresh(self, state: State, block: Block, evidence: Evidence) -> None:
        count = len(self._axes(block))
        p = 1 / (2 * count) if self.exponent is None else self.exponent
        fine = torch.ones(block.stack, dtype=torch.bool, device=block.space.device)
        for factor in self._factors(block):
            S = state[f"gram.{factor.name}"]
            S = S if self.beta2 == 1 else debiased(S, self.beta2, evidence.step)
            S = unpacked(S.flatten(0, 1), factor.size)
            roots, good = self._roots(S, p, state, factor, evidence.step <= 1)
            if self.exponent is not None and factor.axis == self._axes(block)[0]:
                trace = S.diagonal(dim1=1, dim2=2).sum(1)
                roots = roots * torch.where(trace > 0, trace, 1.0)[:, None, None] ** (count * p - 0.5)
            keep_(state[f"root.{factor.name}"].flatten(0, 1), roots, good)
            fine &= good.view(block.stack, -1).all(1)
        count_failures_(state["missed"], fine, block)

    def _roots(self, S: Tensor, p: float, state: State, factor: Factor, first: Bool[Tensor, "b 1"]) -> Roots:
        if self.method == "eigh":
            return eigen_roots(S, p, self.eps)
        if self.method == "newton":
            return newton_roots(S, round(1 / p), self.eps)
        held = state[f"basis.{factor.name}"].flatten(0, 1)
        basis = eigenbasis(S, held, first.expand(-1, factor.tiles).flatten())
        keep_(held, basis.vectors, basis.fine)
        return basis_roots(S, held, p, self.eps)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        tiling = self._tiling(block)
        factors: list[list[Tensor | None]] = [[None] * len(tiling.shape) for _ in tiling.regions]
        for name, region, axis, _, _ in self._factors(block):
            factors[region][axis] = state[f"root.{name}"].flatten(0, 1)
        parts = [
            TensorKronecker(roots, tiling.sizes(runs), psd=True)
            for roots, runs in zip(factors, tiling.regions, strict=True)
        ]
        return parts[0] if tiling.trivial else Tiled(parts, tiling)

    def _axes(self, block: Block) -> list[int]:
        """The axes that have factors."""
        shape = axes(block, self.merge)

        def left_out(axis: int, size: int) -> bool:
            named = axis == 0 and block.role in ("embedding", "head")
            return size > self.max_dim and (named or size**2 > LONG * prod(shape))

        return [axis for axis, size in enumerate(shape) if not left_out(axis, size)]

    def _tiling(self, block: Block) -> Tiling:
        shape = axes(block, self.merge)
        return Tiling(shape, self.max_dim, frozenset(range(len(shape))) - frozenset(self._axes(block)))

    def _factors(self, block: Block) -> list[Factor]:
        regions, own = self._tiling(block).regions, self._axes(block)
        return [
            Factor(f"{i}.{axis}", i, axis, prod([count for _, count, _ in runs]), runs[axis][2])
            for i, runs in enumerate(regions)
            for axis in own
        ]


class Shampoo(PreconditionedOptimizer):
    """Momentum times inverse roots of second moments along every axis of a parameter, as long as a step of Adam is.

    Vectors are left to AdamW. `graft` is the rule that gives the length of the update of each parameter: with that of
    Adam, learning rates and weight decay of AdamW carry over; with None they are those of Shampoo alone. Memory is one
    matrix and a half of d^2 entries for every axis of d places, one more with "qr", beside what Adam has. On a CPU
    "eigh" is the fastest; "newton" takes ten times as long there, and is for devices that are slow at all but products.
    See KroneckerRoots for the rest.

    Gupta, Koren & Singer 2018 (arXiv:1802.09568); Agarwal et al. 2020 (arXiv:2002.11803); Shi et al. 2023
    (arXiv:2309.06497).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        every: int = 10,
        exponent: float | None = None,
        method: Method = "eigh",
        max_dim: int = 1024,
        merge: int = 64,
        graft: Preconditioner | None = AdamDiagonal(),
        **options: Unpack[Options],
    ) -> None:
        betas = decays(betas)
        super().__init__(
            params,
            lr,
            KroneckerRoots(betas[1], eps, every, exponent, method, max_dim, merge),
            momentum=Momentum(betas[0], corrected=True),
            finish=() if graft is None else (Graft(graft),),
            weight_decay=weight_decay,
            **options,
        )


def axes(block: Block, merge: int) -> tuple[int, ...]:
    """The shape as which each parameter of a block is read: without axes of one place, and with those after the first
    merged, from the last on, while they have at most `merge` places. So is a convolution (o, i, 9) with 3 x 3 kernels.
    """
    first, *rest = [size for size in block.shape if size > 1] or [1]
    merged: list[int] = []
    for size in reversed(rest):
        if merged and size * merged[0] <= merge:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return (first, *merged)


def identities(block: Block, tiles: int, size: int) -> Float[Tensor, "b t d d"]:
    """So many identity matrices for each parameter of a block."""
    eye = torch.eye(size, dtype=block.dtype, device=block.space.device)
    return eye.repeat(block.stack, tiles, 1, 1)


def keep_(held: Float[Tensor, "b ..."], new: Float[Tensor, "b ..."], fine: Bool[Tensor, " b"]) -> None:
    """Put what is new in place of what is held, where it is fine."""
    held.copy_(new if bool(fine.all()) else torch.where(fine.view(-1, *(1,) * (held.ndim - 1)), new, held))


def count_failures_(missed: Float[Tensor, " b"], fine: Bool[Tensor, " b"], block: Block) -> None:
    """Count the refreshes in a row of which a parameter had nothing; NonFinite after three."""
    missed.add_(1).mul_(~fine)
    if float(missed.max()) >= FAILURES:
        name = block.names[int(missed.argmax())]
        raise NonFinite(
            f"The second moments of {name} could not be decomposed at {FAILURES} refreshes in a row.",
            "Lower the learning rate, or clip gradients; the parameters are those before this step.",
        )


def check(eps: float, **counts: int) -> None:
    """ValueError for what no rule of this family takes."""
    if not eps >= 0:
        raise ValueError(f"eps is 0 or more, but got {eps}.")
    for name, count in counts.items():
        if count != int(count) or count < 1:
            raise ValueError(f"{name} is a whole number of 1 or more, but got {count}.")
