"""curv ihvp: the inverse of a curvature matrix times a gradient."""

from __future__ import annotations

from typing import Any, Literal

from .load import STRUCTURED, load_checked, on_test, operator_of
from .options import Damping, Matrix, Misuse, Output, Positive, Seed, Task, Test, Tolerance
from .output import deliver, emit, prepare


def ihvp(
    model: str | None = None,
    /,
    *,
    test: Test = None,
    damping: Damping = 1e-2,
    method: Literal["auto", "cg", "minres", "neumann"] = "auto",
    preconditioner: Literal["none", "kfac", "ekfac", "ggn-diagonal", "nystrom"] = "none",
    rtol: Tolerance = 1e-3,
    max_steps: Positive = 500,
    seed: Seed = 0,
    task: Task = Task(),
    matrix: Matrix = Matrix(),
    output: Output = Output(),
) -> None:
    """x = (A + damping I)^-1 g for the gradient g of the loss: minus x is a damped Newton or natural gradient step.

    Its arrays.safetensors in --out holds x, the parameters in order. g . x is the square of the Newton decrement.

    Examples: `curv ihvp`; `curv ihvp model.pt --operator ggn --damping 0.001 --out step`;
    `curv ihvp model.pt --test held-out.npz --preconditioner kfac`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    test
        Other data, named as --data is: g is the gradient of the loss on these, and A still of the first.
    damping
        What is added to all eigenvalues, in their units. Without it a singular A has no inverse.
    method
        Conjugate gradients, for positive definite matrices; minres, for indefinite ones too (auto takes it for the
        Hessian); or a Neumann series. kfac, ekfac and ggn-diagonal have an exact inverse.
    preconditioner
        An approximate inverse, of the GGN, that makes the steps fewer, each with the same --damping.
    rtol
        Until the residual is below rtol times the norm of g.
    max_steps
        At most so many passes over the data.
    seed
        Of the random vectors of nystrom.
    """
    prepare(output, "ihvp")
    import curvature as cv

    if matrix.operator in STRUCTURED and preconditioner != "none":
        raise Misuse(f"{matrix.operator} has an exact inverse.", "Leave --preconditioner out.")
    objective = load_checked(model, task)
    A = operator_of(objective, matrix)
    match preconditioner:
        case "none":
            near = A if matrix.operator in STRUCTURED and method != "neumann" else None
        case "nystrom":
            near = cv.nystrom(cv.ggn(objective), damping=damping, seed=seed)
        case name:
            near = operator_of(objective, Matrix(operator=name))
    M = None if near is None else cv.inverse(near, damping=damping)
    g = (objective if test is None else on_test(objective, test, model, task)).gradient()
    options: Any = {"method": method, "preconditioner": M, "rtol": rtol, "max_steps": max_steps}
    try:
        deliver(lambda run: cv.solve(A, g, damping=damping, run=run, **options), output, "ihvp")
    except cv.NotConverged as error:
        emit(error.solution, output, "ihvp")
        raise
