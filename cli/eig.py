"""curv eig: extreme eigenvalues with their residuals."""

from __future__ import annotations

from typing import Any, Literal

from .load import load_operator, question_of
from .options import By, Count, Matrix, Output, Positive, Seed, Task, Tolerance
from .output import deliver, prepare, warn


def eig(
    model: str | None = None,
    /,
    *,
    k: Count = 3,
    which: Literal["largest", "smallest", "both", "magnitude"] = "largest",
    method: Literal["lanczos", "krylov"] = "lanczos",
    rtol: Tolerance = 1e-5,
    max_steps: Positive | None = None,
    block: Positive | None = None,
    by: By = None,
    seed: Seed = 0,
    task: Task = Task(),
    matrix: Matrix = Matrix(),
    output: Output = Output(),
) -> None:
    """The k eigenvalues at one end, each with its residual.

    Examples: `curv eig`; `curv eig model.pt -k 10 --which both`; `curv eig model.pt --fail-on "lambda_max > 1e3"`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    k
        How many eigenvalues.
    which
        Which end; both in turn, so that -k counts them together; or the largest in magnitude.
    method
        lanczos takes the fewest products; krylov the fewest passes over the data, and the most memory.
    rtol
        A pair has converged when its residual is below rtol times its value.
    max_steps
        At most so many passes over the data: 200, or 30 of krylov.
    block
        Vectors multiplied at once: 4, or k + 2 of krylov.
    by
        The eigenvalues of each layer or parameter instead, all from the same passes over the data.
    seed
        Of the random start vectors.
    """
    prepare(output, "eig")
    import curvature as cv

    A = load_operator(model, task, matrix)
    options: dict[str, Any] = {"which": which, "method": method, "rtol": rtol, "max_steps": max_steps, "block": block}

    def eigsh(layer: cv.LinearOperator, *, k: int, **options: Any) -> cv.Eigenpairs:
        return cv.eigsh(layer, min(k, layer.shape[0]), **options)  # of a small one, all

    ask = question_of(eigsh if by else cv.eigsh, A, by)
    result = deliver(lambda run: ask(k=k, seed=seed, run=run, **options), output, "eig")
    pairs = [result] if by is None else result.results
    count = sum(int((~some.converged).sum()) for some in pairs)
    if count:
        total = sum(len(some.values) for some in pairs)
        warn(f"{count} of {total} eigenvalues have not converged: raise --max-steps or --rtol.")
