"""Data sets from files: arrays by name, read without running code."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvature.errors import BadFile, one_line
from curvature.io.archive import EXPANSION, GROWTH
from curvature.io.recognise import is_text
from curvature.io.tables import arrays_of, read_table
from curvature.io.weights import read_tensors

PAIRS = (
    ("inputs", "targets"),
    ("inputs", "labels"),
    ("images", "labels"),
    ("x", "y"),
    ("X", "y"),
    ("data", "target"),
    ("data", "targets"),
)


def read_data(path: str | Path, *, target: str | None = None, numbers: bool = False) -> Any:
    """The data set in a .npz, safetensors, torch.save or CSV file (or JSON lines), told by content.

    Two arrays called x and y (or inputs and targets, images and labels, ...) become the tuple (inputs, targets), any
    other names a dict of tensors; a torch.save file may also hold a list of batches. Of a table, the column `target`
    (by default the last) holds the targets: whole ones are classes, or `numbers`. Raises BadFile or UnsafeFile.
    """
    path = Path(path)
    if is_text(path):
        return arrays_of(read_table(path), target, path, numbers=numbers)
    if path.is_dir():
        raise BadFile(f"{path} is a folder, not a file of data.", "Give a .npz, safetensors, torch.save or CSV file.")
    if target is not None:
        raise ValueError(f"A target is a column of a table in text, which {path} is not.")
    held = _read_npz(path) if _is_npz(path) else read_tensors(path)
    if isinstance(held, Mapping) and held and all(isinstance(value, Tensor) for value in held.values()):
        for names in PAIRS:
            if set(held) == set(names):
                return tuple(held[name] for name in names)
        return dict(held)
    if isinstance(held, list | tuple) and held:
        return held
    raise BadFile(
        f"{path} holds a {type(held).__name__}, which is no data set.",
        "Save arrays called x and y, a dict of tensors, or a list of batches.",
    )


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            bloated = [info.file_size for info in archive.infolist() if info.file_size > EXPANSION * info.compress_size]
        if sum(bloated) > GROWTH:
            raise BadFile(
                f"{path} would unpack to {sum(bloated):,} bytes, almost all of them the same: a zip bomb.",
                "If you made it, write it again with numpy.savez, which does not compress.",
            )
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
        raise BadFile(
            f"{path} cannot be read as numeric arrays: {one_line(error)}.",
            "Write it again with numpy.savez, of numbers only.",
        ) from error
