"""What long work reports to, and where it keeps what it has: the command line and notebooks draw, nothing here does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Progress:
    """Where a measurement stands: `done` of `total` units of work (at most, where it may be over before), a line about
    the estimate as it is now, with its error, and the seconds that are `left` if it goes on like this."""

    question: str
    done: int
    total: int
    unit: str = "steps"
    note: str = ""
    left: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long work reports and where it is kept: `progress` is called after every unit, from the thread that does the
    work; to the file `checkpoint` goes what was computed, as it comes.

    Work that was killed, at any moment, and is started again with the same checkpoint reads what is there, does the
    rest, and returns the same bits as if it had never stopped. The file is of about the size of the vectors that are
    multiplied, and is left when the work is done: delete it then.
    """

    progress: Callable[[Progress], None] | None = None
    checkpoint: str | Path | None = None

    def report(self, progress: Progress) -> None:
        """Pass `progress` on, if anybody listens."""
        if self.progress is not None:
            self.progress(progress)
