"""What long work reports to, and where it keeps what it has: the command line and notebooks draw, nothing here does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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


class Spent(KeyboardInterrupt):
    """The budget is used up: work ends as if somebody had interrupted it."""


class Budget:
    """What work may take: so many `products` with operators, and so many `seconds` from when this is made.

    At its end work is interrupted: it raises Interrupted with what it has. Of a checkpoint only what is done anew
    counts. Products end at the same place every time, so that the result can be had again; seconds do not.
    """

    def __init__(self, *, products: float = math.inf, seconds: float = math.inf) -> None:
        if not (products >= 1 and seconds > 0):
            raise ValueError(f"A budget is at least a product and more than no time, but got {products} and {seconds}.")
        self.products = products
        self.end = time.monotonic() + seconds

    def spend(self, products: int = 0) -> None:
        """Take so many products out of it; Spent where there are not as many, or the time is over."""
        if products > self.products or time.monotonic() > self.end:
            raise Spent
        self.products -= products


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long work reports and where it is kept: `progress` is called after every unit, from the thread that does the
    work; to the file `checkpoint` goes what was computed, as it comes; `budget` is what it may take.

    Work that was killed, at any moment, and is started again with the same checkpoint reads what is there, does the
    rest, and returns the same bits as if it had never stopped. The file is of about the size of the vectors that are
    multiplied, and is left when the work is done: delete it then.
    """

    progress: Callable[[Progress], None] | None = None
    checkpoint: str | Path | None = None
    budget: Budget | None = None

    def spend(self, products: int = 0) -> None:
        """Take so many products out of the budget, if there is one; Spent at its end."""
        if self.budget is not None:
            self.budget.spend(products)

    def part(self, name: str) -> Run:
        """Of a part of the work: with a checkpoint of its own."""
        return replace(self, checkpoint=None if self.checkpoint is None else f"{self.checkpoint}.{name}")

    def report(self, progress: Progress) -> None:
        """Pass `progress` on, if anybody listens."""
        if self.progress is not None:
            self.progress(progress)
