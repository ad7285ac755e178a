"""curv trace: the sum of all eigenvalues."""

from __future__ import annotations

from typing import Literal

from .load import load_operator, question_of
from .options import By, Goal, Matrix, Output, Seed, Task
from .output import deliver, prepare


def trace(
    model: str | None = None,
    /,
    *,
    method: Literal["auto", "krylov", "hutchinson", "hutch++", "xtrace", "xnystrace"] = "auto",
    by: By = None,
    seed: Seed = 0,
    goal: Goal = Goal(),
    task: Task = Task(),
    matrix: Matrix = Matrix(),
    output: Output = Output(),
) -> None:
    """Trace of the Hessian or GGN with its standard error and confidence interval.

    Examples: `curv trace`; `curv trace model.pt --rtol 0.01 --budget 300hvp`;
    `curv trace ./task.py:make --operator ggn --format json`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    method
        auto is krylov: a sum over the largest eigenvalues, an average over the rest. hutchinson keeps no vectors.
    by
        The trace of each layer or parameter instead, all from the same passes over the data.
    seed
        Of the random vectors.
    """
    prepare(output, "trace")
    import curvature as cv

    A = load_operator(model, task, matrix)
    ask = question_of(cv.trace, A, by)
    deliver(lambda run: ask(method=method, seed=seed, run=run, **goal.within(output.budget)), output, "trace")
