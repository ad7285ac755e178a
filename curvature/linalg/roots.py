"""Inverse roots and eigenbases of stacks of symmetric positive semidefinite matrices, kept up from step to step.

It is told of each matrix whether its answer is `fine`. One that is not finite, or whose decomposition fails in its own
precision and in float64, is not, and does no harm to the others: who holds an older answer keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CONVERGED = {torch.float32: 1e-6, torch.float64: 1e-13}  # largest entry of A X^r - I at which to stop
USABLE = 0.1  # and beyond which not to use X (Anil et al. 2020)
NEWTON, SQUARINGS = 100, 10  # steps at most, and to find the largest eigenvalue


class Eigen(NamedTuple):
    """Eigenvalues, ascending, and eigenvectors, as columns."""

    values: Float[Tensor, "b d"]
    vectors: Float[Tensor, "b d d"]
    fine: Bool[Tensor, " b"]


class Roots(NamedTuple):
    """Inverse roots."""

    roots: Float[Tensor, "b d d"]
    fine: Bool[Tensor, " b"]


class Basis(NamedTuple):
    """Orthogonal matrices; column i goes on from column `order[i]` of the one before."""

    vectors: Float[Tensor, "b d d"]
    order: Int[Tensor, "b d"]
    fine: Bool[Tensor, " b"]


@contextmanager
def whole_products() -> Iterator[None]:
    """Inside, products of float32 matrices are not made of numbers rounded to TF32 or bfloat16."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def eigen(S: Float[Tensor, "b d d"]) -> Eigen:
    """The eigendecompositions: in the dtype of S, all in float64 where one fails, then one by one on a CPU."""
    S, fine = _finite(S)
    for dtype in (S.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(S.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        return Eigen(values.to(S.dtype), vectors.to(S.dtype), fine & values.isfinite().all(-1))
    values, vectors = S.new_zeros(S.shape[:2]), torch.zeros_like(S)
    for i, matrix in enumerate(S.double().cpu()):
        try:
            values[i], vectors[i] = (part.to(S) for part in torch.linalg.eigh(matrix))
        except torch.linalg.LinAlgError:
            fine[i] = False
    return Eigen(values, vectors, fine)


def eigenbasis(S: Float[Tensor, "b d d"], before: Float[Tensor, "b d d"], fresh: Bool[Tensor, " b"]) -> Basis:
    """Orthogonal Q near the eigenvectors of S, the largest first: by a step of orthogonal iteration from the basis
    `before`, whose columns are first sorted by q.S q; by `eigen` where there is none yet, of those that are `fresh`.

    Q R = S Q_before is one step of the QR algorithm on Q_before^T S Q_before. Golub & Van Loan 2013, section 8.2.
    """
    S, fine = _finite(S)
    product = S @ before
    order = (before * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    vectors = torch.linalg.qr(product.gather(2, order.unsqueeze(1).expand_as(product))).Q
    if bool(fresh.any()):
        first = eigen(S[fresh])
        vectors[fresh], fine[fresh] = first.vectors.flip(-1), fine[fresh] & first.fine
        order[fresh] = torch.arange(S.shape[-1], device=S.device)
    return Basis(vectors, order, fine & vectors.isfinite().flatten(1).all(1))


def eigen_roots(S: Float[Tensor, "b d d"], exponent: float, ridge: float) -> Roots:
    """(S + ridge |S| I)^-exponent by the eigenvalues of S, where |S| is the largest; of S = 0 the identity.

    float32 can honour a ridge of 1e-6 or more: see `newton_roots`.
    """
    values, Q, fine = eigen(S)
    return Roots((Q * raised(values, exponent, ridge).unsqueeze(-2)) @ Q.mT, fine)


def raised(values: Float[Tensor, "b d"], exponent: float, ridge: float) -> Float[Tensor, "b d"]:
    """(v + ridge max v)^-exponent for eigenvalues v, negative ones taken for zero; 1 where all are zero."""
    values = values.clamp(min=0)
    top = values.amax(-1, keepdim=True)
    return torch.where(top > 0, values + ridge * top, 1.0) ** -exponent


def newton_roots(S: Float[Tensor, "b d d"], root: int, ridge: float) -> Roots:
    """(S + ridge |S| I)^(-1/root) by products of matrices alone; what does not converge is tried again in float64.

    The coupled iteration X <- X T, M <- T^r M with T = ((r + 1) I - M) / r, where M = A X^r goes to I. At a condition
    of 1e6 float32 leaves an error of 1e-3, that of eigenvalues 3e-2 (both relative, r = 4). Guo & Higham 2006 (SIAM J.
    Matrix Anal. Appl. 28), section 3; Anil et al. 2020 (arXiv:2002.09018), appendix.
    """
    S, fine = _finite(S)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    top = _largest(S)[:, None, None]
    A = torch.where(top > 0, S + ridge * top * eye, eye)
    z = (1 + root) / (2 * torch.linalg.matrix_norm(A))[:, None, None]
    X, M = z ** (1 / root) * eye, z * A
    error, moving = (M - eye).abs().amax((-2, -1)), torch.ones_like(fine)
    for _ in range(NEWTON):
        T = ((root + 1) * eye - M) / root
        M = torch.linalg.matrix_power(T, root) @ M
        new = (M - eye).abs().amax((-2, -1))
        grown = new > torch.where(error > USABLE, torch.inf, 1.2 * error)  # by rounding; far off, entries rise and fall
        moving = moving & (error > CONVERGED[S.dtype]) & ~grown & new.isfinite()
        if not bool(moving.any()):
            break
        X, error = torch.where(moving[:, None, None], X @ T, X), torch.where(moving, new, error)
    good = fine & (error <= USABLE)
    again = fine & ~good
    if S.dtype != torch.float64 and bool(again.any()):
        second = newton_roots(S[again].double(), root, ridge)
        X[again], good[again] = second.roots.to(S.dtype), second.fine
    return Roots((X + X.mT) / 2, good)


def basis_roots(S: Float[Tensor, "b d d"], Q: Float[Tensor, "b d d"], exponent: float, ridge: float) -> Roots:
    """Q diag(v + ridge max v)^-exponent Q^T with v the diagonal of Q^T S Q: the root, where Q is the eigenbasis."""
    S, fine = _finite(S)
    values = raised((Q * (S @ Q)).sum(-2), exponent, ridge)
    return Roots((Q * values.unsqueeze(-2)) @ Q.mT, fine)


def _finite(S: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices, zero where one is not finite, which eigh would call ill-conditioned; and where they are finite."""
    entries = S.flatten(1)
    fine = entries.amax(1).isfinite() & entries.amin(1).isfinite()
    return S if bool(fine.all()) else torch.where(fine[:, None, None], S, 0), fine


def _largest(S: Float[Tensor, "b d d"]) -> Float[Tensor, " b"]:
    """The largest eigenvalue, from below, by x.S x of a column x of S^1024."""
    power, tiny = S, torch.finfo(S.dtype).tiny
    for _ in range(SQUARINGS):
        power = power / torch.linalg.matrix_norm(power, keepdim=True).clamp(min=tiny)
        power = power @ power
    place = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    x = power.gather(2, place[:, None, None].expand(-1, S.shape[-1], 1))
    return ((x * (S @ x)).sum((-2, -1)) / x.square().sum((-2, -1)).clamp(min=tiny)).clamp(min=0)
