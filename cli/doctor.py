"""curv doctor: whether a model can be analysed, and if not, where and what to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .code import is_spec
from .load import load_objective
from .options import NUMBERS, Config, Format, Misuse, Task
from .output import say

if TYPE_CHECKING:
    import curvature as cv

COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
PLANS: dict[str, Callable[[dict[str, Any]], dict[str, int]]] = {  # by command, from its options
    "spectrum": lambda o: _products(o["probes"] * o["steps"], o["steps"], vectors=_kept(o)),
    "eig": lambda o: _eig(**{name: o[name] for name in ("k", "method", "max_steps", "block")}),
    "trace": lambda o: _products(o["goal"].products, vectors=o["goal"].products),
    "diag": lambda o: _products(o["goal"].products, vectors=o["goal"].products),
    "ihvp": lambda o: _products(o["max_steps"], vectors=5),
    "landscape": lambda o: {"losses": (o["points"] or (101 if o["axes"] == "1" else 51)) ** int(o["axes"])},
    "roughness": lambda o: {"losses": o["directions"] * (o["steps"] + 1), "vectors": o["directions"]},
    "path": lambda o: {"losses": o["points"]},
}


def doctor(
    model: str | None = None,
    /,
    *,
    command: Annotated[str | None, Parameter(group=NUMBERS)] = None,
    task: Task = Task(),
    format: Format = "human",
    debug: Annotated[bool, Parameter(negative=())] = False,
    config: Config = None,
) -> None:
    """Can this be analysed, and if not: which part of the model, which words of torch, which fix.

    On the first batch, by at most ten products with the Hessian: numbers are finite, the loss repeats, every backward
    can be differentiated, second derivatives are right, and which engines work. Exit code 0 also with warnings, 5 when
    there are no second derivatives, 6 for numbers that are none, 7 when --command does not fit into memory.

    Examples: `curv doctor`; `curv doctor demo:hamlet --command "spectrum --probes 4 --steps 40"`;
    `curv doctor weights.pt --arch ./task.py:Net --loss cross-entropy --data train.npz --format json`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    command
        Work whose time and memory are forecast: spectrum, eig, trace, diag, ihvp, landscape, roughness or path, with
        its options in the same pair of quotes.
    format
        A table, JSON, or nothing (the exit code alone tells).
    debug
        Show the traceback of an error.
    config
        A TOML file of defaults, in place of ./curv.toml or [tool.curv] in ./pyproject.toml.
    """
    plan = {} if command is None else _plan(command)
    import curvature as cv
    from curvature import errors

    diagnosis = cv.check(partial(load_objective, model, task), **plan)
    diagnosis = replace(diagnosis, findings=(_file(model, task), *diagnosis.findings))
    if format == "json":
        print(json.dumps(diagnosis.to_dict(), allow_nan=False))
    elif format == "human":
        _show(diagnosis)
    if failures := diagnosis.failures:
        raise getattr(errors, failures[0].error)(failures[0].seen, failures[0].fix)
    if format == "human":
        count = len(diagnosis.warnings)
        above = f"; {count} {'warning is' if count == 1 else 'warnings are'} above" if count else ""
        say(f"This can be analysed{above}.")


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


def _plan(command: str) -> dict[str, int]:
    """The products, losses and vectors of a command line; Misuse where there is no such command."""
    from .main import build

    name, *options = shlex.split(command) or [""]
    if name not in PLANS:
        raise Misuse(f"--command takes {', '.join(PLANS)}, but got {name!r}.", "Leave it out for the others.")
    _, bound, _ = build().parse_args([name, *options], exit_on_error=False, print_error=False)
    bound.apply_defaults()
    return PLANS[name](bound.arguments)


def _products(products: int, passes: int | None = None, *, vectors: int) -> dict[str, int]:
    return {"products": products, "passes": products if passes is None else passes, "vectors": vectors}


def _kept(options: dict[str, Any]) -> int:
    """The vectors of the Krylov bases of a spectrum."""
    return options["probes"] * (options["steps"] + 1 if options["keep"] == "device" else 3)


def _eig(k: int, method: str, max_steps: int | None, block: int | None) -> dict[str, int]:
    """At most so much: eigenvalues that are apart take far fewer steps."""
    steps = max_steps or (30 if method == "krylov" else 200)
    width = block or (k + 2 if method == "krylov" else 4)
    vectors = steps * width if method == "krylov" else max(3 * k, 24) + 5 * width
    return _products(steps * width, steps, vectors=vectors)


def _show(diagnosis: cv.Diagnosis) -> None:
    """A line for each finding and one for its fix, with colours on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, emoji=False)
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
    print("\n".join(line.rstrip() for line in shown.get().splitlines()))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
