"""Work that takes long: how long it has taken, whom it tells, and the checkpoint from which it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature.io.journal import Journal
from curvature.linalg.memory import peak_bytes
from curvature.linalg.operator import Meter
from curvature.progress import Progress, Run
from curvature.result import Cost, Origin, versions

Record = dict[str, Tensor]
SPENT = "_spent"  # beside the tensors of a record: the cost when it was written


class Work:
    """The answer to a question in pieces. With a checkpoint, what was computed is read from there as long as there is
    some, so that what follows comes out as it would have: pieces are functions of those before and of the options.

    `described` says what the question is about, JSON-ready, `meters` count passes over its data.
    """

    def __init__(
        self,
        question: str,
        *,
        options: Mapping[str, Any],
        seed: int | None,
        run: Run | None,
        described: Callable[[], dict[str, Any]],
        meters: Callable[[], Iterable[Meter]],
        device: torch.device,
    ) -> None:
        self.question, self.options, self.seed = question, dict(options), seed
        self.run = run or Run()
        self.device = device
        self.products = 0
        self._described, self._meters = described, meters
        self._started = time.perf_counter()
        self._passes = self._read()
        self._reading = self.run.checkpoint is not None  # whether there may be more in the checkpoint
        self._next: Record | None = None  # what was read of it but not used
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def piece(self, compute: Callable[[], Record]) -> Record:
        """What `compute` returns; where the checkpoint holds that, what it says."""
        if self.run.checkpoint is not None and self._peek() is not None:
            return self._taken()
        self.run.spend()
        record = compute()
        if self.run.checkpoint is None:
            return record
        self._append(record)
        return record

    def report(self, done: int, total: int, note: str = "", unit: str = "steps") -> None:
        """Tell whoever listens that `done` of `total` units of work are done."""
        left = self.seconds * (total / done - 1)
        self.run.report(Progress(self.question, done, total, unit, note, left))

    @property
    def seconds(self) -> float:
        """How long it has taken until now, that of an earlier process included."""
        return time.perf_counter() - self._started

    @property
    def cost(self) -> Cost:
        """What it has taken so far."""
        return Cost(
            products=self.products,
            passes=self._read() - self._passes,
            seconds=self.seconds,
            peak_bytes=peak_bytes(self.device),
        )

    @property
    def described(self) -> dict[str, Any]:
        """What the question is about."""
        return self._described()

    @property
    def origin(self) -> Origin:
        """What is needed to ask the same again."""
        return Origin(question=self.question, options=self.options, seed=self.seed, operator=self.described)

    @cached_property
    def _journal(self) -> Journal:
        assert self.run.checkpoint is not None
        origin = {name: value for name, value in self.described.items() if name != "engines"}  # until now none
        heading = {"question": self.question, "options": self.options, "seed": self.seed, "operator": origin}
        facts = {"threads": torch.get_num_threads(), "versions": versions()}
        return Journal(self.run.checkpoint, {**heading, **facts})

    @property
    def _spent(self) -> Tensor:
        cost = self.cost
        return torch.tensor([cost.products, cost.passes, cost.seconds], dtype=torch.float64)

    def _peek(self) -> Record | None:
        """The next record of the checkpoint, if there is one."""
        if self._next is None and self._reading:
            self._next = self._journal.read()
            self._reading = self._next is not None
        return self._next

    def _taken(self) -> Record:
        """The next record, and the cost as it was when it was written."""
        assert self._next is not None
        record, self._next = self._next, None
        products, passes, seconds = record.pop(SPENT).tolist()
        self.products = int(products)
        self._passes = self._read() - int(passes)
        self._started = time.perf_counter() - seconds
        # copies: where a tensor begins in memory may decide about the bits of what is computed from it
        return {name: tensor.to(self.device, copy=True) for name, tensor in record.items()}

    def _append(self, record: Record) -> None:
        self._journal.append({**record, SPENT: self._spent})

    def _read(self) -> int:
        """The passes of all meters."""
        meters = {id(meter): meter for meter in self._meters()}
        return sum(meter.passes for meter in meters.values())
