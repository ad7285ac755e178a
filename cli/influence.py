"""curv influence: which training examples a loss rests on."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from .load import load_checked, on_test, operator_of
from .options import Damping, Matrix, Misuse, Output, Positive, Task, Test, Tolerance
from .output import deliver, prepare


def influence(
    model: str | None = None,
    /,
    *,
    test: Test = None,
    each: Annotated[bool, Parameter(negative=())] = False,
    own: Annotated[bool, Parameter(name="--self", negative=())] = False,
    top: Positive = 10,
    damping: Damping = 1e-2,
    rtol: Tolerance = 1e-3,
    max_steps: Positive = 500,
    task: Task = Task(),
    matrix: Matrix = Matrix(operator="ekfac"),
    output: Output = Output(),
) -> None:
    """By how much a test loss would rise if a training example were left out: those that helped, and those that hurt.

    With --self the loss is that of the example itself, which is large where a label is wrong. Scores are g . (A +
    damping I)^-1 g' / T for the gradients g and g' of the two and T terms; examples are numbered in the order of the
    data. --out holds the scores of all.

    Examples: `curv influence --self`; `curv influence model.pt --test test.npz --out run1`;
    `curv influence model.pt --test test.npz --each --operator ggn --damping 0.1`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out. Its data are the training data.
    test
        The test data, named as --data is.
    each
        The loss of each test example, and not their mean.
    own
        The loss of the training example itself; no test data then.
    top
        How many of the largest scores, and of the smallest, are listed.
    damping
        What is added to all eigenvalues of the matrix, in their units.
    rtol
        Of the solves, for matrices without an exact inverse: hessian, ggn, fisher, empirical-fisher.
    max_steps
        At most so many passes over the data in one of these.
    """
    prepare(output, "influence")
    import curvature as cv

    if own == (test is not None):
        raise Misuse("The influence is that on a test loss, or on the example's own.", "Pass --test DATA or --self.")
    if own and each:
        raise Misuse("--each is for test examples.", "Leave it out, or pass --test DATA.")
    train = load_checked(model, task)
    inverse = cv.inverse(operator_of(train, matrix), damping=damping, rtol=rtol, max_steps=max_steps)
    if test is None:
        deliver(lambda run: cv.self_influence(train, inverse, top=top, run=run), output, "influence")
        return
    tests = on_test(train, test, model, task)
    asked = tests if each else tests.gradient()
    deliver(lambda run: cv.influence(train, asked, inverse, top=top, run=run), output, "influence")
