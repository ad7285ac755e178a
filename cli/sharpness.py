"""curv sharpness: all measures of sharpness in one table."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from .load import load_checked
from .options import NUMBERS, Many, Output, Positive, Seed, Task
from .output import deliver, prepare


def sharpness(
    model: str | None = None,
    /,
    *,
    measure: Many = (),
    rho: Annotated[float, Parameter(validator=Number(gt=0), group=NUMBERS)] = 0.05,
    sigma: Annotated[float, Parameter(validator=Number(gt=0), group=NUMBERS)] = 0.01,
    samples: Positive = 16,
    products: Positive = 64,
    invariance: Annotated[bool, Parameter(negative=())] = False,
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """Sharpness by every measure, each with its error and whether it depends on how the function is written as weights.

    Examples: `curv sharpness`; `curv sharpness model.pt --invariance --out run1`;
    `curv sharpness model.pt --measure lambda_max --measure adaptive_sam`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    measure
        Only this one; may be repeated. A wrong name is answered with the list of all.
    rho
        The radius of the ball in which the loss is largest.
    sigma
        The standard deviation of random changes of the weights.
    samples
        Random changes: more make the error bars smaller.
    products
        Products with the Hessian for each of its sums: more make the error bars smaller.
    invariance
        Take each measure again at other weights of the same function, and say by how much it changed.
    seed
        Of the random vectors.
    """
    prepare(output, "sharpness")
    import curvature as cv

    objective = load_checked(model, task)
    options: Any = {"rho": rho, "sigma": sigma, "samples": samples, "products": products, "invariance": invariance}
    options |= {"measures": measure} if measure else {}
    deliver(lambda run: cv.sharpness(objective, seed=seed, run=run, **options), output, "sharpness")
