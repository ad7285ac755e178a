"""curv doctor: whether a model can be analysed, and if not, where and what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .code import is_spec
from .forecast import plan_of
from .gates import check
from .load import load_objective
from .options import NUMBERS, Task, Written
from .output import prepare_written, say, standard_output, tell

if TYPE_CHECKING:
    import curvature as cv

COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def doctor(
    model: str | None = None,
    /,
    *,
    command: Annotated[str | None, Parameter(group=NUMBERS)] = None,
    task: Task = Task(),
    output: Written = Written(),
) -> None:
    """Can this be analysed, and if not: which part of the model, which words of torch, which fix.

    On the first batch, by at most ten products with the Hessian: numbers are finite, the loss repeats, every backward
    can be differentiated, second derivatives are right, and which engines work. Exit code 0 also with warnings, 5 when
    there are no second derivatives, 6 for numbers that are none, 7 when --command does not fit into memory, 10 for
    --fail-on: warnings, asymmetry, difference, gradient_seconds, product_seconds, graph_bytes, and the forecast_seconds
    and forecast_bytes of --command.

    Examples: `curv doctor`; `curv doctor demo:hamlet --command "spectrum --probes 4 --steps 40"`;
    `curv doctor model.pt --fail-on "warnings > 0" --out health`;
    `curv doctor weights.pt --arch ./task.py:Net --loss cross-entropy --data train.npz --format json`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    command
        Work whose time and memory are forecast, with its options in the same pair of quotes: spectrum, eig, trace,
        diag, ihvp, landscape, roughness, sharpness, path, influence, compare or report.
    """
    prepare_written(output, "doctor")
    plan = {} if command is None else plan_of(command)
    import curvature as cv
    from curvature import errors

    diagnosis = cv.check(partial(load_objective, model, task), **plan)
    diagnosis = replace(diagnosis, findings=(_file(model, task), *diagnosis.findings))
    try:
        if output.out is not None:
            diagnosis.save(output.out)
    finally:
        if output.format == "json":
            tell(json.dumps(diagnosis.to_dict(), allow_nan=False))
        elif output.format == "human":
            _show(diagnosis)
    if failures := diagnosis.failures:
        raise getattr(errors, failures[0].error)(failures[0].seen, failures[0].fix)
    if output.format == "human":
        count = len(diagnosis.warnings)
        above = f"; {count} {'warning is' if count == 1 else 'warnings are'} above" if count else ""
        say(f"This can be analysed{above}.")
    check(diagnosis, output.fail_on)


def _file(model: str | None, task: Task) -> cv.Finding:
    """What MODEL is, and whether reading it ran code."""
    from curvature import Finding
    from curvature.io.recognise import recognise

    if model is None and task.objective is None:
        seen = "demo:digits, since no MODEL was given"
    elif model is None or is_spec(model):
        seen = f"code that you named: {task.objective or model}"
    elif model.startswith("demo:"):
        seen = f"{model}, which comes with curvature"
    else:
        runs = "read with --trust, which runs its code" if task.trust else "read as data: none of it was run"
        seen = f"{model} is {recognise(model).value}, {runs}"
    return Finding(name="file", status="ok", seen=seen)


def _show(diagnosis: cv.Diagnosis) -> None:
    """A line for each finding and one for its fix, with colours on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=standard_output(), highlight=False, emoji=False)
    table = Table.grid(padding=(0, 2))
    for finding in diagnosis.findings:
        seen = Text(_printable(finding.seen))
        if finding.fix:
            seen.append(f"\n-> {_printable(finding.fix)}", style="bold")
        table.add_row(Text(finding.status, style=COLOURS[finding.status]), Text(finding.name), seen)
    if not console.is_terminal:
        console.width = 10_000  # lines of a file or a pipe are not folded
    with console.capture() as shown:
        console.print(table)
    tell("\n".join(line.rstrip() for line in shown.get().splitlines()))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
