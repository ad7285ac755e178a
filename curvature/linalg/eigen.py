"""Extreme eigenpairs with their true residuals: thick-restart block Lanczos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import Interrupted, NotConverged
from curvature.linalg.krylov import Krylov
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.space import Space
from curvature.linalg.structured import Diagonal
from curvature.progress import Run
from curvature.result import Result

Which = Literal["largest", "smallest", "both", "magnitude"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues in the order asked for, with unit eigenvectors as rows.

    `residuals` are the norms of A v - value v, recomputed with fresh products: an eigenvalue of A lies within one
    residual of each value. `converged` says which are below the tolerance. That an eigenvalue further out was missed is
    for a random start improbable (Kuczynski & Wozniakowski 1992), and not excluded.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k n"]
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]

    def summary(self) -> dict[str, str]:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), self.converged.tolist(), strict=True)
        return {
            f"eigenvalue {i}": f"{value:.8g}  residual {residual:.1e}{'' if converged else '  not converged'}"
            for i, (value, residual, converged) in enumerate(pairs, 1)
        }

    __repr__ = Result.__str__


def eigsh(
    A: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    rtol: float = 1e-5,
    max_steps: int = 200,
    block: int = 4,
    seed: int = 0,
    run: Run | None = None,
) -> Eigenpairs:
    """The k eigenpairs of symmetric A at one end, both ends, or of largest magnitude, each with its residual.

    Converged means residual <= rtol * |value|, or at the rounding of A's dtype. `block` vectors are multiplied at
    once, which costs one pass over the data; eigenvalues of higher multiplicity take more rounds. At most `max_steps`
    blocks are multiplied; what has not converged by then is returned and marked. Memory: about 3 k + 5 blocks of
    vectors, whatever the steps; up to 8 k more where random vectors are added to find all copies of an eigenvalue. An
    interrupt raises Interrupted with the pairs so far in `.result`.

    Wu & Simon 2000 (thick restart, SIAM J. Matrix Anal. Appl. 22).

    >>> eigsh(Diagonal(torch.tensor([1.0, 3.0, 2.0])), 2).values
    tensor([3., 2.])
    """
    A = as_operator(A)
    options = {"k": k, "which": which, "rtol": rtol, "max_steps": max_steps, "block": block}
    measurement = Measurement(A, "eigsh", options=options, seed=seed, run=run)
    n = A.shape[0]
    _check(A, k, which)
    if isinstance(A, Diagonal):
        return _sorted(A, measurement, k, which)
    block = max(1, min(block, n))
    krylov = Krylov(measurement, capacity=min(n, max(3 * k, 24) + 5 * block))
    draws = A.domain.draws(seed=seed, kind="sphere")
    try:
        _iterate(krylov, draws, k, which, rtol, max_steps, block)
        if krylov.multiplied < k:
            raise NotConverged(
                f"{max_steps} steps made {krylov.multiplied} directions, fewer than the k = {k} asked for.",
                "Raise max_steps or block.",
            )
        return _eigenpairs(krylov, k, which, rtol, measured=True)
    except KeyboardInterrupt as stop:
        if krylov.multiplied < k:
            raise
        raise Interrupted(_eigenpairs(krylov, k, which, rtol, measured=False)) from stop


def _sorted(A: Diagonal, measurement: Measurement, k: int, which: Which) -> Eigenpairs:
    """The entries of a diagonal matrix and vectors of the standard basis."""
    chosen = wanted(A.entries.double(), which)[:k]
    vectors = torch.zeros(k, A.shape[0], dtype=A.dtype, device=A.device)
    vectors[torch.arange(k), chosen] = 1
    return Eigenpairs(
        values=A.entries[chosen],
        vectors=vectors,
        residuals=torch.zeros(k, dtype=torch.float64),
        converged=torch.ones(k, dtype=torch.bool),
        cost=measurement.cost,
        origin=measurement.origin,
    )


def wanted(values: Float[Tensor, " d"], which: Which) -> Tensor:
    """Indices of `values` in the order of interest; "both" alternates between the two ends, largest first."""
    match which:
        case "largest":
            return values.argsort(descending=True)
        case "smallest":
            return values.argsort()
        case "magnitude":
            return values.abs().argsort(descending=True)
        case "both":
            down, up = values.argsort(descending=True), values.argsort()
            return torch.stack([down, up], dim=1).flatten()[: len(values)]
        case _:
            raise ValueError(f"which is 'largest', 'smallest', 'both' or 'magnitude', but got {which!r}.")


def _check(A: LinearOperator, k: int, which: Which) -> None:
    if not A.symmetric:
        raise ValueError(f"eigsh needs a symmetric operator, but got {A!r}. Try A.adjoint() @ A for singular values.")
    if not 1 <= k <= A.shape[0]:
        raise ValueError(f"k lies between 1 and the size of A, {A.shape[0]}, but got {k}.")
    wanted(torch.zeros(1), which)


def _iterate(
    krylov: Krylov, draws: Iterator[Tensor], k: int, which: Which, rtol: float, max_steps: int, block: int
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
        settled = int((residuals <= _tolerance(krylov, values[chosen], rtol) / 2).sum())
        lead = f"{float(values[order[0]]):.5g}"
        krylov.measurement.report(step, max_steps, f"{settled} of {k} converged, first {lead}")
        if krylov.multiplied == krylov.space.size or step == max_steps:
            return
        if settled == k and step >= wait:
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


def _tolerance(krylov: Krylov, values: Tensor, rtol: float) -> Tensor:
    """What a residual must be below: relative to its value, but not below what the dtype can show."""
    return (rtol * values.abs()).clamp(min=krylov.rounding)


def _eigenpairs(krylov: Krylov, k: int, which: Which, rtol: float, *, measured: bool) -> Eigenpairs:
    """The wanted Ritz pairs; with `measured`, values and residuals from fresh products with the vectors."""
    space = krylov.space
    values, vectors = torch.linalg.eigh(krylov.projected)
    chosen = wanted(values, which)[:k]
    values, residuals = values[chosen], krylov.residuals(vectors[:, chosen])
    rows = space.combine(vectors[:, chosen].T, krylov.basis)
    rows /= space.norms(rows).to(rows.dtype).unsqueeze(1)
    if measured:
        values, residuals = _quotients(space, rows, krylov.measurement.apply(rows))
    return Eigenpairs(
        values=values,
        vectors=rows,
        residuals=residuals,
        converged=residuals <= _tolerance(krylov, values, rtol),
        complete=measured,
        cost=krylov.measurement.cost,
        origin=krylov.measurement.origin,
    )


def _quotients(space: Space, rows: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """u.Au / u.u and |Au - value u| / |u| for each row u, in float64: in its own dtype no row has length 1."""
    pairs = []
    for u, v in zip(rows.split(1), products.split(1), strict=True):
        value = (space.inner(u, v) / space.inner(u, u))[0, 0]
        pairs.append(torch.stack([value, (space.norms(v.double() - value * u.double()) / space.norms(u))[0]]))
    values, residuals = torch.stack(pairs).T
    return values, residuals
