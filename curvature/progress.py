"""The one callback that long work reports to; the command line and notebooks draw it, nothing here does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a measurement stands: `done` of `total` units of work, and one line about the current estimate."""

    question: str
    done: int
    total: int
    unit: str = "steps"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long work reports: `progress` is called after every unit, from the thread that does the work."""

    progress: Callable[[Progress], None] | None = None

    def report(self, progress: Progress) -> None:
        """Pass `progress` on, if anybody listens."""
        if self.progress is not None:
            self.progress(progress)
