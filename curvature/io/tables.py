"""Tables in text files, CSV or one JSON object a line: columns by name, and arrays of numbers out of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature.errors import BadFile, listing, printable

Columns = dict[str, list[str]]

_FIX = "Give a table with a header and as many cells in every line, or JSON objects with the same keys, one a line."


def read_table(path: Path) -> Columns:
    """The cells of every column, as text, in the order of the file.

    A first line of numbers only is no header: the columns are then called 1, 2, ... Tabs and semicolons separate cells
    where the first line has them. BadFile names the line that does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(_objects(text) if text.lstrip().startswith("{") else _lines(text))
    except (UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
        raise BadFile(f"{path} is no table: {printable(error)}.", _FIX) from error
    if not rows:
        raise BadFile(f"{path} has no lines.", _FIX)
    header, *lines = rows
    if all(map(_is_number, header)):
        header, lines = [str(i + 1) for i in range(len(header))], rows
    if len(set(header)) < len(header) or "" in header:
        raise BadFile(f"{path} has two columns of one name, or one without: {listing(header)}.", _FIX)
    for number, row in enumerate(lines, start=len(rows) - len(lines) + 1):
        if len(row) != len(header):
            raise BadFile(f"Line {number} of {path} has {len(row)} cells, not {len(header)}.", _FIX)
    if not lines:
        raise BadFile(f"{path} has a header, {listing(header)}, and nothing below it.", _FIX)
    return dict(zip(header, map(list, zip(*lines, strict=True)), strict=True))


def csv_of(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """The file of a table with these columns; cells without a value are empty."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return file.getvalue().encode()


def split_table(columns: Columns, target: str | None, path: Path) -> tuple[Columns, list[str]]:
    """All columns but `target`, and that one: by default the last. ValueError when there is no such column."""
    if len(columns) < 2:
        raise BadFile(f"{path} has {len(columns)} columns, of which one would be the target.", _FIX)
    name = list(columns)[-1] if target is None else target
    if name not in columns:
        raise ValueError(f"{path} has no column {printable(name)!r}, but {listing(list(columns))}.")
    return {key: cells for key, cells in columns.items() if key != name}, columns[name]


def arrays_of(columns: Columns, target: str | None, path: Path, *, numbers: bool = False) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a table of numbers: float32 inputs (n, columns).

    Targets that are words, or whole numbers without `numbers`, are classes, int64 (n,), words in alphabetical order;
    others float32 (n, 1).
    """
    inputs, targets = split_table(columns, target, path)
    for name, cells in inputs.items():
        if (wrong := next((cell for cell in cells if not _is_number(cell)), None)) is not None:
            raise BadFile(
                f"{path} has {printable(wrong)!r} in column {printable(name)}, which is no number.",
                "Encode it as numbers, fill in what is missing, or leave the column out.",
            )
    x = torch.tensor([[float(cell) for cell in cells] for cells in inputs.values()]).T.contiguous()
    return x, _targets(targets, numbers)


def _targets(cells: list[str], numbers: bool) -> Tensor:
    if not numbers and all(cell.strip().lstrip("+-").isdecimal() for cell in cells):
        return torch.tensor([int(cell) for cell in cells])
    if all(map(_is_number, cells)):
        return torch.tensor([[float(cell)] for cell in cells])
    classes = sorted(set(cells))
    return torch.tensor([classes.index(cell) for cell in cells])


def _lines(text: str) -> Iterator[list[str]]:
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in "\t;" if mark in first and "," not in first), ",")
    return (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row)


def _objects(text: str) -> Iterator[list[str]]:
    """The keys, then the values of every line."""
    keys: list[Any] = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        held = json.loads(line)
        if not isinstance(held, dict) or (keys and held.keys() != set(keys)):
            raise ValueError(f"line {number} has other keys than the first")
        if not keys:
            keys = list(held)
            yield keys
        yield [value if isinstance(value, str) else json.dumps(value) for value in map(held.get, keys)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
