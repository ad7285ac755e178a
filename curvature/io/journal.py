"""A file that long work adds its results to as they come, and reads again when it is started anew.

Records are appended and never changed. Each is preceded by its length and checksum, so that of a process that was
killed while writing all records but the last are whole; the next one to open the file drops that.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from curvature.errors import BadFile
from curvature.io.files import raise_naming, write_atomically

MAGIC = b"curvature journal 1\n"
PREFIX = 12  # bytes before each record: 8 of its length, 4 of its checksum


class Journal:
    """Records of named tensors in the file at `path`, which is made if need be, of the work that `heading` describes.

    BadFile where the file is no journal, or of other work: `heading` is JSON, and has to be the same.
    """

    def __init__(self, path: str | os.PathLike[str], heading: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.heading = json.dumps(heading, sort_keys=True).encode()
        if not self.path.exists():
            self._write(self._head)
        self.end = len(MAGIC)  # of what was read or written
        found = self._next() if self.path.is_file() and self._bytes(0, len(MAGIC)) == MAGIC else None
        if found is None:
            raise BadFile(f"{path} is not a checkpoint.", "Give another path: this one would be overwritten.")
        if found != self.heading:
            raise BadFile(
                f"{path} is the checkpoint of other work: {_difference(json.loads(found), dict(heading))}.",
                "Ask the same question again to go on with it, or give another path.",
            )

    @property
    def size(self) -> int:
        """Bytes of the records up to the last that was read or written."""
        return self.end - len(self._head)

    def read(self) -> dict[str, Tensor] | None:
        """The next record; None where there is none, and from then on records can be appended."""
        import safetensors.torch

        found = self._next()
        if found is not None:
            return safetensors.torch.load(found)
        if os.path.getsize(self.path) > self.end:
            os.truncate(self.path, self.end)  # a record that was being written
        return None

    def append(self, record: Mapping[str, Tensor]) -> None:
        """Add a record after the last."""
        data = _framed(_saved(record))
        if os.path.getsize(self.path) != self.end:
            raise BadFile(f"Another process writes to the checkpoint {self.path}.", "Give each its own path.")
        with open(self.path, "ab", buffering=0) as file:
            try:
                _write_all(file.fileno(), data)
            except OSError as error:  # what is there stays usable
                os.ftruncate(file.fileno(), self.end)
                raise_naming(self.path, self.path, error)
                raise
        self.end += len(data)

    def replace(self, record: Mapping[str, Tensor]) -> None:
        """Put one record in the place of all."""
        data = self._head + _framed(_saved(record))
        self._write(data)
        self.end = len(data)

    @property
    def _head(self) -> bytes:
        return MAGIC + _framed(self.heading)

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, data)

    def _next(self) -> bytes | None:
        """What the record from `end` on holds, and `end` after it; None where it is not whole."""
        prefix = self._bytes(self.end, PREFIX)
        length, checksum = int.from_bytes(prefix[:8], "little"), int.from_bytes(prefix[8:], "little")
        left = os.path.getsize(self.path) - self.end - PREFIX
        if len(prefix) < PREFIX or length > left:
            return None
        data = self._bytes(self.end + PREFIX, length)
        if zlib.crc32(data) != checksum:
            return None
        self.end += PREFIX + length
        return data

    def _bytes(self, start: int, count: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(count)


def _saved(record: Mapping[str, Tensor]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in record.items()})


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + zlib.crc32(data).to_bytes(4, "little") + data


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _difference(theirs: Any, ours: Any, name: str = "") -> str:
    """The first entry in which two JSON values differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                return _difference(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
    return f"its {name or 'heading'} is {json.dumps(theirs)}, not {json.dumps(ours)}"
