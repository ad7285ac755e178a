"""curv diag: every entry of the diagonal."""

from __future__ import annotations

import math
from typing import Literal

from .load import load_operator
from .options import Amount, Output, Positive, Seed, Task, Tolerance
from .output import deliver, prepare


def diag(
    model: str | None = None,
    /,
    *,
    products: Positive = 32,
    rtol: Tolerance | None = None,
    atol: Amount | None = None,
    level: Tolerance = 0.95,
    max_products: Positive = 10_000,
    max_seconds: Amount = math.inf,
    method: Literal["auto", "hutchinson", "xdiag"] = "auto",
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """Diagonal of the Hessian or GGN, every entry with its standard error; --out keeps them.

    Examples: `curv diag --out diagonal`; `curv diag model.pt --operator ggn-diagonal --out exact`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    products
        Products with the matrix to spend: more make the error bars smaller.
    rtol
        Go on until the norm of the half-widths is this small, relative to that of the diagonal.
    atol
        The same, absolutely.
    level
        Of the intervals.
    max_products
        Where to stop without having reached --rtol or --atol.
    max_seconds
        The same in time.
    method
        auto is xdiag: far better where few eigenvalues are large. hutchinson keeps no vectors.
    seed
        Of the random vectors.
    """
    prepare(output, "diag")
    import curvature as cv

    A = load_operator(model, task)
    goal = {"rtol": rtol, "atol": atol, "level": level, "max_products": max_products, "max_seconds": max_seconds}
    deliver(lambda run: cv.diagonal(A, products=products, method=method, seed=seed, run=run, **goal), output, "diag")
