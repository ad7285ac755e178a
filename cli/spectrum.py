"""curv spectrum: the whole eigenvalue distribution."""

from __future__ import annotations

from typing import Literal

from .load import load_operator, question_of
from .options import By, Matrix, Output, Positive, Seed, Task
from .output import deliver, prepare


def spectrum(
    model: str | None = None,
    /,
    *,
    probes: Positive = 8,
    steps: Positive = 80,
    keep: Literal["device", "main", "nowhere"] = "device",
    by: By = None,
    seed: Seed = 0,
    task: Task = Task(),
    matrix: Matrix = Matrix(),
    output: Output = Output(),
) -> None:
    """Eigenvalue density of the Hessian or GGN, with error bands and the outliers, by stochastic Lanczos quadrature.

    Examples: `curv spectrum --out digits`; `curv spectrum model.pt --operator ggn --probes 4 --steps 20`;
    `curv spectrum weights.pt --arch ./task.py:Net --loss cross-entropy --data train.npz --out run1`;
    `curv spectrum model.pt --by layer --out run2 --resume --budget 10m`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    probes
        Random start vectors: more make the error bars smaller.
    steps
        Krylov steps, each one pass over the data: more resolve finer.
    keep
        Where the vectors of all steps are: with the matrix, in main memory, or nowhere: nothing is counted then.
    by
        The spectrum of each layer or parameter instead, all from the same passes over the data.
    seed
        Of the random vectors.
    """
    prepare(output, "spectrum")
    import curvature as cv

    A = load_operator(model, task, matrix)
    ask = question_of(cv.spectral_density, A, by)
    deliver(lambda run: ask(probes=probes, steps=steps, keep=keep, seed=seed, run=run), output, "spectrum")
