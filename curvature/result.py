"""What a measurement returns: values with their error, what they cost, and what is needed to obtain them again.

A result is a frozen dataclass of tensors and plain values. On disk it is a folder: `result.json` for people and
programs, `arrays.safetensors` with every tensor bit for bit.
"""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from curvature.errors import BadFile
from curvature.io.files import write_atomically, write_together
from curvature.io.tables import csv_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 1
FEW = 3  # degrees of freedom, below which a standard error is far too small as often as not
LISTED = 1000  # tensors of up to so many entries are written out in result.json; larger ones by name only


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a measurement took: `products` with its operator, `passes` over the data, `seconds` of wall time, and
    `peak_bytes`, the most memory the process had held by its end (of the device for CUDA tensors)."""

    products: int = 0
    passes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Of one measurement after the other."""
        return Cost(
            products=self.products + other.products,
            passes=self.passes + other.passes,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )

    def __str__(self) -> str:
        passes = f"{self.passes} passes over the data, " if self.passes else ""
        return f"{self.products} products, {passes}{self.seconds:.1f} s, peak {self.peak_bytes / 2**20:.0f} MiB"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is needed to obtain a result again: the question with its options and seed, the operator with the
    fingerprints of its model and data, and the versions and thread count in force."""

    question: str
    options: dict[str, Any]
    seed: int | None
    operator: dict[str, Any]
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=lambda: versions())


def versions() -> dict[str, str]:
    """The versions that decide about bits: of this package, torch, NumPy and Python."""
    try:
        own = importlib.metadata.version("curvature-toolkit")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        own = "uninstalled"
    return {
        "curvature": own,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Quantity:
    """A number of a result with its error: `stderr` is its standard error with `dof` degrees of freedom, 0 where
    nothing is random; `bound` is of what no repetition shows, such as the residual of an eigenvalue. One that has not
    `converged` when the work ended would be another if it went on: nothing is known of its error."""

    value: float
    stderr: float = 0.0
    dof: float = math.inf
    bound: float = 0.0
    converged: bool = True

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The confidence interval at `level`, by Student's t, and the bound on either side."""
        if not self.converged:
            return -math.inf, math.inf
        half = self.bound + (self.stderr * student_quantile(level, self.dof) if self.stderr else 0.0)
        return self.value - half, self.value + half

    def __str__(self) -> str:
        shown = with_error(self.value, self.stderr, self.dof) if self.stderr else f"{self.value:.6g}"
        if not self.converged:
            return f"{shown} (not converged)"
        return f"{shown} (within {self.bound:.2g})" if self.bound else shown


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several alike that a result lists: plain values, saved and loaded with it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Frozen values, their cost and their origin; `complete` is false when the measurement was interrupted."""

    cost: Cost
    origin: Origin
    complete: bool = True

    def summary(self) -> dict[str, str]:
        """Label -> text: what a person wants to read first. Tables and the notebook view are made of it."""
        return {}

    def quantities(self) -> dict[str, Quantity]:
        """The numbers that a result comes down to, by the names of the field, each with its error: what gates and
        comparisons look at. Empty where there are none."""
        return {}

    def table(self) -> dict[str, list[Any]]:
        """Its rows by column, of equal length, as spreadsheets and data frames take them; empty where it has none."""
        return {}

    def save_table(self, path: str | Path) -> Path:
        """Write these rows into a CSV file, numbers with all their digits; returns the path."""
        if not (table := self.table()):
            raise ValueError(f"A {type(self).__name__} has no rows.")
        write_atomically(path, csv_of(table))
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: small tensors as lists, larger ones as {"array": name, "shape", "dtype"}; not-a-number and
        infinities as null."""
        return {"schema": SCHEMA, **_plain(self, "")}

    def arrays(self) -> dict[str, Tensor]:
        """Every tensor of the result by its field's name; of results in it with their place before it."""
        return dict(_tensors(self, ""))

    def save(self, folder: str | Path) -> Path:
        """Write result.json and arrays.safetensors into `folder`, made if need be; returns the folder."""
        import safetensors.torch

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in self.arrays().items()})
        written = {
            **self.to_dict(),
            "arrays": {"file": "arrays.safetensors", "sha256": hashlib.sha256(arrays).hexdigest()},
        }
        text = json.dumps(written, indent=1, allow_nan=False)
        write_together({folder / "arrays.safetensors": arrays, folder / "result.json": (text + "\n").encode()})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The result that was saved in `folder`; BadFile when it is not one, was changed, or is of another kind."""
        import safetensors.torch

        path, beside = Path(folder) / "result.json", Path(folder) / "arrays.safetensors"
        if missing := [file.name for file in (path, beside) if not file.is_file()]:  # a device might never end
            raise BadFile(
                f"{path} is not a saved result: there is no file {missing[0]}.", "Give the folder that `save` wrote."
            )
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            arrays = beside.read_bytes()
            kind, digest = written["kind"], written["arrays"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadFile(f"{path} is not a saved result: {error}.", "Give the folder that `save` wrote.") from error
        if written.get("schema") != SCHEMA:
            raise BadFile(
                f"{path} has schema {written.get('schema')}, not {SCHEMA}.",
                "Use the version of curvature that wrote it.",
            )
        if hashlib.sha256(arrays).hexdigest() != digest:
            raise BadFile(f"The arrays beside {path} are not those it was saved with.", "Measure again.")
        if kind not in {c.__name__ for c in (cls, *_subclasses(cls))}:
            raise BadFile(f"{path} holds a {kind}, not a {cls.__name__}.", "Use Result.load(folder).")
        try:
            return _restored(written, safetensors.torch.load(arrays), "")
        except (KeyError, TypeError, safetensors.SafetensorError) as error:
            raise BadFile(f"{path} lacks what a {kind} is made of: {error}.", "Measure again.") from error

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the result on `ax`, or on new axes; needs the extra `plot` (matplotlib)."""
        from curvature.plots import (
            plot,
        )  # the one upward import: a result knows that it can be drawn, not how

        return plot(self, ax, **style)

    def save_picture(self, path: str | Path, **style: Any) -> Path:
        """Draw the result into a file (.png, .svg, .pdf); needs the extra `plot`. Returns the path."""
        from curvature.plots import save_picture

        save_picture(self, Path(path), **style)
        return Path(path)

    def __str__(self) -> str:
        width = max((len(label) for label in self.summary()), default=0)
        lines = [f"{label:<{width}}  {text}" for label, text in self.summary().items()]
        return "\n".join([*lines, f"[{self.cost}]"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.summary().items()
        )
        head = f"{type(self).__name__} of {self.origin.operator.get('operator', 'an operator')}"
        return (
            f"<table><caption style='text-align:left'><b>{html.escape(head)}</b></caption>{rows}</table>"
            f"<small>{html.escape(str(self.cost))}</small>"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Result):
    """A value with its standard error.

    `value` and `stderr` have one shape; `samples` independent draws stand behind them, with `dof` degrees of freedom,
    both 0 when the value is exact. `floor` bounds errors that no repetition shows (rounding of the operator's dtype,
    the resolution of a spectrum) and is added to every interval. `converged` says whether a tolerance was reached, None
    where none was asked for; `names` are those of the entries of a vector, where they have any.
    """

    value: Tensor
    stderr: Tensor
    samples: int
    dof: float
    floor: float | Tensor = 0.0
    converged: bool | None = None
    names: tuple[str, ...] = ()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The confidence interval at `level`: Student's t with `dof` degrees of freedom, and the rounding floor."""
        if not 0 < level < 1:
            raise ValueError(f"A confidence level lies between 0 and 1, but got {level}.")
        half = self.stderr * student_quantile(level, self.dof) + self.floor
        return self.value - half, self.value + half

    def summary(self) -> dict[str, str]:
        label = self.origin.question
        if self.names and self.value.ndim == 1:
            entries = zip(self.names, self.value.tolist(), self.stderr.expand_as(self.value).tolist(), strict=True)
            return {
                name: with_error(value, stderr, self.dof) if self.dof else f"{value:.8g} (exact)"
                for name, value, stderr in entries
            }
        if self.value.ndim:
            return {label: f"{tuple(self.value.shape)} values, median stderr {self.stderr.median().item():.2g}"}
        if self.dof == 0:
            return {label: f"{self.value.item():.8g} (exact)"}
        low, high = (bound.item() for bound in self.interval())
        return {
            label: with_error(self.value.item(), self.stderr.item(), self.dof),
            "95 % interval": f"[{low:.5g}, {high:.5g}]",
            "samples": str(self.samples),
            **({} if self.converged is None else {"tolerance": "reached" if self.converged else "not reached"}),
        }

    def quantities(self) -> dict[str, Quantity]:
        if self.value.ndim == 0:
            return {self.origin.question: self._quantity(())}
        return {name: self._quantity((i,)) for i, name in enumerate(self.names)}

    def _quantity(self, place: tuple[int, ...]) -> Quantity:
        columns = (self.value, self.stderr, torch.as_tensor(self.floor))
        value, stderr, floor = (float(column.expand_as(self.value)[place]) for column in columns)
        return Quantity(value, stderr, self.dof, floor)

    def __float__(self) -> float:
        return float(self.value)

    __repr__ = Result.__str__


def student_quantile(level: float, dof: float) -> float:
    """Half-width in standard errors of the two-sided interval at `level`: 0 when exact, infinite below one degree."""
    import scipy.special

    if dof == 0:
        return 0.0
    if dof == math.inf:
        return float(scipy.special.ndtri(0.5 + level / 2))
    return float(scipy.special.stdtrit(dof, 0.5 + level / 2)) if dof >= 1 else math.inf


def with_error(value: float, stderr: float, dof: float = math.inf) -> str:
    """'12.34 ± 0.56': the value to the second digit of its standard error. Of too few degrees of freedom for that to
    mean what readers take it for, '12 ± 7 (95 %)': half the interval."""
    if 0 < dof < FEW and stderr:
        return f"{with_error(value, stderr * student_quantile(0.95, dof))} (95 %)"
    if not (math.isfinite(value) and math.isfinite(stderr)) or stderr == 0:
        return f"{value:.6g} ± {stderr:.2g}"
    digits = max(0, min(12, math.floor(math.log10(max(abs(value), stderr))) - math.floor(math.log10(stderr)) + 1))
    return f"{value:.{digits + 1}g} ± {stderr:.2g}"


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a result, by the path to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Result):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name), _path(name, f.name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, _path(name, i))


def _restored(written: Any, arrays: Mapping[str, Tensor], name: str) -> Any:
    """The result that `_plain` and `_tensors` have told."""
    classes: dict[str, Any] = {c.__name__: c for kind in (Result, Part) for c in _subclasses(kind)}
    made = classes[written["kind"]]
    values: dict[str, Any] = {}
    if issubclass(made, Result):
        values = {"cost": Cost(**written["cost"]), "origin": Origin(**written["origin"])}
    for f in fields(made):
        path, value = _path(name, f.name), written[f.name]
        if path in arrays:
            values[f.name] = arrays[path]
        elif str(f.type).startswith("tuple"):  # JSON has none
            nested = (_restored(v, arrays, _path(path, i)) if isinstance(v, dict) else v for i, v in enumerate(value))
            values[f.name] = tuple(nested)
        else:
            values.setdefault(f.name, value)
    return made(**values)


def _path(name: str, last: str | int) -> str:
    return f"{name}.{last}" if name else str(last)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _plain(value: Any, name: str) -> Any:
    """`value` as JSON knows it; tensors too large to list are named."""
    if isinstance(value, Tensor):
        if value.numel() <= LISTED:
            return _plain(value.tolist(), name)
        return {"array": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Cost | Origin | Result | Part):
        kind = {"kind": type(value).__name__} if isinstance(value, Result | Part) else {}
        return kind | {f.name: _plain(getattr(value, f.name), _path(name, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, _path(name, i)) for i, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int | None):
        return value
    return str(value)
