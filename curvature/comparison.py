"""Two results side by side: by how much their numbers differ, and whether that is more than their errors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from curvature.errors import listing, printable
from curvature.result import Origin, Part, Quantity, Result

WIDTHS = 13, 13, 34  # of the columns of the table
HASH = 12  # characters of one that are shown


@dataclass(frozen=True, kw_only=True)
class Difference(Part):
    """A number in two results: `first`, `second`, and what is known of the error of second - first, as in a Quantity;
    `dof` None stands for infinitely many; `converged` is false where one of them has not.

    `p` is the probability of a difference so large or larger where there is none, by Welch's t, adjusted for the number
    of rows by Holm's method; 0 or 1 where nothing is random, and only bounds are known. None where there are no errors.
    """

    name: str
    first: float
    second: float
    stderr: float
    dof: float | None
    bound: float
    p: float | None
    different: bool | None
    converged: bool = True

    @property
    def quantity(self) -> Quantity:
        """Second minus first, with its error."""
        dof = math.inf if self.dof is None else self.dof
        return Quantity(self.second - self.first, self.stderr, dof, self.bound, self.converged)

    def __str__(self) -> str:
        texts = (f"{self.first:.6g}", f"{self.second:.6g}", str(self.quantity))
        columns = [f"{text:<{width}}" for text, width in zip(texts, WIDTHS, strict=True)]
        if self.p is None:
            return "  ".join([*columns, "no error is known"])
        known = f"p = {self.p:.2g}" if self.stderr else "beyond the bounds" if self.p < 1 else "within the bounds"
        return "  ".join([*columns, f"{known}, different" if self.different else known])


@dataclass(frozen=True, kw_only=True)
class Setting(Part):
    """What was not the same in two measurements, with what it was in each."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """The numbers that two results share, row by row, the `settings` in which they were measured differently, and the
    two results; `labels` are what these are called, the cost is that of both. Rows are different at `level`, all of
    them together."""

    labels: tuple[str, ...]
    rows: tuple[Difference, ...]
    settings: tuple[Setting, ...]
    results: tuple[Result, ...]
    level: float
    left_out: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Difference:
        """The row of one number."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(f"There is no {name!r} among {listing([row.name for row in self.rows], 30)}.")
        return found[0]

    @property
    def different(self) -> tuple[str, ...]:
        """The names of the rows that are different."""
        return tuple(row.name for row in self.rows if row.different)

    def summary(self) -> dict[str, str]:
        titles = *self.labels, f"{self.labels[1]} - {self.labels[0]}"
        head = "  ".join(f"{title:<{width}}" for title, width in zip(titles, WIDTHS, strict=True))
        tested = sum(row.p is not None for row in self.rows)
        share = f"{len(self.different)} of {tested} numbers, at {100 * self.level:g} % for all together (Holm)"
        rows = {"number": head, **{row.name: str(row) for row in self.rows}, "different": share}
        if (seed := self._shared_seed) is not None:
            rows["seed"] = f"{seed} in both: of alike models errors cancel, and more is different than is said"
        if self.left_out:
            rows["left out"] = f"{listing(self.left_out)}: in one result only"
        return rows | {f"other {setting.name}": f"{setting.first} | {setting.second}" for setting in self.settings}

    def table(self) -> dict[str, list[Any]]:
        names = ("name", "first", "second", "stderr", "bound", "p", "different")
        return {name: [getattr(row, name) for row in self.rows] for name in names}

    def quantities(self) -> dict[str, Quantity]:
        return {row.name: row.quantity for row in self.rows}

    @property
    def _shared_seed(self) -> int | None:
        """Of the random vectors, where both took the same."""
        first, second = (result.origin.seed for result in self.results)
        return first if first == second and any(row.stderr for row in self.rows) else None

    __repr__ = Result.__str__


def compare(
    first: Result, second: Result, *, level: float = 0.95, labels: tuple[str, str] = ("first", "second")
) -> Comparison:
    """The difference of every number that two results share (`Result.quantities`), and whether it is more than their
    errors: two checkpoints, two models, two data sets, or one model measured in two ways.

    Standard errors are added as those of independent estimates, with Welch's degrees of freedom, and bounds are taken
    off the difference first. p-values are adjusted by Holm's method, so that where nothing is different a row is called
    so in 1 - `level` of all comparisons. Numbers that have bounds only, such as eigenvalues with their residuals, are
    different where they lie further apart than these; those without any error are shown and not judged. Errors are
    those of the estimates: they say nothing about other data or other runs of training.

    Take different seeds for the two. With the same seed both met the same random vectors: the errors of similar models
    then go along with each other and cancel in the difference, so that the test is too careful, and finds less than
    there is; those of opposite ones would add up. What lies between two matrices over one space is best asked of
    their difference: `trace(B - A)`.

    Welch 1947 (Biometrika 34); Holm 1979 (Scand. J. Statist. 6).

    >>> import torch
    >>> from curvature import Diagonal, trace
    >>> one, other = (trace(Diagonal(torch.tensor(entries))) for entries in ([1.0, 2.0], [1.0, 3.0]))
    >>> compare(one, other).different
    ('trace',)
    """
    if not 0 < level < 1:
        raise ValueError(f"A confidence level lies between 0 and 1, but got {level}.")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise ValueError(f"labels are two names, but got {labels}.")
    if isinstance(first, Comparison) or isinstance(second, Comparison):
        raise ValueError(
            "A comparison is of two measurements, but one of these is itself a comparison. Give its results."
        )
    own, others = first.quantities(), second.quantities()
    shared = [name for name in own if name in others]
    if not shared:
        kinds = f"a {type(first).__name__} of {listing(list(own)) or 'none'}"
        raise ValueError(
            f"The results share no number: {kinds}, and a {type(second).__name__} of "
            f"{listing(list(others)) or 'none'}. Give two of one kind."
        )
    differences = {name: _difference(own[name], others[name]) for name in shared}
    judged = {
        name: q for name, q in differences.items() if q.converged and math.isfinite(q.value) and math.isfinite(q.stderr)
    }
    random = {name: _probability(q) for name, q in judged.items() if q.stderr}
    adjusted = _adjusted(random)
    rows = []
    for name, q in differences.items():
        p = adjusted.get(name, _certain(q) if name in judged else None)
        rows.append(
            Difference(
                name=name,
                first=own[name].value,
                second=others[name].value,
                stderr=q.stderr,
                dof=None if q.dof == math.inf else q.dof,
                bound=q.bound,
                p=p,
                different=None if p is None else p <= 1 - level,
                converged=q.converged,
            )
        )
    facts = first.origin.operator
    both = {name: value for name, value in facts.items() if second.origin.operator.get(name) == value}
    return Comparison(
        labels=tuple(labels),
        rows=tuple(rows),
        settings=tuple(_settings(first, second)),
        results=(first, second),
        level=level,
        left_out=tuple(sorted(own.keys() ^ others.keys())),
        complete=first.complete and second.complete,
        cost=first.cost + second.cost,
        origin=Origin(question="compare", options={"level": level, "labels": list(labels)}, seed=None, operator=both),
    )


def _difference(a: Quantity, b: Quantity) -> Quantity:
    """b - a, with the error that independent ones have."""
    squares = a.stderr**2, b.stderr**2
    shares = sum(square**2 / q.dof for square, q in zip(squares, (a, b), strict=True) if q.stderr and q.dof)
    dof = sum(squares) ** 2 / shares if shares else 0.0 if a.dof == b.dof == 0 else math.inf
    return Quantity(b.value - a.value, math.sqrt(sum(squares)), dof, a.bound + b.bound, a.converged and b.converged)


def _probability(q: Quantity) -> float:
    """That of a difference so large, beyond its bound, where there is none."""
    import scipy.special

    t = max(0.0, abs(q.value) - q.bound) / q.stderr
    below = scipy.special.ndtr(-t) if q.dof == math.inf else scipy.special.stdtr(q.dof, -t)
    return 2 * float(below)


def _certain(q: Quantity) -> float | None:
    """The same where nothing is random."""
    if not q.bound and q.value and q.dof:  # whose error nobody has looked at; exact ones have no degrees of freedom
        return None
    return 0.0 if abs(q.value) > q.bound else 1.0


def _adjusted(probabilities: Mapping[str, float]) -> dict[str, float]:
    """By Holm's method: the k-th smallest of m times m - k + 1, and none below one before it."""
    found: dict[str, float] = {}
    worst = 0.0
    for k, (name, p) in enumerate(sorted(probabilities.items(), key=lambda pair: pair[1])):
        worst = max(worst, min(1.0, (len(probabilities) - k) * p))
        found[name] = worst
    return found


def _settings(first: Result, second: Result) -> Iterator[Setting]:
    """Where the origins differ; products and engines are the cost, and no setting."""
    sides = [dict(_flat({"kind": type(r).__name__, "complete": r.complete, **vars(r.origin)})) for r in (first, second)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name, "none") for side in sides]
        if values[0] != values[1] and not name.startswith(("operator.engines", "operator.rewrites")):
            yield Setting(name=name, first=values[0], second=values[1])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every entry of nested mappings, by the path to it; hashes are cut."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        text = printable(value)
        yield name, text[:HASH] if re.fullmatch("[0-9a-f]{64}", text) else text
