"""The app, and how its errors end: one line of cause, one of fix, and an exit code."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError
from cyclopts.config import Toml

OK, INTERNAL, USAGE, UNREADABLE, UNSAFE, NOT_DIFFERENTIABLE, NUMERICAL, RESOURCES = range(8)
INTERRUPTED, TERMINATED = 130, 143
CODES = {  # by class name, so that no error makes us import torch
    "BadFile": UNREADABLE,
    "UnsafeFile": UNSAFE,
    "BadObjective": NOT_DIFFERENTIABLE,
    "NonFinite": NUMERICAL,
    "NotConverged": NUMERICAL,
    "TooLarge": RESOURCES,
}
HELP = """Curvature of the loss of PyTorch models, with honest error bars.

`curv spectrum` analyses an embedded model, `curv spectrum model.pt` one of yours.

MODEL is demo:digits, demo:digits-cnn or demo:hamlet, a file written by objective.save, weights with --arch, a Hugging \
Face folder, or code that returns an objective: ./file.py:name or package.module:name.

Defaults of options can be kept in ./curv.toml, one table a command.

Exit codes: 0 ok, 1 internal error, 2 usage, 3 file unreadable, 4 refused as unsafe, 5 model or loss cannot be \
analysed, 6 numerical failure, 7 out of memory or disk, 130 interrupted.
"""
COMMANDS = {
    "spectrum": "The whole eigenvalue distribution: bulk, outliers, negative mass.",
    "eig": "Extreme eigenvalues with their residuals.",
    "trace": "The sum of all eigenvalues, with a confidence interval.",
    "inspect": "What is in a model file; runs none of it.",
    "env": "Versions, device and memory, for a bug report.",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: partial results are written as for Ctrl-C."""


def _version() -> str:
    from importlib.metadata import version

    return version("curvature-toolkit")


def build() -> App:
    """The app with every command, each in a module of its own that is imported when it is asked for."""
    app = App(name="curv", help=HELP, help_format="plaintext", version=_version, config=_without_trust)
    for command, line in COMMANDS.items():
        app.command(f"curvature_cli.{command}:{command}", name=command, help=line)
    return app


def _without_trust(app: App, commands: tuple[str, ...], arguments: object) -> None:
    """Options from ./curv.toml; whether to run code from a model file is never among them."""
    toml = Toml("curv.toml", must_exist=False)
    named = {key for table in (toml.config, *toml.config.values()) if isinstance(table, dict) for key in table}
    if "trust" in named:
        raise CycloptsError(msg='"trust" cannot be set in curv.toml: say --trust for each file that you trust.')
    toml(app, commands, arguments)  # pyright: ignore[reportArgumentType]


def main(tokens: list[str] | None = None) -> NoReturn:
    """Run one command line and exit with its code."""
    tokens = sys.argv[1:] if tokens is None else tokens
    signal.signal(signal.SIGTERM, _terminate)
    code = run(tokens)
    sys.stdout.flush()
    sys.exit(code)


def run(tokens: list[str]) -> int:
    """Run one command line; the exit code."""
    try:
        build()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return OK
    except CycloptsError as error:
        _say(f"curv: {error}", "Run `curv --help`, or `curv COMMAND --help`.")
        return USAGE
    except Terminated:
        return TERMINATED
    except KeyboardInterrupt as stop:
        if not getattr(stop, "result", None):
            _say("curv: interrupted before there was anything to keep.")
        return INTERRUPTED
    except Exception as error:
        if "--debug" in tokens:
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print cause and fix of a failure on stderr; the exit code it stands for."""
    code = next((CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CODES), None)
    if code is not None:
        _say(f"curv: {getattr(error, 'cause', error)}", getattr(error, "fix", ""))
        return code
    if isinstance(error, ValueError | TypeError) and _raised_in_library(error):
        _say(f"curv: {error}", "Change that option; `curv COMMAND --help` lists them.")
        return USAGE
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "OutOfMemory" in type(error).__name__:
        _say("curv: out of memory.", "Ask for fewer probes or steps, a smaller --batch-size, or fewer --params.")
        return RESOURCES
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _say(f"curv: {error}", "Free some disk space." if full else "Check the path and its permissions.")
        return RESOURCES if full else UNREADABLE
    first = (str(error).strip().splitlines() or [""])[0]
    _say(f"curv: internal error: {type(error).__name__}: {first}", "Run again with --debug and report the traceback.")
    return INTERNAL


def _raised_in_library(error: Exception) -> bool:
    """Whether the last frame is our own: a value that the library refuses, not an accident further down."""
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).parent.name
    return bool(frames) and any(
        part in Path(frames[-1].filename).parts for part in ("curvature", "curvature_cli", here)
    )


def _say(cause: str, fix: str = "") -> None:
    for line in (cause, fix):
        if line:
            print(_clean(line), file=sys.stderr)


def _clean(text: str) -> str:
    """One line without control characters: names in files are not ours."""
    return "".join(c if c.isprintable() else " " for c in text)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
