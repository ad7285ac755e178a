"""When an estimate is good enough: after a budget of products, or when its interval is narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict

from curvature.errors import Interrupted
from curvature.linalg.measurement import Measurement
from curvature.result import Estimate, with_error

FIRST, GROWTH = 24, 1.5  # products before the first look, and how many times as many before each next one
CAP = 10_000  # products, where no other cap is given


class Budget(TypedDict, total=False):
    """The options of a Goal that a caller may give."""

    products: int
    rtol: float | None
    atol: float | None
    level: float
    max_products: int
    max_seconds: float


@dataclass(frozen=True)
class Goal:
    """A budget of `products`; or an interval at `level` whose half-width is at most atol + rtol |true value|.

    Of vectors these are Euclidean norms.

    The interval is looked at when there are 24 products, 36, 54, and so on: after every product there would be so many
    chances to stop too early that it would hold the truth less often than it says. `max_products` and `max_seconds` are
    where to stop without having reached the goal.
    """

    products: int
    rtol: float | None = None
    atol: float | None = None
    level: float = 0.95
    max_products: int = CAP
    max_seconds: float = math.inf
    least: int = FIRST  # products before the first look

    def __post_init__(self) -> None:
        if self.products < 2:
            raise ValueError(f"An error bar needs at least 2 products, but got products={self.products}.")
        if self.max_products < 2:
            raise ValueError(f"An error bar needs at least 2 products, but got max_products={self.max_products}.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is a positive number, but got {value}.")
        if not 0 < self.level < 1:
            raise ValueError(f"A confidence level lies between 0 and 1, but got {self.level}.")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds is a positive number, but got {self.max_seconds}.")

    @property
    def adaptive(self) -> bool:
        """Whether there is a tolerance to reach."""
        return self.rtol is not None or self.atol is not None

    @property
    def most(self) -> int:
        """The most products that can be asked for."""
        return self.max_products if self.adaptive else self.products

    @property
    def first(self) -> int:
        """Products before the first look."""
        return min(self.least, self.most) if self.adaptive else self.products

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for, as results keep it."""
        if not self.adaptive:
            return {"products": self.products}
        seconds = {} if math.isinf(self.max_seconds) else {"max_seconds": self.max_seconds}
        tolerances = {"rtol": self.rtol, "atol": self.atol, "level": self.level}
        return {**tolerances, "max_products": self.max_products, **seconds}

    def looks(self, measurement: Measurement) -> Iterator[int]:
        """The numbers of products after which to look at the estimate, while there is time."""
        look = float(self.first)
        while look < self.most:
            if look >= measurement.products:  # else it was looked at by the process before
                yield math.ceil(look)
            if measurement.seconds > self.max_seconds:
                return
            look *= GROWTH
        yield self.most

    def reached(self, estimate: Estimate) -> bool:
        """Whether the interval meets the tolerance, wherever in it the truth may be."""
        return self.excess(estimate) <= 1

    def excess(self, estimate: Estimate) -> float:
        """How many times as wide as the tolerance allows the interval is."""
        low, high = estimate.interval(self.level)
        half = float((high - low).norm()) / 2
        least = max(0.0, float(estimate.value.norm()) - half)  # of the truth, wherever it is
        allowed = (self.atol or 0.0) + (self.rtol or 0.0) * least
        return half / allowed if allowed else math.inf if half else 0.0

    def expected(self, products: int, estimate: Estimate | None) -> int:
        """The products it will take in all: widths fall with the root of their number."""
        if not self.adaptive or estimate is None:
            return self.most
        return math.ceil(min(self.most, products * max(1.0, self.excess(estimate)) ** 2))


def shown(question: str, estimate: Estimate) -> str:
    """The estimate with its error on one line, of a vector the typical error."""
    if estimate.value.ndim == 0:
        return f"{question} {with_error(float(estimate.value), float(estimate.stderr), estimate.dof)}"
    return f"{question}, median stderr {float(estimate.stderr.median()):.2g}"


class Sampler(Protocol):
    """What makes estimates of products: the goal has to be reached at so many `looks` in a row."""

    looks: int

    def upto(self, products: int) -> Iterator[Estimate | None]:
        """Spend so many products, with those before; yields what there is to say after each block of them."""
        ...


def pursued(measurement: Measurement, goal: Goal, sampler: Sampler, exactly: Callable[[], Estimate]) -> Estimate:
    """The first estimate that reaches the goal, or the last one there is.

    From as many products as A has rows on it is done `exactly` instead. An interrupt raises Interrupted with the last
    estimate.
    """
    estimate, reached = None, 0
    try:
        for look in goal.looks(measurement):
            if look >= measurement.operator.shape[0]:
                return replace(exactly(), converged=True if goal.adaptive else None)
            for estimate in sampler.upto(look):
                note = "" if estimate is None else shown(measurement.question, estimate)
                expected = max(look, goal.expected(measurement.products, estimate))
                measurement.report(measurement.products, expected, note, unit="products")
            if estimate is not None and goal.adaptive:
                reached = reached + 1 if goal.reached(estimate) else 0
                if reached == sampler.looks:
                    return replace(estimate, converged=True)
    except KeyboardInterrupt as stop:
        if estimate is None:
            raise
        raise Interrupted(replace(estimate, complete=False)) from stop
    assert estimate is not None  # two products are enough for one
    return replace(estimate, converged=False if goal.adaptive else None)
