"""Psd matrices by what a few vectors see of them: random ones, or the directions of a solve."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NotConverged
from curvature.linalg.deflation import beyond
from curvature.linalg.krylov import ROUNDED
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.outer import Outer
from curvature.linalg.space import Space
from curvature.linalg.structured import LowRank
from curvature.progress import Run

FIRST = 8  # the rank that is tried first, and then twice as many
ENOUGH = 10.0  # times the damping: below that the condition number of the preconditioned matrix is about eleven


def nystrom(
    A: LinearOperator,
    rank: int | None = None,
    *,
    damping: float = 0.0,
    max_rank: int = 512,
    seed: int = 0,
    run: Run | None = None,
) -> LowRank:
    """Nystrom's approximation of psd A from products with `rank` random vectors: no eigenvalue is above that of A.

    Without a `rank`, twice as many until the smallest eigenvalue found is at most ten times `damping`. The inverse is
    a preconditioner of `solve` then, `inverse(nystrom(A, damping=mu), damping=mu)`: with 2 ceil(1.5 d) + 1 vectors,
    where d = tr A (A + mu I)^-1 is the effective dimension, the expected condition number is at most 28. It is worth
    its products where A has a decaying spectrum, and for several right-hand sides. Raises NotConverged, which holds
    what there is as `solution`, where `max_rank` is not enough.

    Frangella, Tropp & Udell 2023 (arXiv:2110.02820), algorithm 2.1.

    >>> from curvature.linalg.structured import Diagonal
    >>> round(float(nystrom(Diagonal(torch.tensor([4.0, 2.0, 0.0])), 3).values.sum()), 4)
    6.0
    """
    A = as_operator(A)
    options = {"rank": rank, "damping": damping, "max_rank": max_rank}
    measurement = Measurement(A, "nystrom", options=options, seed=seed, run=run)
    if not A.psd:
        raise ValueError(f"nystrom is for positive semidefinite matrices, but {A!r} is none. Take the GGN.")
    if rank is None and damping <= 0:
        raise ValueError("nystrom needs a rank, or the damping of the system it is for.")
    if rank is not None and not 1 <= rank <= A.shape[0]:
        raise ValueError(f"The rank lies between 1 and the size of A, {A.shape[0]}, but got {rank}.")
    if max_rank < 1:
        raise ValueError(f"max_rank is 1 at least, but got {max_rank}.")
    space, most = A.domain, min(A.shape[0], rank or max_rank)
    draws, wanted = space.draws(seed=seed, kind="normal"), rank or min(FIRST, most)
    sketch = images = space.empty
    while True:
        drawn = torch.stack([next(draws) for _ in range(wanted - len(sketch))])
        fresh = beyond(space, drawn, sketch)
        sketch, images = torch.cat([sketch, fresh]), torch.cat([images, measurement.apply(fresh)])
        values, vectors = _approximated(A, sketch, images)
        source = {"operator": "nystrom", "rank": len(values), "seed": seed, "of": measurement.described}
        found = LowRank(values, vectors, source=source)
        least = float(values[-1]) if 0 < len(values) == len(sketch) else 0.0
        if rank is not None or least <= ENOUGH * damping or wanted == A.shape[0]:
            return found
        if wanted == most:
            raise NotConverged(
                f"The smallest of {len(sketch)} eigenvalues is {least:.3g}, more than {ENOUGH:g} times the damping.",
                "Raise max_rank or the damping; as a preconditioner it helps even so (`solution` on this error).",
                solution=found,
            )
        wanted = min(2 * wanted, most)


def _approximated(
    A: LinearOperator, sketch: Float[Tensor, "r n"], images: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Eigenvalues, descending, and eigenvectors of images^T (sketch A sketch^T)^-1 images."""
    space = A.domain
    scale = float(space.norms(images).square().sum()) ** 0.5
    if scale == 0:
        return images.new_zeros(0, dtype=torch.float64), images[:0]
    core = space.inner(sketch, images)
    gram, core, shift = space.inner(sketch, sketch), (core + core.T) / 2, space.eps * scale
    while True:  # the shift keeps the factorisation from breaking down; noise in the products may take more of it
        factor, failed = torch.linalg.cholesky_ex(core + shift * gram)
        if not failed:
            break
        shift *= 10
        if shift > max(space.eps**0.5, ROUNDED) * scale:
            raise ValueError(f"{A!r} says that it is psd, but is not. Take the GGN, or add damping to it.")
    half = space.combine(torch.linalg.inv(factor), images + shift * sketch)
    squares, turn = torch.linalg.eigh(space.inner(half, half))
    values, turn = squares.flip(0) - shift, turn.flip(1)
    kept = values > space.eps * values.max().clamp(min=0)
    vectors = space.orthonormal(space.combine(turn.T[kept] / squares.flip(0)[kept].sqrt().unsqueeze(1), half))
    return values[kept][: len(vectors)], vectors


def recycled(
    space: Space,
    directions: Float[Tensor, "d n"],
    images: Float[Tensor, "d n"],
    known: LowRank | None,
    rank: int,
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Up to `rank` eigenvalues, descending, and eigenvectors of Nystrom's approximation of A from its products with the
    directions.

    Where `known` is the inverse of an earlier one plus damping mu, its quasi-Newton update: B = earlier + mu I becomes
    B - (B on the directions) + (A + mu I on the directions), which is positive definite, does to the directions what
    A + mu I does, and else what B did. What it has below mu is dropped.
    """
    squares, turn = torch.linalg.eigh(space.inner(directions, directions))
    some = squares > space.eps**0.5  # of directions of length 1: what rounding has left of others would be blown up
    turn = (turn[:, some] / squares[some].sqrt()).T
    P, images = space.combine(turn, directions), space.combine(turn, images)
    if known is not None and known.shift > 0 and known.psd:
        mu, U = 1 / known.shift, known.vectors
        values = 1 / (known.values + known.shift).clamp(min=space.eps * known.shift) - mu
    else:
        mu, U, values = 0.0, space.empty, squares[:0]
    earlier = space.combine(values.clamp(min=0).sqrt().diag(), U)
    before = space.combine(space.inner(P, earlier), earlier) + mu * P
    parts = [earlier, _half(space, P, images + mu * P), _half(space, P, before)]
    rows = torch.cat(parts)
    if not len(rows):
        return squares[:0], rows
    signs = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    signs[len(rows) - len(parts[-1]) :] = -1
    whole = Outer(rows, signs.diag(), space=space).spectral
    order = whole.values.argsort(descending=True)[:rank]
    order = order[whole.values[order] > space.eps * whole.values.max()]
    return whole.values[order], whole.vectors[order]


def _half(space: Space, P: Float[Tensor, "d n"], images: Float[Tensor, "d n"]) -> Float[Tensor, "r n"]:
    """Rows H with H^T H = images^T (P images^T)^-1 images, for orthonormal P: Nystrom's approximation."""
    core = space.inner(P, images)
    values, turn = torch.linalg.eigh((core + core.T) / 2)
    some = values > space.eps * values.abs().max()
    return space.combine((turn[:, some] / values[some].sqrt()).T, images)
