"""One question put to one operator: its products are counted, timed and checked here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.memory import peak_bytes
from curvature.linalg.operator import LinearOperator
from curvature.progress import Progress, Run
from curvature.result import Cost, Estimate, Origin


class Measurement:
    """What a question has asked of an operator so far. Every product of a measurement goes through `apply`."""

    def __init__(
        self,
        A: LinearOperator,
        question: str,
        *,
        options: Mapping[str, Any],
        seed: int | None = None,
        run: Run | None = None,
    ) -> None:
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"{question} needs a square operator, but got {A.shape}.")
        if A.shape[0] == 0:
            raise ValueError(f"{question} needs an operator with at least one row, but got {A.shape}.")
        self.operator, self.question = A, question
        self.options, self.seed = dict(options), seed
        self.run = run or Run()
        self.products = 0
        self._started = time.perf_counter()
        self._passes = self._passes_of_parts()
        if A.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(A.device)

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """A times each row; NonFinite when a product is not finite, which would poison all that follows."""
        if self.products == 0:
            describe(self.operator)  # hashes model and data: should that fail, then before the work
        self.products += len(rows)
        product = self.operator.apply(rows).detach()  # of a matrix that is a parameter, say
        if not torch.isfinite(product).all():
            raise NonFinite(
                f"A product with {self.operator!r} has entries that are not finite.",
                "Check the weights and the loss for NaN and overflow, or measure in float64.",
            )
        return product

    def report(self, done: int, total: int, note: str = "", unit: str = "steps") -> None:
        """Tell whoever listens that `done` of `total` units of work are done."""
        self.run.report(Progress(self.question, done, total, unit, note))

    @property
    def cost(self) -> Cost:
        """What the measurement has taken so far."""
        return Cost(
            products=self.products,
            passes=self._passes_of_parts() - self._passes,
            seconds=time.perf_counter() - self._started,
            peak_bytes=peak_bytes(self.operator.device),
        )

    @property
    def origin(self) -> Origin:
        """What is needed to ask the same again."""
        return Origin(question=self.question, options=self.options, seed=self.seed, operator=self.described)

    @property
    def described(self) -> dict[str, Any]:
        """What the operator was made from, and how its products have been computed."""
        return describe(self.operator)

    def exact(self, value: Tensor, floor: float = 0.0) -> Estimate:
        """The result of a measurement that took no samples; `floor` bounds its rounding."""
        return self.estimate(value, torch.zeros(()), samples=0, dof=0, floor=floor)

    def estimate(self, value: Tensor, stderr: Tensor, *, samples: int, dof: float, floor: float) -> Estimate:
        """The result that so many samples amount to."""
        return Estimate(
            value=value.cpu(),
            stderr=stderr.double().cpu(),
            samples=samples,
            dof=dof,
            floor=floor,
            cost=self.cost,
            origin=self.origin,
        )

    def _passes_of_parts(self) -> int:
        meters = {id(leaf.meter): leaf.meter for leaf in self.operator.leaves() if leaf.meter}
        return sum(meter.passes for meter in meters.values())


def describe(A: LinearOperator) -> dict[str, Any]:
    """What A was made from, JSON-ready; a composition lists its parts."""
    facts = {"shape": list(A.shape), "dtype": str(A.dtype).removeprefix("torch."), "device": str(A.device)}
    if A.source or not A.parts:
        return {**A.source, **facts}
    return {"operator": type(A).__name__, **facts, "parts": [dict(leaf.source) for leaf in A.leaves()]}
