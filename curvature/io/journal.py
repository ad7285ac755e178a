"""A file that long work adds its results to as they come, and reads again when it is started anew.

Records are appended and never changed. Each is preceded by its length and checksum, so that of a process that was
killed while writing all records but the last are whole; the next one to open the file drops that.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
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

    BadFile where the file is no journal, is damaged, is written by another process, or is of other work: `heading` is
    put down as JSON, and has to be the same.
    """

    def __init__(self, path: str | os.PathLike[str], heading: Mapping[str, Any]) -> None:
        self.path = Path(path).absolute()  # whatever the working folder will be
        self.heading = json.dumps(heading, sort_keys=True, default=str).encode()
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, self._head)
            self._open()
        except (OSError, ValueError) as error:
            raise BadFile(f"The checkpoint {path} cannot be written: {error}.", "Give another path.") from error
        self.end = len(MAGIC)  # of what was read or written
        found = self._next() if self._bytes(0, len(MAGIC)) == MAGIC else None
        if found is None:
            raise BadFile(
                f"{path} is not a checkpoint, or its beginning is damaged.", "Move it away, or give another path."
            )
        if found != self.heading:
            raise BadFile(
                f"{path} is the checkpoint of other work: {_difference(found, self.heading)}.",
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
        if self._length() > self.end:
            os.ftruncate(self.file, self.end)  # a record that was being written
        return None

    def append(self, record: Mapping[str, Tensor]) -> None:
        """Add a record after the last."""
        data = _saved(record)
        os.lseek(self.file, self.end, os.SEEK_SET)
        try:
            for part in (_prefix(data), data):
                _write_all(self.file, part)
        except OSError as error:  # what is there stays usable
            os.ftruncate(self.file, self.end)
            raise_naming(self.path, self.path, error)
            raise
        self.end += PREFIX + len(data)

    def replace(self, record: Mapping[str, Tensor]) -> None:
        """Put one record in the place of all."""
        data = _saved(record)
        write_atomically(self.path, lambda file: [file.write(part) for part in (self._head, _prefix(data), data)])
        self._close()
        self._open()
        self.end = self._length()

    @property
    def _head(self) -> bytes:
        return MAGIC + _prefix(self.heading) + self.heading

    def _open(self) -> None:
        """Take the file for this process, until nobody holds this journal any more."""
        self.file = os.open(self.path, os.O_RDWR)
        self._close = weakref.finalize(self, os.close, self.file)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadFile(
                f"Another process writes to the checkpoint {self.path}.", "Give each its own path."
            ) from error

    def _length(self) -> int:
        return os.fstat(self.file).st_size

    def _next(self) -> bytes | None:
        """What the record from `end` on holds, and `end` after it; None where it is not whole, and nothing follows."""
        prefix = self._bytes(self.end, PREFIX)
        length, checksum = int.from_bytes(prefix[:8], "little"), int.from_bytes(prefix[8:], "little")
        stop = self.end + PREFIX + length
        if len(prefix) < PREFIX or length == 0 or stop > self._length():
            return None
        data = self._bytes(self.end + PREFIX, length)
        if zlib.crc32(data) == checksum:
            self.end = stop
            return data
        if stop < self._length():
            raise BadFile(f"{self.path} is damaged from byte {self.end} on.", "Move it away, and start again.")
        return None

    def _bytes(self, start: int, count: int) -> bytes:
        os.lseek(self.file, start, os.SEEK_SET)
        parts = []
        while count and (part := os.read(self.file, count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _saved(record: Mapping[str, Tensor]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in record.items()})


def _prefix(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + zlib.crc32(data).to_bytes(4, "little")


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _difference(found: bytes, heading: bytes) -> str:
    """The first entry in which two headings differ."""
    try:
        return _unlike(json.loads(found), json.loads(heading))
    except ValueError:
        return "its heading is not that of a measurement"


def _unlike(theirs: Any, ours: Any, name: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                return _unlike(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
    return f"its {name or 'heading'} is {json.dumps(theirs)}, not {json.dumps(ours)}"
