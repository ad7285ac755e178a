"""Zip archives as torch writes them, read with suspicion: sound layout, no bomb, checksums that hold.

torch.load checks no checksum and unpacks before it looks. Here every record is read once, in pieces, first.
The layout check leaves one way to read the file: records tile it from the first byte to the directory, and
each header says what the directory says, so torch cannot find other bytes than the ones verified.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fstat
from typing import BinaryIO

from curvature.errors import BadFile, printable

MAGIC = b"PK\x03\x04"
EXPANSION = 100  # most that one compressed record may grow; the sources in TorchScript reach 10
GROWTH = 256 << 20  # most bytes that unpacking may add in all; tensors are stored uncompressed
RECORD = 256 << 20  # largest record that is read whole (pickles, marks); tensors never are
PIECE = 1 << 20

AGAIN = "Download or copy it again, or save it again."
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
)


def is_zip(path: str | PathLike[str]) -> bool:
    """Whether the file starts as a zip, which is what torch goes by."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """The zip at `path`, its layout and sizes checked; BadFile when truncated, damaged, ambiguous or a bomb.

    Damage found while reading a record inside the `with` becomes BadFile too.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            _check_layout(file, archive)
            _check_promises(archive, path)
            yield archive
    except _BROKEN as error:
        raise BadFile(f"{path} is truncated or damaged: {printable(error)}.", AGAIN) from error


def verify(path: str | PathLike[str]) -> None:
    """Read every record of the zip once, in pieces; BadFile names the first whose checksum does not hold."""
    with opened(path) as archive:
        for info in archive.infolist():
            try:
                with archive.open(info) as record:
                    while record.read(PIECE):
                        pass
            except _BROKEN as error:
                raise BadFile(
                    f"{path} is damaged: its member {printable(info.filename)} does not match its checksum.",
                    AGAIN,
                ) from error


def read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    """Bytes of one small record, its checksum verified; KeyError when there is none of that name."""
    if archive.getinfo(name).file_size > RECORD:
        raise zipfile.BadZipFile(f"{printable(name)} is larger than {RECORD >> 20} MiB")
    return archive.read(name)


def _check_layout(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile unless records tile the file and the headers agree with the directory."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len({info.filename for info in infos}) < len(infos):
        raise zipfile.BadZipFile("two members have the same name")
    end, slack = 0, 0  # the next header starts at `end`, or up to `slack` bytes later
    for info in infos:
        if not end <= info.header_offset <= end + slack:
            raise zipfile.BadZipFile("bytes that belong to no member")
        end = _check_header(file, info)
        slack = 24 if info.flag_bits & 8 else 0  # a data descriptor; none if empty
    if not end <= archive.start_dir <= end + slack:
        raise zipfile.BadZipFile("bytes that belong to no member")
    file.seek(fstat(file.fileno()).st_size - 22)
    mark, offset = struct.unpack("<4s12xL2x", file.read(22))
    if mark != b"PK\x05\x06" or offset not in (archive.start_dir, 0xFFFFFFFF):
        raise zipfile.BadZipFile("the directory is not at its end")


def _check_header(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the record's bytes end; BadZipFile when its local header contradicts the directory."""
    file.seek(info.header_offset)
    header = struct.unpack("<4s2x2H4x3L2H", file.read(30))
    mark, flags, method, crc, packed, size, name_length, extra_length = header
    name = file.read(name_length).decode("utf-8" if flags & 0x800 else "cp437")
    # Sizes are 0 when a data descriptor follows the bytes, and all ones when zip64 holds them elsewhere.
    same_sizes = all(
        local in (0, 0xFFFFFFFF, central)
        for local, central in [(crc, info.CRC), (packed, info.compress_size), (size, info.file_size)]
    )
    same_kind = (name, flags, method) == (info.filename, info.flag_bits, info.compress_type)
    if mark != MAGIC or not same_kind or not same_sizes:
        raise zipfile.BadZipFile(f"the header of {printable(info.filename)} contradicts the directory")
    stored = method == zipfile.ZIP_STORED and info.file_size == info.compress_size
    if flags & 1 or not (stored or method == zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{printable(info.filename)} is encrypted or packed unlike torch does")
    return info.header_offset + 30 + name_length + extra_length + info.compress_size


def _check_promises(archive: zipfile.ZipFile, path: str | PathLike[str]) -> None:
    """Raise BadFile for a file without checksums, and for a bomb by the sizes it declares."""
    infos = archive.infolist()
    if not any(info.CRC for info in infos):
        raise BadFile(
            f"{path} was saved without checksums, so damage to it would go unseen.",
            "Save it again after torch.serialization.set_crc32_options(True).",
        )
    unpacked = sum(info.file_size for info in infos)
    packed = sum(info.compress_size for info in infos)
    large = [info for info in infos if info.file_size > PIECE]
    if unpacked - packed > GROWTH or any(info.file_size > EXPANSION * info.compress_size for info in large):
        raise BadFile(
            f"{path} would unpack from {packed:,} to {unpacked:,} bytes: a zip bomb, or not torch's.",
            "If you made it, save it again with torch.save, which does not compress.",
        )
