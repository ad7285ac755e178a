"""Second moments in eigenbases that follow the gradients: SOAP, and KL-Shampoo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.packed import add_gram_, diagonals, packed, packed_size, panels, unpacked
from curvature.linalg.roots import eigenbasis, whole_products
from curvature.linalg.tensors import TensorSpectral, contracted, outer, unfolded
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers, decays
from curvature.optim.evidence import Evidence, debiased
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.rules.shampoo import axes, check, count_failures_, identities, keep_
from curvature.optim.update import Momentum


@dataclass(frozen=True)
class AdamInEigenbasis:
    """Q diag(1 / (sqrt(v) + eps)) Q^T with Q = Q_1 ⊗ ... ⊗ Q_k, where Q_j are the eigenvectors of S_j, the average of
    G_(j) G_(j)^T over gradients G, and v is the average of the squares of Q^T G, divided by 1 - beta2^t.

    Eigenvectors are those of `eigh` at the first step, and go a step of orthogonal iteration at each refresh. Before it
    the columns of Q_j are sorted by q.S q, and v along with them; nothing else is done to v when the bases turn. With
    `refresh` "before" they are made of gradients up to this one, with "after" of those before it, as by the authors.
    These leave the first gradient out of training and divide v only after eps was added, of which neither is done here.

    Axes longer than `max_dim` are not rotated, nor with `one_sided` the longest one. Axes after the first are read as
    one, from the last on, while they have at most `merge` places.

    Vyas et al. 2024 (arXiv:2409.11321).
    """

    beta2: float = 0.95
    eps: float = 1e-8
    every: int = 10
    max_dim: int = 10_000
    merge: int = 64
    one_sided: bool = False
    refresh: Literal["before", "after"] = "before"
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.eps, every=self.every, max_dim=self.max_dim)
        _check_decay(self.beta2)
        if self.refresh not in ("before", "after"):
            raise ValueError(f'The refresh is "before" or "after" the step, but got {self.refresh!r}.')

    def refuses(self, block: Block) -> str | None:
        return _refused(block, self.max_dim, self.merge)

    def init(self, block: Block) -> State:
        state = {"square": block.zeros(), "missed": _none_missed(block)}
        for axis, size in self._rotated(block).items():
            basis = identities(block, 1, size).squeeze(1)
            state |= {f"gram.{axis}": basis.new_zeros(block.stack, packed_size(size)), f"basis.{axis}": basis}
        return state

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        shape = axes(block, self.merge)
        G = evidence.grad.view(block.stack, *shape)
        first = (evidence.step <= 1).view(-1, 1, 1) if due else None
        with whole_products():
            fresh = {}
            for axis, size in self._rotated(block).items():
                X, S = unfolded(G, axis), state[f"gram.{axis}"]
                if first is not None and self.refresh == "after":
                    fresh[axis] = torch.where(first, X @ X.mT, unpacked(S, size))
                add_gram_(S, X, decay=self.beta2, weight=1 - self.beta2)
                if due and self.refresh == "before":
                    fresh[axis] = unpacked(S, size)
            if first is not None:
                self._turn(state, block, fresh, first.flatten())
            rotated = contracted(evidence.grad.view(block.stack, -1, 1), self._bases(state, block), shape)
        state["square"].view(rotated.shape).mul_(self.beta2).addcmul_(rotated, rotated, value=1 - self.beta2)

    def _turn(self, state: State, block: Block, moments: dict[int, Tensor], first: Tensor) -> None:
        """Refresh the bases."""
        square = state["square"].view(block.stack, *axes(block, self.merge))
        fine = torch.ones_like(first)
        for axis, S in moments.items():
            held = state[f"basis.{axis}"]
            basis = eigenbasis(S, held, first)
            keep_(held, basis.vectors, basis.fine)
            order = basis.order.view(block.stack, *(1,) * axis, -1, *(1,) * (square.ndim - axis - 2))
            keep_(square, square.gather(axis + 1, order.expand_as(square)), basis.fine)
            fine &= basis.fine
        count_failures_(state["missed"], fine, block)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> TensorSpectral:
        square = debiased(state["square"], self.beta2, evidence.step)
        values = square.sqrt_().add_(self.eps).reciprocal_().view(block.stack, *axes(block, self.merge))
        return TensorSpectral(values, self._bases(state, block), psd=True)

    def _bases(self, state: State, block: Block) -> list[Tensor | None]:
        return [state.get(f"basis.{axis}") for axis in range(len(axes(block, self.merge)))]

    def _rotated(self, block: Block) -> dict[int, int]:
        return rotated_axes(axes(block, self.merge), self.max_dim, self.one_sided)


@dataclass(frozen=True)
class KroneckerCovariance:
    """(S_1 ⊗ ... ⊗ S_k)^(-1/2), where the Kronecker product is near the covariance of gradients G in the sense of
    KL(N(0, E g g^T) | N(0, S_1 ⊗ ... ⊗ S_k)).

    That is least where S_j = E W_(j) W_(j)^T d_j / n for G of n entries whitened by the others: W is G times
    S_i^(-1/2) along every axis i but j. S_j is the average of these by the S_i before the step. It begins with the
    first gradient that is not zero, as the multiple of the identity for which the product has the mean of its squares;
    so the scale of gradients does not matter at any step.

    Kept are the bases Q_j and Q_j^T S_j Q_j; Q_j goes a step of orthogonal iteration at each refresh, from eigenvectors
    at the first. The diagonal of Q_j^T S_j Q_j stands for eigenvalues, those below `eps` times the largest for that.
    Axes longer than `max_dim` are left alone, and with `one_sided` the longest one. Axes after the first are read as
    one, from the last on, while they have at most `merge` places.

    Lin et al. 2025 (arXiv:2509.03378).
    """

    beta2: float = 0.95
    eps: float = 1e-6
    every: int = 10
    max_dim: int = 10_000
    merge: int = 64
    one_sided: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})
    grain: ClassVar[Grain] = "shape"

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.eps, every=self.every, max_dim=self.max_dim)
        _check_decay(self.beta2)

    def refuses(self, block: Block) -> str | None:
        return _refused(block, self.max_dim, self.merge)

    def init(self, block: Block) -> State:
        state = {"missed": _none_missed(block)}
        for axis, size in self._factored(block).items():
            basis = identities(block, 1, size).squeeze(1)
            state |= {f"covariance.{axis}": basis.new_zeros(block.stack, packed_size(size)), f"basis.{axis}": basis}
        return state

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        shape, factored = axes(block, self.merge), self._factored(block)
        n = prod(shape)
        scale = (torch.linalg.vector_norm(evidence.grad.view(block.stack, n), dim=1) / n**0.5) ** (2 / len(factored))
        for axis, size in factored.items():
            S = state[f"covariance.{axis}"]
            first = torch.where((diagonals(S, size) == 0).all(1), scale, 0).unsqueeze(1)
            for _, panel in panels(S, size):
                panel.diagonal(dim1=1, dim2=2).add_(first)
        with whole_products():
            rotated = contracted(evidence.grad.view(block.stack, n, 1), self._bases(state, block), shape)
            scales = self._scales(state, block)
            white = rotated.view(block.stack, *shape) * outer(scales, shape)
            for axis, size in factored.items():
                scaled = scales[axis]
                assert scaled is not None
                X = unfolded(white, axis) / scaled.unsqueeze(-1)
                add_gram_(state[f"covariance.{axis}"], X, decay=self.beta2, weight=(1 - self.beta2) * size / n)
            if due:
                self._turn(state, block, (evidence.step <= 1).flatten())

    def _turn(self, state: State, block: Block, first: Tensor) -> None:
        """Refresh the bases, and take the covariances from the old ones to the new."""
        fine = torch.ones_like(first)
        for axis, size in self._factored(block).items():
            inside, held = state[f"covariance.{axis}"], state[f"basis.{axis}"]
            S = held @ unpacked(inside, size) @ held.mT
            basis = eigenbasis(S, held, first)
            keep_(inside, packed(basis.vectors.mT @ S @ basis.vectors), basis.fine)
            keep_(held, basis.vectors, basis.fine)
            fine &= basis.fine
        count_failures_(state["missed"], fine, block)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> TensorSpectral:
        values = outer(self._scales(state, block), axes(block, self.merge))
        return TensorSpectral(values, self._bases(state, block), psd=True)

    def _scales(self, state: State, block: Block) -> list[Float[Tensor, "b d"] | None]:
        """The eigenvalues of S_j^(-1/2) for each axis; ones while there was no gradient."""
        scales: list[Tensor | None] = [None] * len(axes(block, self.merge))
        for axis, size in self._factored(block).items():
            values = diagonals(state[f"covariance.{axis}"], size)
            top = values.amax(1, keepdim=True)
            scales[axis] = torch.where(top > 0, values.maximum(self.eps * top), 1.0).rsqrt()
        return scales

    def _bases(self, state: State, block: Block) -> list[Tensor | None]:
        return [state.get(f"basis.{axis}") for axis in range(len(axes(block, self.merge)))]

    def _factored(self, block: Block) -> dict[int, int]:
        return rotated_axes(axes(block, self.merge), self.max_dim, self.one_sided)


class SOAP(PreconditionedOptimizer):
    """Adam in the eigenbases of Shampoo, in which second moments are nearly those of independent numbers.

    Updates have the size of Adam's: learning rates of AdamW carry over. Vectors are left to AdamW. `every` is the steps
    between refreshes of the bases, each of about 10 d^3 operations for every axis of d places, which also takes memory
    for two matrices of d^2 entries; with `one_sided` matrices have them for the shorter side alone. See
    AdamInEigenbasis for the rest.

    Vyas et al. 2024 (arXiv:2409.11321).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        every: int = 10,
        max_dim: int = 10_000,
        merge: int = 64,
        one_sided: bool = False,
        refresh: Literal["before", "after"] = "before",
        **options: Unpack[Options],
    ) -> None:
        betas = decays(betas)
        rule = AdamInEigenbasis(betas[1], eps, every, max_dim, merge, one_sided, refresh)
        momentum = Momentum(betas[0], corrected=True)  # of gradients: turned now or at each refresh, it is the same
        super().__init__(params, lr, rule, momentum=momentum, weight_decay=weight_decay, **options)


class KLShampoo(PreconditionedOptimizer):
    """Momentum whitened by the Kronecker product that is nearest to the covariance of gradients, in place of Adam's
    second moments.

    Updates have the size of Adam's: learning rates of AdamW carry over. Vectors are left to AdamW. Memory is that of
    SOAP without a number for each parameter. See KroneckerCovariance for the rest.

    Lin et al. 2025 (arXiv:2509.03378).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        every: int = 10,
        max_dim: int = 10_000,
        merge: int = 64,
        one_sided: bool = False,
        **options: Unpack[Options],
    ) -> None:
        betas = decays(betas)
        rule = KroneckerCovariance(betas[1], eps, every, max_dim, merge, one_sided)
        momentum = Momentum(betas[0], corrected=True)
        super().__init__(params, lr, rule, momentum=momentum, weight_decay=weight_decay, **options)


def rotated_axes(shape: Sequence[int], max_dim: int, one_sided: bool) -> dict[int, int]:
    """The axes that have bases, and their lengths: those of at most `max_dim`, and if `one_sided` not the longest."""
    alone = max(range(len(shape)), key=lambda axis: shape[axis]) if one_sided else None
    return {axis: size for axis, size in enumerate(shape) if size <= max_dim and axis != alone}


def _refused(block: Block, max_dim: int, merge: int) -> str | None:
    if block.role in ("vector", "scalar"):
        return block.role
    return f"axes beyond {max_dim}" if min(axes(block, merge)) > max_dim else None


def _none_missed(block: Block) -> Tensor:
    return torch.zeros(block.stack, dtype=block.dtype, device=block.space.device)


def _check_decay(beta2: float) -> None:
    if not 0 <= beta2 < 1:
        raise ValueError(f"The decay of a second moment is at least 0 and less than 1, but got {beta2}.")
