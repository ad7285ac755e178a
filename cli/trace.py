"""curv trace: the sum of all eigenvalues."""

from __future__ import annotations

import math
from typing import Literal

from .load import load_operator, question_of
from .options import Amount, By, Output, Positive, Seed, Task, Tolerance
from .output import deliver, prepare


def trace(
    model: str | None = None,
    /,
    *,
    products: Positive = 32,
    rtol: Tolerance | None = None,
    atol: Amount | None = None,
    level: Tolerance = 0.95,
    max_products: Positive = 10_000,
    max_seconds: Amount = math.inf,
    method: Literal["auto", "krylov", "hutchinson", "hutch++", "xtrace", "xnystrace"] = "auto",
    by: By = None,
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """Trace of the Hessian or GGN with its standard error and confidence interval.

    Examples: `curv trace`; `curv trace model.pt --rtol 0.01`; `curv trace model.pt --products 99 --operator ggn`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    products
        Products with the matrix to spend: more make the error bar smaller.
    rtol
        Go on until the half-width of the interval is this small, relative to the trace; --products then has no say.
    atol
        The same, absolutely.
    level
        Of that interval.
    max_products
        Where to stop without having reached --rtol or --atol.
    max_seconds
        The same in time.
    method
        auto is krylov: a sum over the largest eigenvalues, an average over the rest. hutchinson keeps no vectors.
    by
        The trace of each layer or parameter instead, all from the same passes over the data.
    seed
        Of the random vectors.
    """
    prepare(output, "trace")
    import curvature as cv

    A = load_operator(model, task)
    goal = {"rtol": rtol, "atol": atol, "level": level, "max_products": max_products, "max_seconds": max_seconds}
    ask = question_of(cv.trace, A, by)
    deliver(lambda run: ask(products=products, method=method, seed=seed, run=run, **goal), output, "trace")
