"""Gates on the numbers of a result: `--fail-on "lambda_max>100"` makes a command end with exit code 10."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from .options import Misuse

if TYPE_CHECKING:
    import curvature as cv
    from curvature.result import Quantity

SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
SHOWN = 3  # failures that are told one by one


class GateFailed(Exception):
    """A number is where it must not be: cause and fix, as in curvature.errors."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause, fix)
        self.cause, self.fix = cause, fix


class Gate(NamedTuple):
    """A condition that must not hold, of the quantities whose name matches the glob `name`."""

    name: str
    sign: str
    limit: float

    @classmethod
    def of(cls, text: str) -> Gate:
        """The gate that is written as NAME, a sign, and a number."""
        parts = re.fullmatch(r"\s*(?P<name>[^<>=]+?)\s*(?P<sign>[<>]=?)\s*(?P<limit>\S+)\s*", text)
        try:
            limit = math.nan if parts is None else float(parts["limit"])
        except ValueError:
            limit = math.nan
        if parts is None or math.isnan(limit):
            raise Misuse(f"--fail-on {text!r} is no condition.", "Write it as 'lambda_max > 100', with >, >=, < or <=.")
        return cls(parts["name"], parts["sign"], limit)

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.limit:g}"

    def holds(self, quantity: Quantity) -> bool:
        """Whether the condition is met; where there is no number nobody knows that it is not."""
        return math.isnan(quantity.value) or SIGNS[self.sign](quantity.value, self.limit)

    def told(self, name: str, quantity: Quantity) -> str:
        """The number, its error, and whether that leaves the answer open."""
        low, high = quantity.interval()
        if not high > low:
            return f"{name} is {quantity}"
        return f"{name} is {quantity}, its 95 % interval [{low:.5g}, {high:.5g}] {self._place(low, high)}"

    def open(self, quantity: Quantity) -> bool:
        """Whether the limit lies within the error bar."""
        low, high = quantity.interval()
        return low < self.limit < high

    def _place(self, low: float, high: float) -> str:
        side = "above" if low >= self.limit else "below" if high <= self.limit else None
        return f"holds {self.limit:g}" if side is None else f"is {side} {self.limit:g}"


def check(result: cv.Result, gates: Iterable[str]) -> list[str]:
    """Raise GateFailed where a gate holds, Misuse where there is no such number; returns what passed but might not."""
    quantities = result.quantities()
    failed, close, fix = [], [], ""
    for gate in map(Gate.of, gates):
        names = [gate.name] if gate.name in quantities else [n for n in quantities if fnmatchcase(n, gate.name)]
        if not names:
            raise _unknown(gate.name, quantities)
        for name in names:
            told = gate.told(name, quantities[name])
            if gate.holds(quantities[name]):
                failed.append(f"--fail-on {gate}: {told}.")
                fix = fix or ("Spend more on it to be sure." if gate.open(quantities[name]) else "")
            elif not result.complete:
                close.append(
                    f"not --fail-on {gate}, but it was stopped early, at {name} = {quantities[name]}: not decided."
                )
            elif gate.open(quantities[name]):
                close.append(f"not --fail-on {gate}, but only just: {told}.")
    if failed:
        more = [f"And {len(failed) - SHOWN} more."] if len(failed) > SHOWN else []
        raise GateFailed(" ".join([*failed[:SHOWN], *more]), fix)
    return close


def _unknown(name: str, quantities: dict[str, Quantity]) -> Misuse:
    from curvature.errors import listing

    if not quantities:
        return Misuse(f"There is no {name!r} to --fail-on: the result has no such numbers.", "Leave --fail-on out.")
    near = difflib.get_close_matches(name, quantities, n=1)
    fix = f"Did you mean {near[0]}?" if near else "Take one of these, or a glob such as '*.trace'."
    return Misuse(f"There is no {name!r} to --fail-on, but {listing(list(quantities), 12)}.", fix)
