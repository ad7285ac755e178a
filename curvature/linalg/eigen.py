"""Extreme eigenpairs with their true residuals: thick-restart block Lanczos, LOBPCG and block Krylov."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted, NotConverged
from curvature.linalg.eigenpairs import Eigenpairs, Ritz, Which, eigenpairs, tolerance, wanted
from curvature.linalg.krylov import Krylov
from curvature.linalg.lobpcg import Lobpcg
from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.space import Space
from curvature.linalg.structured import Diagonal
from curvature.progress import Run

Method = Literal["lanczos", "lobpcg", "krylov"]

SPARE = 2  # vectors beside the k asked for: the gap to the next eigenvalue decides how fast the last ones come
MIXED = 0.01  # of a random vector, in vectors that are mixed of given ones


def eigsh(
    A: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    method: Method = "lanczos",
    rtol: float = 1e-5,
    max_steps: int | None = None,
    block: int | None = None,
    start: Float[Tensor, "r n"] | None = None,
    preconditioner: LinearOperator | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> Eigenpairs:
    """The k eigenpairs of symmetric A at one end, both ends, or of largest magnitude, each with its residual.

    Converged means residual <= rtol * |value|, or at the rounding of A's dtype. `block` vectors are multiplied at
    once, which costs one pass over the data; at most `max_steps` (200; 30 with "krylov") blocks are. What has not
    converged by then is returned and marked. An interrupt raises Interrupted with the pairs so far in `.result`.

    `start` (r, n) holds rows near to eigenvectors, for example those of the previous training step, and saves
    products the nearer they are. Random vectors are added, so that what the rows lack is still found.

    - "lanczos", thick-restart block Lanczos, takes the fewest products of those that need no help. `block` is 4;
      eigenvalues of higher multiplicity take more rounds. Memory: about 3 k + 5 blocks of vectors, whatever the steps;
      up to 8 k more where random vectors are added to find all copies of an eigenvalue.
    - "lobpcg" is for a `preconditioner`: a positive definite operator near (A - c)^-1 in what it enlarges, for example
      the inverse of a psd A plus damping for its smallest eigenvalues; and for a `start` that is nearly exact, as a
      step multiplies only what has not converged. `block` is k + 2, and no less than k. Memory: about 10 blocks.
    - "krylov", randomised block Krylov, takes the fewest passes, where many vectors in one cost little more than few.
      `block` is k + 2. Nothing is thrown away: memory for max_steps blocks.

    Wu & Simon 2000 (thick restart, SIAM J. Matrix Anal. Appl. 22); Knyazev 2001 (LOBPCG, SIAM J. Sci. Comput. 23);
    Musco & Musco 2015 (block Krylov, arXiv:1504.05477).

    >>> eigsh(Diagonal(torch.tensor([1.0, 3.0, 2.0])), 2).values
    tensor([3., 2.])
    """
    A = as_operator(A)
    n = A.shape[0]
    preconditioner = None if preconditioner is None else as_operator(preconditioner)
    given = A.domain.empty if start is None else start.to(A.device, A.dtype)
    max_steps = (30 if method == "krylov" else 200) if max_steps is None else max_steps
    block = min(n, max(1, (4 if method == "lanczos" else k + SPARE) if block is None else block))
    options = {"k": k, "which": which, "method": method, "rtol": rtol, "max_steps": max_steps, "block": block}
    options |= {"start": len(given), "preconditioner": None if preconditioner is None else describe(preconditioner)}
    measurement = Measurement(A, "eigsh", options=options, seed=seed, run=run)
    _check(A, k, which, method, block, given, preconditioner)
    if isinstance(A, Diagonal):
        return _sorted(A, measurement, k, which)
    draws, least = A.domain.draws(seed=seed, kind="sphere"), _looks(n) if len(given) else 0
    if method == "lobpcg":
        solver = Lobpcg(measurement, min(n, max(block, len(given) + 1)), which, preconditioner)
        search = partial(solver.iterate, chain(given, draws), k, rtol, max_steps, least)
        found = partial(solver.ritz, k)
    else:
        rows = max_steps * block if method == "krylov" else max(3 * k, 24) + 5 * block
        solver = Krylov(measurement, capacity=min(n, rows))
        draws = _begun(A.domain, given, draws, block)
        search = partial(_iterate, solver, draws, k, which, rtol, max_steps, block, least)
        found = partial(_ritz, solver, k, which)
    try:
        search()
        if solver.multiplied < k:
            raise NotConverged(
                f"{max_steps} steps made {solver.multiplied} directions, fewer than the k = {k} asked for.",
                "Raise max_steps or block.",
            )
        ritz = found()
        products = measurement.apply(ritz.rows) if ritz.products is None else ritz.products
        return eigenpairs(solver, ritz._replace(products=products), which, rtol)
    except KeyboardInterrupt as stop:
        if solver.multiplied < k:
            raise
        raise Interrupted(eigenpairs(solver, found()._replace(products=None), which, rtol)) from stop


def _begun(space: Space, given: Tensor, draws: Iterator[Tensor], block: int) -> Iterator[Tensor]:
    """`draws` after the given rows; where these are more than fit into a block, after a block of draws in which what
    lies in their span is enlarged: a Krylov space takes apart what its first vectors are mixed of, and a narrow one for
    fewer products than one that is as wide as there are rows.
    """
    if len(given) >= block:
        noise = torch.stack(list(islice(draws, block)))
        basis = space.orthonormal(given)
        inside = space.combine(space.inner(noise, basis), basis)
        lengths = MIXED * space.norms(inside) / space.norms(noise)
        given = inside + lengths.to(noise.dtype).unsqueeze(1) * noise
    yield from given
    yield from draws


def _looks(n: int) -> int:
    """Steps at least, from given vectors: the random ones beside them must be able to show what these lack.

    An eigenvalue three times as far out as the rest of the spectrum grows sixfold a step (Chebyshev) from a share of
    1 / sqrt(n).
    """
    return 1 + math.ceil(math.log10(n))


def _ritz(krylov: Krylov, k: int, which: Which) -> Ritz:
    """The Ritz pairs of a Krylov space."""
    values, vectors = torch.linalg.eigh(krylov.projected)
    order = wanted(values, which)
    rows = krylov.space.combine(vectors[:, order[:k]].T, krylov.basis)
    rows /= krylov.space.norms(rows).to(rows.dtype).unsqueeze(1)
    return Ritz(values[order], krylov.residuals(vectors[:, order]), rows)


def _sorted(A: Diagonal, measurement: Measurement, k: int, which: Which) -> Eigenpairs:
    """The entries of a diagonal matrix and vectors of the standard basis."""
    chosen = wanted(A.entries.double(), which)[:k]
    vectors = torch.zeros(k, A.shape[0], dtype=A.dtype, device=A.device)
    vectors[torch.arange(k), chosen] = 1
    return Eigenpairs(
        values=A.entries[chosen],
        vectors=vectors,
        residuals=torch.zeros(k, dtype=torch.float64, device=A.device),
        bounds=torch.zeros(k, dtype=torch.float64, device=A.device),
        converged=torch.ones(k, dtype=torch.bool, device=A.device),
        cost=measurement.cost,
        origin=measurement.origin,
    )


def _check(
    A: LinearOperator,
    k: int,
    which: Which,
    method: Method,
    block: int,
    given: Tensor,
    preconditioner: LinearOperator | None,
) -> None:
    if not A.symmetric:
        raise ValueError(f"eigsh needs a symmetric operator, but got {A!r}. Try A.adjoint() @ A for singular values.")
    if not 1 <= k <= A.shape[0]:
        raise ValueError(f"k lies between 1 and the size of A, {A.shape[0]}, but got {k}.")
    wanted(torch.zeros(1), which)
    if method not in get_args(Method):
        raise ValueError(f"method is 'lanczos', 'lobpcg' or 'krylov', but got {method!r}.")
    if method == "lobpcg" and block < k:
        raise ValueError(f"LOBPCG improves all k = {k} vectors at once, but block is {block}. Take more.")
    if given.ndim != 2 or given.shape[1] != A.shape[0]:
        raise ValueError(f"start holds rows of {A.shape[0]} entries, but has shape {tuple(given.shape)}.")
    lengths = A.domain.norms(given)
    if not ((lengths > 0) & lengths.isfinite()).all():
        raise ValueError("start has a row that is zero or not finite. Give vectors, or none.")
    if preconditioner is None:
        return
    if method != "lobpcg" or which not in ("largest", "smallest"):
        raise ValueError(
            f"A preconditioner helps 'lobpcg' at one end, 'smallest' or 'largest', but got {method!r} and {which!r}. "
            "Take method='lobpcg' and one end at a time, or no preconditioner."
        )
    if preconditioner.shape != A.shape:
        raise ValueError(f"A preconditioner of shape {preconditioner.shape} does not fit A of shape {A.shape}.")


def _iterate(
    krylov: Krylov, draws: Iterator[Tensor], k: int, which: Which, rtol: float, max_steps: int, block: int, least: int
) -> None:
    """Grow and restart the basis until the k wanted Ritz pairs have converged, or the steps are used up.

    All vectors of a Krylov space that starts from `seen` random ones see an eigenvalue at most `seen` times. Where one
    was seen that often there may be more copies of it: as many random vectors again are added to the converged pairs,
    and given as many steps as the first ones took.
    """
    done, seen, wait, first = 0, 0, 0, 0
    if (state := krylov.measurement.resume()) is not None:
        krylov.load(state)
        done, seen, wait, first = state["counts"].tolist()
        next(islice(draws, seen, seen), None)
    for step in range(done + 1, max_steps + 1):
        if krylov.width == 0:  # at the start, and when the basis is invariant but more is wanted of it
            krylov.start(torch.stack(list(islice(draws, block))))
            seen += block
        krylov.step()
        values, vectors = torch.linalg.eigh(krylov.projected)
        order = wanted(values, which)
        chosen = order[:k]
        residuals = krylov.residuals(vectors[:, chosen])
        settled = int((residuals <= tolerance(krylov, values[chosen], rtol) / 2).sum())
        lead = f"{float(values[order[0]]):.5g}"
        krylov.measurement.report(step, max_steps, f"{settled} of {k} converged, first {lead}")
        if krylov.multiplied == krylov.space.size or step == max_steps:
            return
        if settled == k and step >= max(wait, least):
            if not _crowded(values[chosen], krylov, which, seen):
                return
            first = first or step
            krylov.enlarge(4 * seen)  # the frontier is wider from now on
            krylov.restart(values[chosen], vectors[:, chosen], torch.stack(list(islice(draws, seen))))
            seen, wait = 2 * seen, step + first
        elif krylov.size + krylov.width > krylov.capacity and krylov.capacity < krylov.space.size:
            keep = min(k + (krylov.multiplied - k) // 2, krylov.multiplied - krylov.width)
            krylov.restart(values[order[:keep]], vectors[:, order[:keep]])
            krylov.measurement.keep({**krylov.state, "counts": torch.tensor([step, seen, wait, first])})
        else:
            krylov.extend()


def _crowded(values: Tensor, krylov: Krylov, which: Which, seen: int) -> bool:
    """Whether one of the wanted values came `seen` times, and further copies of it would displace others.

    Those at the end of an order have none behind them to displace.
    """
    ends = [values] if which != "both" else [values[::2], values[1::2]]
    for end in ends:
        near = torch.finfo(krylov.space.dtype).eps ** 0.5 * end.abs() + krylov.rounding
        copies = (end.unsqueeze(1) - end).abs() <= near.unsqueeze(1) + near
        if any(int(row.sum()) >= seen and not row[-1] for row in copies):
            return True
    return False
