"""The app, and how its errors end: one line of cause, one of fix, and an exit code."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError

from .config import Configured
from .output import is_due_to, results_alone, say, warn

OK, INTERNAL, USAGE, UNREADABLE, UNSAFE, NOT_DIFFERENTIABLE, NUMERICAL, RESOURCES = range(8)
GATE_FAILED, INTERRUPTED, TERMINATED = 10, 130, 143
CODES = {  # by class name, so that no error makes us import torch
    "Misuse": USAGE,
    "BadFile": UNREADABLE,
    "UnsafeFile": UNSAFE,
    "BadObjective": NOT_DIFFERENTIABLE,
    "NonFinite": NUMERICAL,
    "NotConverged": NUMERICAL,
    "TooLarge": RESOURCES,
    "GateFailed": GATE_FAILED,
}
HELP = """Curvature of the loss of PyTorch models, with honest error bars.

`curv spectrum` analyses an embedded model, `curv spectrum model.pt` one of yours.

MODEL is demo:digits, demo:digits-cnn or demo:hamlet, a file written by objective.save, weights with --arch (of \
torch.save, Lightning, safetensors, in one file or several, or a distributed one), a Hugging Face or PEFT folder, \
a TorchScript or .pt2 program with --trust, or code that returns an objective: ./file.py:name or package.module:name.

Defaults of options can be kept in ./curv.toml, or [tool.curv] in ./pyproject.toml, at the top or in one table a \
command, and in variables CURV_OPTION and CURV_COMMAND_OPTION. The command line goes first, then variables, then the \
file; `curv env --config` tells what is set where.

Ctrl-C keeps what is measured until then. It waits for the call of torch that runs, at the longest the backward pass \
of a batch: a smaller --batch-size makes that shorter.

Exit codes: 0 ok, 1 internal error, 2 usage, 3 file unreadable, 4 refused as unsafe, 5 model or loss cannot be \
analysed, 6 numerical failure, 7 out of memory or disk, 10 --fail-on, 130 interrupted.
"""
COMMANDS = (
    "spectrum",
    "eig",
    "trace",
    "diag",
    "landscape",
    "roughness",
    "sharpness",
    "path",
    "ihvp",
    "influence",
    "compare",
    "optim",
    "report",
    "doctor",
    "inspect",
    "env",
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: partial results are written as for Ctrl-C."""


def _version() -> str:
    from importlib.metadata import version

    return version("curvature-toolkit")


def build() -> App:
    """The app with every command, each in a module of its own; none of these imports torch before it runs."""
    app = App(
        name="curv",
        help=HELP,
        help_format="plaintext",
        version=_version,
        suppress_keyboard_interrupt=False,  # `run` says what became of the results
    )
    app.config = (Configured(app, COMMANDS),)
    for command in COMMANDS:
        function = getattr(importlib.import_module(f".{command}", __package__), command)
        app.command(results_alone()(function))
    app.register_install_completion_command(help="Complete commands and options in this shell from now on.")
    return app


def main(tokens: list[str] | None = None) -> NoReturn:
    """Run one command line and exit with its code."""
    tokens = sys.argv[1:] if tokens is None else tokens
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a sign for ± loses that sign alone
    sys.exit(run(tokens))


def run(tokens: list[str]) -> int:
    """Run one command line; the exit code."""
    try:
        build()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return OK
    except CycloptsError as error:
        _say(f"{error}", "Run `curv --help`, or `curv COMMAND --help`.")
        return USAGE
    except KeyboardInterrupt as stop:
        if getattr(stop, "result", None) is None:
            warn("interrupted before there was anything to keep.")
        return TERMINATED if is_due_to(stop, Terminated) else INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return OK
    except Exception as error:
        if "--debug" in tokens:
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print cause and fix of a failure on stderr; the exit code it stands for."""
    code = next((CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CODES), None)
    if code is not None:
        _say(getattr(error, "cause", str(error)), getattr(error, "fix", ""))
        return code
    if isinstance(error, ValueError | TypeError) and _raised_in_library(error):
        _say(str(error), "Change that option; `curv COMMAND --help` lists them.")
        return USAGE
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "OutOfMemory" in type(error).__name__:
        _say("out of memory.", "Ask for fewer probes or steps, a smaller --batch-size, or fewer --params.")
        return RESOURCES
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _say(f"{error}.", "Free some disk space." if full else "Check the path and its permissions.")
        return RESOURCES if full else UNREADABLE
    first = (str(error).strip().splitlines() or [""])[0]
    _say(f"internal error: {type(error).__name__}: {first}", "Run again with --debug and report the traceback.")
    return INTERNAL


def _raised_in_library(error: Exception) -> bool:
    """Whether the last frame is our own: a value that the library refuses, not an accident further down."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    specs = (importlib.util.find_spec(name) for name in ("curvature", "curvature_cli"))
    return any(spec and spec.origin and place.is_relative_to(Path(spec.origin).parent) for spec in specs)


def _say(cause: str, fix: str) -> None:
    warn(cause)
    if fix:
        say(fix)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
