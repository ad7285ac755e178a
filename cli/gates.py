"""Gates on the numbers of a result: `--fail-on "lambda_max>100"` makes a command end with exit code 10.

A gate passes only where it is known not to hold: a number that was still moving when the work ended passes none.
"""

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
MORE = "Spend more on it to be sure."
SHOWN = 3  # failures that are told one by one
NUMBERS = {  # that a command's result has, as globs; of others nothing is known before
    "spectrum": ("lambda_min", "lambda_max", "trace", "negative_share", "outliers"),
    "eig": ("lambda_max", "lambda_min", "eigenvalue_*"),
    "trace": ("trace",),
    "diag": (),
    "landscape": ("loss", "loss_min", "loss_max", "accuracy", "held_out_loss", "held_out_accuracy"),
    "roughness": ("roughness", "oscillation"),
    "path": ("barrier", "held_out_barrier", "climb", "total_variation", "mean_loss"),
    "ihvp": ("residual", "steps", "energy", "norm"),
    "influence": (),
}


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
        if not (quantity.converged and high > low):
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
    """Raise GateFailed where a gate holds or is not decided yet, Misuse where there is no such number; returns what
    passed, but only just."""
    quantities = result.quantities()
    failed, close, fix = [], [], ""
    for gate in map(Gate.of, gates):
        names = [gate.name] if gate.name in quantities else [n for n in quantities if fnmatchcase(n, gate.name)]
        if not names and result.complete:
            raise _unknown(gate.name, list(quantities))
        if not names:
            failed.append(f"--fail-on {gate} is not decided: the work ended before there was such a number.")
            fix = MORE
        for name in names:
            quantity = quantities[name]
            told, unsure = gate.told(name, quantity), gate.open(quantity)
            if gate.holds(quantity):
                failed.append(f"--fail-on {gate}: {told}.")
                fix = fix or (MORE if unsure else "")
            elif _moving(result, quantity, unsure):
                failed.append(f"--fail-on {gate} is not decided: {told}.")
                fix = MORE
            elif unsure:
                close.append(f"not --fail-on {gate}, but only just: {told}.")
    if failed:
        more = [f"And {len(failed) - SHOWN} more."] if len(failed) > SHOWN else []
        raise GateFailed(" ".join([*failed[:SHOWN], *more]), fix)
    return close


def _moving(result: cv.Result, quantity: Quantity, unsure: bool) -> bool:
    """Whether the number may be another one yet. Work that was stopped early tells only what errors tell."""
    known = quantity.stderr or quantity.bound
    return not quantity.converged or not (result.complete or (known and not unsure))


def foresee(gates: Iterable[str], command: str) -> None:
    """Raise Misuse, before anything is measured, for what is no gate, or of a number that the command's result never
    has."""
    known = NUMBERS.get(command)
    for name in (Gate.of(gate).name for gate in gates):
        globs = [name] if known is None or any(c in name for c in "*?[") else known
        if not any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs):  # or of a layer
            raise _unknown(name, list(globs))


def _unknown(name: str, known: list[str]) -> Misuse:
    from curvature.errors import listing

    if not known:
        return Misuse(f"There is no {name!r} to --fail-on: the result has no such numbers.", "Leave --fail-on out.")
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"Did you mean {near[0]}?" if near else "Take one of these, or a glob such as '*.trace'."
    return Misuse(f"There is no {name!r} to --fail-on, but {listing(known, 12)}.", fix)
