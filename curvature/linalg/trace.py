"""The trace of an operator: exact where structure allows, else estimated with an honest standard error."""

from __future__ import annotations

import math
from typing import Literal

import torch

from curvature.linalg.deflation import Basis, Deflated, KnownBasis, KrylovBasis, SketchBasis, columns, derived
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.exchangeable import LeftOut, XNysTrace, XTrace
from curvature.linalg.goal import CAP, Goal, pursued
from curvature.linalg.known import known_trace
from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.progress import Run
from curvature.result import Estimate

TraceMethod = Literal["auto", "krylov", "hutchinson", "hutch++", "xtrace", "xnystrace"]
METHODS = ("auto", "krylov", "hutchinson", "hutch++", "xtrace", "xnystrace")


def trace(
    A: LinearOperator,
    *,
    products: int = 32,
    rtol: float | None = None,
    atol: float | None = None,
    level: float = 0.95,
    max_products: int = CAP,
    max_seconds: float = math.inf,
    method: TraceMethod = "auto",
    control: LinearOperator | None = None,
    deflate: Eigenpairs | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> Estimate:
    """Trace of A, exact where its structure allows, else estimated from `products` products with A.

    With `rtol` or `atol` from as many as it takes until the interval at `level` is that narrow, relative to the trace
    or absolutely, or `max_products` or `max_seconds` are spent: `.converged` says which. With as many products as A
    has rows the trace is exact.

    "krylov" (the "auto" for symmetric A) sums exactly over a Krylov space, half of the products, which finds the large
    eigenvalues, and averages z.Az over random signs z on the rest. "hutch++" (for others) takes the space from one
    product with random vectors, two thirds of the products with those that sum over it. "hutchinson" averages alone:
    the stderr of one product is sqrt(2) |A| in the Frobenius norm, and no vectors are kept. "xtrace", and for psd
    matrices "xnystrace", use every vector twice; their stderr is that of dependent estimates, widened until its
    interval holds the truth as often as it says. Which is best depends on the spectrum.

    `control` is an operator that resembles A and whose trace is known exactly, such as `kfac(objective)` for the GGN:
    its errors on the same random vectors tell most of those of A, and are subtracted. `deflate` are pairs that `eigsh`
    found of A before: their values are summed, and all products but one go to the average on the rest; if that one
    says that they are not pairs of A, one more for each. Both leave the mean unbiased.

    Hutchinson 1990; Meyer, Musco, Musco & Woodruff 2021 (arXiv:2010.09649), Hutch++; Chen & Hallman 2022
    (arXiv:2205.01736), Krylov spaces; Epperly, Tropp & Webber 2024 (arXiv:2301.07825), XTrace.

    >>> from curvature.linalg.structured import Diagonal
    >>> trace(Diagonal(torch.tensor([1.0, 2.0]))).value
    tensor(3., dtype=torch.float64)
    """
    A = as_operator(A)
    goal = Goal(products, rtol, atol, level, max_products, max_seconds)
    options = {**goal.options, "method": method} | ({} if control is None else {"control": describe(control)})
    options |= {} if deflate is None else {"deflate": deflate.values.tolist()}
    measurement = Measurement(A, "trace", options=options, seed=seed, run=run)
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, but got {method!r}.")
    if method == "auto":
        method = "krylov" if A.symmetric else "hutch++"
    if method in ("krylov", "xtrace", "xnystrace") and not A.symmetric:
        raise ValueError(f"{method} is for symmetric matrices, but {A!r} is none. Take 'hutch++' or 'hutchinson'.")
    if control is not None and method in ("xtrace", "xnystrace"):
        raise ValueError(f"{method} takes no control variate. Take another method.")
    if deflate is not None and (method not in ("krylov", "hutchinson") or not A.symmetric):
        raise ValueError(f"{method} of {A!r} takes no eigenpairs. Take 'auto', of a symmetric matrix.")
    if (known := known_trace(A)) is not None:
        return measurement.exact(known)
    if not goal.adaptive and products >= A.shape[0]:
        return _summed(measurement)
    match method:
        case "krylov" | "hutchinson" if deflate is not None:
            # pairs that have not converged depend on the vectors they came from: others are drawn here
            estimates = Deflated(KnownBasis(measurement, deflate), control, seed=derived(seed), kept=False)
        case "xtrace":
            estimates = LeftOut(XTrace(measurement, seed))
        case "xnystrace":
            estimates = LeftOut(XNysTrace(measurement, seed))
        case "krylov":
            basis = KrylovBasis(measurement, goal.first, seed)
            estimates = Deflated(basis, control, seed=seed, kept=goal.adaptive)
        case "hutch++":
            estimates = Deflated(SketchBasis(measurement, seed), control, seed=seed, kept=goal.adaptive)
        case _:
            estimates = Deflated(Basis(measurement), control, seed=seed, kept=False)
    return pursued(measurement, goal, estimates, lambda: _summed(measurement))


def _summed(measurement: Measurement) -> Estimate:
    """The sum of the diagonal, from one product with each vector of the standard basis."""
    A, done = measurement.operator, 0
    total, square = torch.zeros((), dtype=torch.float64, device=A.device), 0.0
    for entries, squares in columns(measurement):
        done += len(entries)
        total += entries.sum()
        square += float(squares.sum())
        measurement.report(done, A.shape[0], f"trace {float(total):.5g}", unit="products")
    return measurement.exact(total, floor=10 * A.domain.eps * square**0.5)
