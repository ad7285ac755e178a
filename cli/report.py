"""curv report: what is worth knowing of a model, on one page."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

from .load import load_checked
from .options import Count, Many, Output, Positive, Seed, Task
from .output import deliver, prepare


def report(
    model: str | None = None,
    /,
    *,
    question: Many = (),
    k: Count = 10,
    probes: Positive = 4,
    steps: Positive = 60,
    products: Positive = 32,
    points: Positive = 25,
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """Spectrum, eigenvalues and traces of layers, the gradient's share, stable learning rates, sharpness and a plane of
    the loss, on one page: report.html in --out, which is ./report when left out.

    Examples: `curv report`; `curv report model.pt --out run1`; `curv report --question rates --question spectrum`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    question
        Only this one; may be repeated. A wrong name is answered with the list of all.
    k
        How many of the largest eigenvalues.
    probes
        Random start vectors of the spectrum: more make its error bars smaller.
    steps
        Of the spectrum: more resolve finer.
    products
        Products for each trace: more make the error bars smaller.
    points
        Of the plane along each axis, an odd number.
    seed
        Of the random vectors.
    """
    output = replace(output, out=output.out or Path("report"))
    prepare(output, "report")
    import curvature as cv

    objective = load_checked(model, task)
    options: dict[str, Any] = {"k": k, "probes": probes, "steps": steps, "products": products, "points": points}
    made_by = _spelled(model, {"question": question, **options, "seed": seed}, task)
    options |= {"questions": question} if question else {}
    deliver(lambda run: cv.report(objective, seed=seed, run=run, **options), output, "report", made_by=made_by)


def _spelled(model: str | None, options: dict[str, Any], task: Task) -> str:
    """The command line that asks for the same."""
    usual = {name: parameter.default for name, parameter in signature(report).parameters.items()} | asdict(Task())
    words = ["curv", "report", *([] if model is None else [model])]
    for name, value in {**options, **asdict(task)}.items():
        option = f"--{name.replace('_', '-')}"
        for item in () if value == usual[name] else value if isinstance(value, tuple) else (value,):
            words += [option] if item is True else [option, str(item)]
    return shlex.join(words)
