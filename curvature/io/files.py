"""Writing so that a crash, a full disk or a kill leaves the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from curvature.errors import BadFile, TooLarge

Data = bytes | Callable[[BinaryIO], object]
TEMPORARY = ".tmp-"  # and then the process that writes
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: str | os.PathLike[str], data: Data) -> None:
    """Replace the file at `path` by `data`, or by what `data(file)` writes, in one step.

    The bytes go to a temporary file in the same folder and reach the disk before the rename; a symbolic link
    is followed. On failure the temporary file is removed and the old file is as it was: TooLarge when the
    disk is full, BadFile when `path` is not a file (a folder, a device), else the OSError, naming `path`.
    """
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike[str], Data]) -> None:
    """The same for several files: all are written before the first is replaced."""
    with contextlib.ExitStack() as stack:
        written = [stack.enter_context(_written(path, data)) for path, data in files.items()]
        for path, (temporary, target) in zip(files, written, strict=True):
            with _named(path, temporary):
                os.replace(temporary, target)


@contextlib.contextmanager
def _written(path: str | os.PathLike[str], data: Data) -> Iterator[tuple[Path, Path]]:
    """A temporary file with the data beside the one at `path`, and what it will replace; removed in the end."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise BadFile(f"{path} is not a file that can be replaced.", "Choose another name to write to.")
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _named(path, temporary), open(temporary, "xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary, target
    finally:
        with contextlib.suppress(OSError):  # gone already, when the rename succeeded
            os.unlink(temporary)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str], written: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise_naming(path, written, error)
        raise


def clear_stale(folder: str | os.PathLike[str]) -> None:
    """Remove from `folder` what processes that were killed left of their writing."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        pid = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdecimal() and not _runs(int(pid)):
            with contextlib.suppress(OSError):  # somebody else's, or gone already
                path.unlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def raise_naming(path: str | os.PathLike[str], written: Path, error: Exception) -> None:
    """Raise a disk error of the file that was `written` in terms of `path`; return when `error` is something else."""
    # torch.save hides the OSError of its file behind a RuntimeError of its own: look one step back.
    chain = (error, error.__cause__, error.__context__)
    if any(isinstance(link, OSError) and link.errno in DISK_FULL for link in chain):
        raise TooLarge(
            f"No space is left on the disk to write {path}.", "Free some space, or choose another folder."
        ) from error
    if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(written)):
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
