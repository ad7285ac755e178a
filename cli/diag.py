"""curv diag: every entry of the diagonal."""

from __future__ import annotations

from typing import Literal

from .load import load_operator
from .options import Goal, Matrix, Output, Seed, Task
from .output import deliver, prepare


def diag(
    model: str | None = None,
    /,
    *,
    method: Literal["auto", "hutchinson", "xdiag"] = "auto",
    seed: Seed = 0,
    goal: Goal = Goal(),
    task: Task = Task(),
    matrix: Matrix = Matrix(),
    output: Output = Output(),
) -> None:
    """Diagonal of the Hessian or GGN, every entry with its standard error; --out keeps them.

    Examples: `curv diag model.pt --out diagonal`; `curv diag model.pt --operator ggn-diagonal --out exact`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    method
        auto is xdiag: far better where few eigenvalues are large. hutchinson keeps no vectors.
    seed
        Of the random vectors.
    """
    prepare(output, "diag")
    import curvature as cv

    A = load_operator(model, task, matrix)
    deliver(lambda run: cv.diagonal(A, method=method, seed=seed, run=run, **goal.within(output.budget)), output, "diag")
