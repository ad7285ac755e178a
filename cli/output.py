"""From a measurement to the person: progress on stderr, the table or JSON on stdout, files in --out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .options import Misuse, Output

if TYPE_CHECKING:
    import curvature as cv

R = TypeVar("R", bound="cv.Result")

FILES = ("result.json", "arrays.safetensors")  # what `Result.save` writes
PATIENCE = 10.0  # seconds between lines of progress where there is no terminal


def prepare(output: Output, command: str) -> None:
    """Refuse, before any work is done, what could not be written afterwards; set the number of threads."""
    if output.out is not None:
        _check_folder(output.out, command, output.overwrite)
    if output.threads is not None:
        import torch

        torch.set_num_threads(output.threads)


def _check_folder(out: Path, command: str, overwrite: bool) -> None:
    place = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise Misuse(f"{place} is not a folder, which --out takes.", "Give another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise Misuse(f"Nothing can be written in {place}.", "Check its permissions, or give another --out.")
    present = [name for name in (*FILES, f"{command}.png") if (out / name).exists()]
    if present and not overwrite:
        raise Misuse(f"{out} already holds {', '.join(present)}.", "Pass --overwrite, or another --out.")


def deliver(measure: Callable[[cv.Run], R], output: Output, command: str, **style: Any) -> R:
    """Measure under a progress display and emit the result; after an interrupt what there is, then the interrupt.
    `style` is how the picture is drawn."""
    from curvature import Interrupted

    try:
        with _display(output) as run:
            result = measure(run)
    except Interrupted as stop:
        emit(stop.result, output, command, **style)
        warn("interrupted: this is what was measured until then.")
        raise
    emit(result, output, command, **style)
    return result


def emit(result: cv.Result, output: Output, command: str, **style: Any) -> None:
    """Write the files, then the table or JSON; these also when writing fails, since the numbers may be dear."""
    note = "Nothing was written; --out DIR keeps the numbers and a picture."
    try:
        if output.out is not None:
            folder = result.save(output.out)
            picture = _picture(result, folder / f"{command}.png", style)
            note = f"Written to {folder}: {', '.join(FILES)}{picture}"
    finally:
        if output.format == "json":
            print(json.dumps(result.to_dict(), allow_nan=False))
        elif output.format == "human":
            print(_table(result))
    if output.format == "human":
        say(note)


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


def _picture(result: cv.Result, path: Path, style: dict[str, Any]) -> str:
    """Draw the result to `path`; the words that name it, or none where matplotlib is missing, or a picture of it."""
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
    from curvature import Run

    kind = output.progress
    if kind == "auto":
        kind = "none" if output.format == "quiet" else "bar" if sys.stderr.isatty() else "log"
    if kind == "none":
        yield Run(checkpoint=output.checkpoint)
    elif kind == "log":
        yield Run(progress=_Log(), checkpoint=output.checkpoint)
    else:
        with _bar() as progress:
            yield Run(progress=progress, checkpoint=output.checkpoint)


class _Log:
    """Prints a line of progress every PATIENCE seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, progress: cv.Progress) -> None:
        now = time.monotonic()
        if now - self.last < PATIENCE:
            return
        self.last = now
        warn(f"{progress.done}/{progress.total} {progress.unit}, at most {progress.left:.0f} s left, {progress.note}")


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
