"""From a measurement to the person: progress on stderr, the table or JSON on stdout, files in --out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from .gates import check, foresee
from .options import Misuse, Output, Written, parsed_budget

if TYPE_CHECKING:
    import curvature as cv

R = TypeVar("R", bound="cv.Result")

FILES = ("result.json", "arrays.safetensors")  # what `Result.save` writes
PATIENCE = 10.0  # seconds between lines of progress where there is no terminal


_results: list[TextIO] = []  # standard output, while `results_alone`


def prepare(output: Output, command: str, *, products: bool = True) -> None:
    """Refuse, before any work is done, what could not be done or written afterwards; set the number of threads.
    `products` says whether the command takes any with a matrix."""
    if output.budget is not None and "products" in parsed_budget(output.budget) and not products:
        raise Misuse(f"curv {command} takes no products with a matrix.", "Give a --budget of time, such as 10m.")
    begun = False
    if output.resume:
        if output.out is None:
            raise Misuse("--resume is for work that is kept in --out.", "Pass --out DIR, too.")
        begun = bool(_begun(output.out))
        if not begun and not output.overwrite and _present(output.out, command):
            raise Misuse(f"The work in {output.out} is done.", "Pass --overwrite to do it again, or another --out.")
    prepare_written(output, command, begun=begun)


def prepare_written(output: Written, command: str, *, begun: bool = False) -> None:
    """The same for what every command is asked; `begun` says that what is in --out is to be gone on with."""
    foresee(output.fail_on, command)
    if output.out is not None:
        from curvature.io.files import clear_stale

        clear_stale(output.out)
        _check_folder(output.out, command, output.overwrite or begun)
    if output.threads is not None:
        import torch

        torch.set_num_threads(output.threads)


def _check_folder(out: Path, command: str, overwrite: bool) -> None:
    place = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise Misuse(f"{place} is not a folder, which --out takes.", "Give another --out.")
    try:
        TemporaryDirectory(prefix=".curv-", dir=place).cleanup()  # os.access knows nothing of most file systems
    except OSError as error:
        raise Misuse(
            f"Nothing can be written in {place}: {error.strerror}.", "Check its permissions, or give another --out."
        ) from error
    if (present := _present(out, command)) and not overwrite:
        raise Misuse(f"{out} already holds {', '.join(present)}.", "Pass --overwrite, or another --out.")


def _present(out: Path, command: str) -> list[str]:
    """The files of a result that are in a folder."""
    views = (f"{command}.{kind}" for kind in ("csv", "png", "html"))
    return [name for name in (*FILES, *views) if (out / name).exists()]


def _free(out: Path, command: str) -> Path:
    """`out`, or where another run has written into it meanwhile the first of out-2, out-3, ... without a result."""
    others = (out.with_name(f"{out.name}-{number}") for number in count(2))
    free = next(path for path in chain([out], others) if not _present(path, command))
    if free != out:
        warn(f"another run has written into {out} meanwhile.")
    return free


def deliver(measure: Callable[[cv.Run], R], output: Output, command: str, **style: Any) -> R:
    """Measure under a progress display and emit the result; after an interrupt, or at the end of the budget, what there
    is then. An interrupt is raised again. Then the gates are asked. `style` is how the picture is drawn."""
    from curvature import Interrupted, TooLarge
    from curvature.progress import Spent

    go_on = " The same command goes on." if output.resume else ""
    try:
        with _display(output) as run:
            result = measure(run)
    except Interrupted as stop:
        emit(stop.result, output, command, **style)
        if not is_due_to(stop, Spent):
            warn(f"interrupted: this is what was measured until then.{go_on}")
            raise
        warn(f"the budget of {output.budget} is spent: this is what was measured until then.{go_on}")
        result = stop.result
    except KeyboardInterrupt as stop:
        if is_due_to(stop, Spent):
            cause = f"The budget of {output.budget} was spent before there was anything to tell."
            raise TooLarge(cause, go_on.strip() or "Give more.") from stop
        raise
    else:
        emit(result, output, command, **style)
        if output.resume and output.out is not None:
            for path in _begun(output.out):
                path.unlink()
    for close in check(result, output.fail_on):
        warn(close)
    return result


def is_due_to(stop: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether that kind of interrupt is behind this one."""
    while stop is not None and not isinstance(stop, kind):
        stop = stop.__cause__
    return stop is not None


def _checkpoint(out: Path) -> Path:
    return out / "checkpoint"


def _begun(out: Path) -> list[Path]:
    """The checkpoints of work that is not done: those of its parts, and then its own."""
    own = _checkpoint(out)
    return [*out.glob(f"{own.name}.*"), *out.glob(own.name)]


def emit(result: cv.Result, output: Output, command: str, **style: Any) -> None:
    """Write the files, then the table or JSON; these also when writing fails, since the numbers may be dear."""
    from curvature import Interrupted

    note = "Nothing was written; --out DIR keeps the numbers and a picture."
    try:
        if output.out is not None:
            out = output.out if output.overwrite or output.resume else _free(output.out, command)
            folder = result.save(out)
            rows = f", {result.save_table(folder / f'{command}.csv').name}" if result.table() else ""
            note = f"Written to {folder}: {', '.join(FILES)}{rows}{_view(result, folder, command, style)}"
    except KeyboardInterrupt as stop:
        warn(f"interrupted while writing to {output.out}, where something may be missing.")
        raise Interrupted(result) from stop
    finally:
        if output.format == "json":
            tell(json.dumps(result.to_dict(), allow_nan=False))
        elif output.format == "human":
            tell(_table(result))
    if output.format == "human":
        say(note)


@contextmanager
def results_alone() -> Iterator[None]:
    """Standard output is for `tell`: what models print goes to standard error."""
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def standard_output() -> TextIO:
    """That of the process."""
    return _results[-1] if _results else sys.stdout


def tell(text: str) -> None:
    """A result, on standard output."""
    print(text, file=standard_output())


def warn(text: str) -> None:
    """One line on stderr, marked as ours."""
    say(f"curv: {text}")


def say(text: str) -> None:
    """One line on stderr, without control characters: names in files are not ours."""
    print("".join(c if c.isprintable() else " " for c in text), file=sys.stderr)


def _table(result: cv.Result) -> str:
    operator = result.origin.operator
    while "model" not in operator and "of" in operator:  # an inverse, say, of what has one
        operator = operator["of"]
    loss = f", {operator['loss']}" if "loss" in operator else ""
    title = f"{operator.get('operator', '')} of {operator.get('model', 'an operator')}{loss}"
    rows = {title: "", **result.summary()}
    width = max(len(label) for label in result.summary())
    lines = [f"{label:<{width}}  {text}".rstrip() for label, text in rows.items()]
    return "\n".join([*lines, f"{'cost':<{width}}  {result.cost}"])


def _view(result: cv.Result, folder: Path, command: str, style: dict[str, Any]) -> str:
    """Write the page of a report, or the picture of anything else; the words that name it, or none where matplotlib
    is missing, or a picture of it."""
    import curvature as cv

    if isinstance(result, cv.Report):
        return f", {result.save_page(folder / 'report.html', **style).name}"
    path = folder / f"{command}.png"
    try:
        from curvature.plots import drawable

        if not drawable(result):
            return ""
        result.save_picture(path, **style)
    except ImportError as error:
        warn(str(error))
        return ""
    return f", {path.name}"


@contextmanager
def _display(output: Output) -> Iterator[cv.Run]:
    """A Run whose progress is a bar on a terminal, a line now and then elsewhere, or nothing."""
    from curvature import Budget, Run

    checkpoint = _checkpoint(output.out) if output.resume and output.out is not None else None
    budget = None if output.budget is None else Budget(**parsed_budget(output.budget))
    kind = output.progress
    if kind == "auto":
        kind = "none" if output.format == "quiet" else "bar" if sys.stderr.isatty() else "log"
    if kind == "none":
        yield Run(checkpoint=checkpoint, budget=budget)
    elif kind == "log":
        yield Run(progress=_Log(), checkpoint=checkpoint, budget=budget)
    else:
        with _bar() as progress:
            yield Run(progress=progress, checkpoint=checkpoint, budget=budget)


class _Log:
    """Prints a line of progress every PATIENCE seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, progress: cv.Progress) -> None:
        now = time.monotonic()
        if now - self.last < PATIENCE:
            return
        self.last = now
        note = f", {progress.note}" if progress.note else ""
        warn(f"{progress.done}/{progress.total} {progress.unit}, at most {progress.left:.0f} s left{note}")


@contextmanager
def _bar() -> Iterator[Callable[[cv.Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[note]}", markup=False), console=Console(stderr=True),
             transient=True) as bar:  # fmt: skip
        task = bar.add_task("starting", total=None, note="")

        def update(progress: cv.Progress) -> None:
            bar.update(task, description=progress.question, completed=progress.done, total=progress.total,
                       note=progress.note)  # fmt: skip

        yield update
