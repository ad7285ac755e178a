"""Exceptions that a caller may want to catch: what is wrong (`cause`) and what to do next (`fix`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CurvatureError(Exception):
    """A cause in one sentence and, where something can be done, the fix in another."""

    def __init__(self, cause: str, fix: str = ""):
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause} {self.fix}".rstrip()


class BadObjective(CurvatureError):
    """This model, loss or data cannot be analysed."""


class BadFile(CurvatureError):
    """A file is missing, unreadable, truncated, corrupt, or of a kind that is not supported."""


class UnsafeFile(CurvatureError):
    """Loading the file would run code of its author's choosing, and nobody said to trust it."""


class NonFinite(CurvatureError):
    """NaN or infinity where a finite number was needed."""


class TooLarge(CurvatureError):
    """Memory or disk would not suffice."""


class NeedsEvidence(CurvatureError):
    """A step was asked for without what the optimizer makes it of."""


class NotConverged(CurvatureError):
    """A solver stopped before its tolerance was met; `solution` is what it had."""

    def __init__(self, cause: str, fix: str = "", *, solution: Any = None):
        super().__init__(cause, fix)
        self.solution = solution


class Interrupted(KeyboardInterrupt):
    """The user stopped a computation; `result` is what was ready. Nothing is wrong: not a CurvatureError."""

    def __init__(self, result: Any = None):
        super().__init__("interrupted")
        self.result = result


def printable(text: object, limit: int = 80) -> str:
    """`text` on one line, control characters escaped, cut to `limit`: names in a file may hold anything."""
    text = str(text)
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])
    return shown if len(text) <= limit else f"{shown}..."


def listing(names: Sequence[object], limit: int = 8) -> str:
    """The first `limit` names, printable, with commas; dots stand for the rest."""
    return ", ".join([*(printable(name) for name in names[:limit]), *(["..."] if len(names) > limit else [])])


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says; of TorchScript's, which begin with a traceback, the
    last."""
    kind, lines = type(error).__name__, str(error).strip().splitlines() or [""]
    told = lines[-1 if lines[0].endswith("in the TorchScript interpreter.") else 0].removeprefix(f"{kind}: ")
    return f"{kind}: {printable(told.rstrip('.'), 160)}" if told else kind
