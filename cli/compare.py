"""curv compare: two results, or two models measured the same way, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from .load import load_checked
from .options import NUMBERS, Many, Misuse, Output, Positive, Seed, Task, Tolerance
from .output import deliver, prepare

if TYPE_CHECKING:
    import curvature as cv

MEASURES = ("lambda_max", "trace")


def compare(
    first: str,
    second: str,
    /,
    *,
    measure: Many = (),
    rho: Annotated[float, Parameter(validator=Number(gt=0), group=NUMBERS)] = 0.05,
    sigma: Annotated[float, Parameter(validator=Number(gt=0), group=NUMBERS)] = 0.01,
    samples: Positive = 16,
    products: Positive = 64,
    level: Tolerance = 0.95,
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """The numbers of two results or two models side by side: their differences, and which are more than errors.

    Numbers with a standard error are tested, those with bounds compared with these, all at --level together, by Holm's
    method; what was different in the settings is listed. Of two models some measures of sharpness are taken, each
    model with random vectors of its own.

    Examples: `curv compare demo:digits demo:digits-cnn`; `curv compare run1 run2 --out both`;
    `curv compare a.pt b.pt --measure trace --measure sam`.

    Parameters
    ----------
    first
        A folder that --out wrote, or a model: demo:NAME, a file, a Hugging Face folder, or code.
    second
        Another of the same kind.
    measure
        Of two models, one of those of `curv sharpness`; may be repeated. By default lambda_max and trace.
    rho
        The radius of the ball in which the loss is largest.
    sigma
        The standard deviation of random changes of the weights.
    samples
        Random changes: more make the error bars smaller.
    products
        Products with the Hessian for each of its sums: more make the error bars smaller.
    level
        Where nothing is different, a number is called so in 1 - level of all comparisons.
    seed
        Of the random vectors of the first; the second has those of the next.
    """
    prepare(output, "compare")
    import curvature as cv

    labels = (first, second) if first != second else (first, f"{second} (again)")
    folders = [(Path(name) / "result.json").is_file() for name in (first, second)]
    if all(folders):
        if measure:
            raise Misuse("--measure is for two models, but these are results.", "Leave it out.")
        results = [cv.Result.load(name) for name in (first, second)]
        deliver(lambda run: cv.compare(*results, level=level, labels=labels), output, "compare")
        return
    if any(folders):
        raise Misuse(f"{first} and {second} are a result and a model.", "Give two of one kind.")
    models = [load_checked(name, task) for name in (first, second)]
    options: Any = {"rho": rho, "sigma": sigma, "samples": samples, "products": products}
    options |= {"measures": measure or MEASURES}

    def measured(run: cv.Run) -> cv.Comparison:
        tables: list[cv.Sharpness] = []
        for place, one in enumerate(models):
            try:
                tables.append(cv.sharpness(one, seed=seed + place, run=run.part(str(place)), **options))
            except cv.Interrupted as stop:
                if not tables:
                    raise KeyboardInterrupt from stop
                raise cv.Interrupted(cv.compare(tables[0], stop.result, level=level, labels=labels)) from stop
        return cv.compare(*tables, level=level, labels=labels)

    deliver(measured, output, "compare")
