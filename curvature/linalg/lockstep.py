"""One question to many diagonal blocks of a matrix, their products taken together: as many passes over the data as one
block would take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.operator import LinearOperator, Meter
from curvature.linalg.space import Space
from curvature.progress import Progress, Run
from curvature.result import Result

R = TypeVar("R", bound=Result)
Places = Mapping[str, Tensor]

ENTRIES = 1 << 28  # of the vectors multiplied at once: 1 GiB in float32


class Block(LinearOperator):
    """The diagonal block of A at the coordinates `place`, whose products are taken with those of the others."""

    def __init__(
        self, A: LinearOperator, name: str, place: Tensor, meter: Meter, ask: Callable[[Tensor], Tensor]
    ) -> None:
        self.domain = self.codomain = Space(len(place), A.dtype, A.device)
        self.symmetric, self.psd, self.meter, self.ask = A.symmetric, A.psd, meter, ask
        self.source = {"operator": "block", "block": name, "of": describe(A)}

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return self.ask(rows)


class Lockstep:
    """Threads that each ask about one block, and wait for products until all of them do.

    The products themselves are computed in the thread that made this; between them the blocks' own work goes on side by
    side. What comes out does not depend on which thread is first.
    """

    def __init__(self, measurement: Measurement, places: Places) -> None:
        self.measurement, self.places = measurement, places
        self.meter = Meter()
        self.changed = threading.Condition()
        self.asked: dict[str, Tensor] = {}
        self.answers: dict[str, Tensor] = {}
        self.progress: dict[str, Progress] = {}
        self.results: dict[str, Result] = {}
        self.failures: dict[str, BaseException] = {}
        self.stop: type[BaseException] | None = None  # what is raised in all threads

    def run(self, question: Callable[[LinearOperator, Run], R]) -> dict[str, R]:
        """The answers by block; of an interrupt those of all that have one by then."""
        A = self.measurement.operator
        threads = [
            threading.Thread(
                target=self._work,
                args=(name, Block(A, name, place, self.meter, partial(self._ask, name)), question),
                daemon=True,
            )
            for name, place in self.places.items()
        ]
        try:
            for thread in threads:
                thread.start()
            while self._wait() and not self.failures:
                self._multiply()
        except BaseException as error:
            self._abandon(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else _Abandoned, threads)
            if not isinstance(error, KeyboardInterrupt) or not self.results:
                raise
            raise Interrupted(self._ordered()) from error
        self._abandon(_Abandoned, threads)
        for error in self.failures.values():  # the first is not for another's sake
            raise error
        return self._ordered()

    def _ordered(self) -> dict[str, Any]:
        return {name: self.results[name] for name in self.places if name in self.results}

    def _work(self, name: str, block: Block, question: Callable[[LinearOperator, Run], Result]) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP counts them for each thread
        try:
            result = question(block, Run(progress=partial(self.progress.__setitem__, name)))
        except Interrupted as stopped:
            result = stopped.result
        except BaseException as error:
            error.add_note(f"In the block {name!r}.")
            with self.changed:
                self.failures[name] = error
                self.changed.notify_all()
            return
        with self.changed:
            self.results[name] = result
            self.changed.notify_all()

    def _ask(self, name: str, rows: Tensor) -> Tensor:
        with self.changed:
            self.asked[name] = rows
            self.changed.notify_all()
            self.changed.wait_for(lambda: name in self.answers or self.stop is not None)
            if self.stop is not None:
                raise self.stop
            return self.answers.pop(name)

    def _wait(self) -> bool:
        """Until all blocks ask or are done; False when all are done."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.asked) + len(self.results) + len(self.failures) == len(self.places))
            return bool(self.asked)

    def _multiply(self) -> None:
        asked = {name: self.asked[name] for name in self.places if name in self.asked}
        sums = torch.cat([rows.sum(1, keepdim=True, dtype=torch.float64) for rows in asked.values()])
        answers = self.measurement.once(partial(self._products, asked), sums)
        self.meter.passes = self.measurement.cost.passes
        reports = self.progress.values()
        if reports:
            done, total = sum(report.done for report in reports), sum(report.total for report in reports)
            note = f"{len(self.results)} of {len(self.places)} blocks done"
            self.measurement.report(done, total, note, unit=next(iter(reports)).unit)
        with self.changed:
            self.asked.clear()
            self.answers.update(answers)
            self.changed.notify_all()

    def _products(self, asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The products of all blocks with their rows, each of which is zero outside its block."""
        A = self.measurement.operator
        owners = [(name, i) for name, rows in asked.items() for i in range(len(rows))]
        answers = {name: torch.empty_like(rows) for name, rows in asked.items()}
        together = max(1, ENTRIES // A.shape[0])
        for start in range(0, len(owners), together):
            some = owners[start : start + together]
            rows = torch.zeros(len(some), A.shape[0], dtype=A.dtype, device=A.device)
            for row, (name, i) in zip(rows, some, strict=True):
                row[self.places[name]] = asked[name][i]
            for product, (name, i) in zip(self.measurement.apply(rows), some, strict=True):
                answers[name][i] = product[self.places[name]]
        return answers

    def _abandon(self, reason: type[BaseException], threads: list[threading.Thread]) -> None:
        """Let no thread wait any longer, and wait for all of them."""
        with self.changed:
            self.stop = reason
            self.changed.notify_all()
        for thread in threads:
            if thread.ident is not None:  # an interrupt may have come before it was started
                thread.join()


class _Abandoned(BaseException):
    """Another block has failed."""
