"""curv trace: the sum of all eigenvalues."""

from __future__ import annotations

from typing import Literal

from .load import load_operator
from .options import Output, Positive, Seed, Task
from .output import deliver, prepare


def trace(
    model: str | None = None,
    /,
    *,
    products: Positive = 32,
    method: Literal["auto", "hutchinson", "hutch++"] = "auto",
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """Trace of the Hessian or GGN with its standard error and confidence interval.

    Examples: `curv trace`; `curv trace model.pt --products 99 --operator ggn --format json`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    products
        Products with the matrix to spend: more make the error bar smaller.
    method
        Plain Hutchinson, or Hutch++, which takes out the largest eigenvalues first.
    seed
        Of the random vectors.
    """
    prepare(output, "trace")
    import curvature as cv

    A = load_operator(model, task)
    deliver(lambda run: cv.trace(A, products=products, method=method, seed=seed, run=run), output, "trace")
