"""What kind of file this is, told by its content and never by its name, without running any of it."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import stat
import struct
from enum import Enum
from pathlib import Path
from typing import Any

from curvature.errors import BadFile, printable
from curvature.io import archive
from curvature.io.pickles import Pickle, scan


class FileKind(Enum):
    """The kinds that can be loaded, each with the words that name it in a message."""

    TENSORS = "a torch.save file of tensors"
    MODULE = "a pickled nn.Module"
    LEGACY = "a torch.save file in the format before 1.6"
    LIGHTNING = "a Lightning checkpoint"
    OBJECTIVE = "a saved curvature objective"
    TORCHSCRIPT = "a TorchScript archive"
    EXPORTED = "an exported program (.pt2)"
    SAFETENSORS = "a safetensors file"
    SHARDS = "weights in several files"
    HUGGING_FACE = "a Hugging Face model folder"
    ADAPTER = "a PEFT adapter folder"
    DCP = "a distributed checkpoint folder"


OBJECTIVE_FORMAT = "curvature-objective-1"  # a saved objective is a dict with "format" first: this

_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # pickle of 0x1950a86a20f9469cfc6c
_LEGACY_PICKLES = 5  # magic, protocol, system, the object, the keys of its storages
_MODULE_FIELDS = {"_parameters", "_buffers", "_modules"}  # keys of every nn.Module's pickled state
_LIGHTNING_MARK = "pytorch-lightning_version"
_INDEX_MARK = "weight_map"  # of the JSON file that says which tensor is in which file
_JSON_LIMIT = 64 << 20
_HEADER_LIMIT = 100_000_000  # of the safetensors format
_HEAD = 1024
_LFS, _PAGES = b"version https://git-lfs", (b"<!doctype html", b"<html")
_EXTENSIONS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pt2")  # only to suggest a file
_SAVE_TENSORS = (
    "Give a file made by torch.save(model.state_dict(), path) or safetensors; for data also by np.savez or as CSV."
)
_NUMPY = b"\x93NUMPY"
_OTHER_FORMATS = {
    _NUMPY: "a NumPy array",
    b"\x89HDF\r\n": "an HDF5 file (Keras?)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x05\x06": "an empty zip",
    b"\x80": "a bare pickle, not written by torch.save",
}


def recognise(path: str | os.PathLike[str]) -> FileKind:
    """The kind of the file or folder at `path`; BadFile says what it is instead and what to do."""
    path = Path(path)
    head, size = _head(path)
    if path.is_dir():
        return _folder_kind(path)
    if head.startswith(archive.MAGIC):
        return _zip_kind(path)
    if head.startswith(_LEGACY_MAGIC):
        return FileKind.LEGACY
    if head[8:9] == b"{":
        (header,) = struct.unpack("<Q", head[:8])
        if 8 + header <= size and header <= _HEADER_LIMIT:
            return FileKind.SAFETENSORS
    if head.lstrip().startswith(b"{") and _INDEX_MARK in json_object(path):
        return FileKind.SHARDS
    raise BadFile(*_why_unknown(path, head, size))


def is_text(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file of text that could be data: no page, no pointer to another file, no index of weights."""
    path = Path(path)
    head, _ = _head(path)
    known = any(head.lstrip().lower().startswith(mark) for mark in (*_PAGES, _LFS))
    return bool(head) and not known and _is_text(head) and _INDEX_MARK not in json_object(path)


def pickle_globals(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Dotted names of all classes and functions that loading the torch.save file would look up.

    In order of appearance, found without running the pickle; "?" is a part of a name computed as it runs.
    """
    return tuple(dict.fromkeys(name for pickle in pickles(path) for name in pickle.globals))


def pickles(path: str | os.PathLike[str]) -> list[Pickle]:
    """What each pickle of a torch.save file mentions; BadFile when one is damaged."""
    try:
        if not archive.is_zip(path):
            with open(path, "rb") as file:
                return [scan(file) for _ in range(_LEGACY_PICKLES)]
        with archive.opened(path) as records:
            root = records.namelist()[0].partition("/")[0]  # torch takes the first record's folder, too
            return [scan(archive.read_record(records, f"{root}/data.pkl"))]
    except KeyError as error:
        raise BadFile(f"{path} holds no pickle of torch.save.", _SAVE_TENSORS) from error
    except ValueError as error:
        raise BadFile(f"{path} is truncated or damaged: {printable(error)}.", archive.AGAIN) from error


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; empty when it is missing, damaged, too large for one, or something else."""
    path = Path(path)
    try:
        small = path.is_file() and path.stat().st_size <= _JSON_LIMIT
        content = json.loads(path.read_bytes()) if small else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def index_of(folder: Path) -> Path | None:
    """The file that says which tensor is in which file of the folder; None unless there is exactly one."""
    found = [path for path in sorted(folder.glob("*.index.json")) if _INDEX_MARK in json_object(path)]
    return found[0] if len(found) == 1 else None


def _head(path: Path) -> tuple[bytes, int]:
    """First bytes and size of a regular file, (b"", 0) of a folder; BadFile when there is nothing to read."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return b"", 0
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(f"{path} is a device or a pipe, not a file.", "Copy its content to a file first.")
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError as error:
        raise BadFile(f"There is no file {path}.", near_miss(path)) from error
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if not head:
        raise BadFile(f"{path} is empty.", "Its download or its saving was cut short: make it again.")
    return head, status.st_size


def near_miss(path: Path) -> str:
    """A fix that names a file with almost this name, if there is one."""
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings)
    near = [name for name in close if difflib.get_close_matches(path.stem, [Path(name).stem])]  # .npz makes all alike
    return f"Did you mean {path.parent / printable(near[0])}?" if near else "Check the path."


def _zip_kind(path: Path) -> FileKind:
    """The kind of a zip; BadFile when it is damaged or not one of torch's."""
    with archive.opened(path) as records:
        names = set(records.namelist())
        root = records.namelist()[0].partition("/")[0]
    if f"{root}/constants.pkl" in names:
        return FileKind.TORCHSCRIPT
    if f"{root}/archive_format" in names or "serialized_exported_program.json" in names:
        return FileKind.EXPORTED
    if f"{root}/data.pkl" not in names:
        raise BadFile(f"{path} is a zip archive, but torch did not write it.", _SAVE_TENSORS)
    (pickle,) = pickles(path)
    if pickle.strings[:2] == ("format", OBJECTIVE_FORMAT):
        return FileKind.OBJECTIVE
    if _LIGHTNING_MARK in pickle.strings:
        return FileKind.LIGHTNING
    return FileKind.MODULE if _MODULE_FIELDS.issubset(pickle.strings) else FileKind.TENSORS


def _folder_kind(path: Path) -> FileKind:
    """The kind of a folder by the files that mark it; BadFile when there are none."""
    if (path / ".metadata").is_file():
        return FileKind.DCP
    if {"model_type", "architectures"} & json_object(path / "config.json").keys():
        return FileKind.HUGGING_FACE
    if "peft_type" in json_object(path / "adapter_config.json"):
        return FileKind.ADAPTER
    if index_of(path) is not None:
        return FileKind.SHARDS
    inside = sorted(file.name for file in path.iterdir() if file.suffix in _EXTENSIONS)
    fix = f"Give the file in it: {path / printable(inside[0])}." if inside else "Give the model file in it."
    raise BadFile(f"{path} is a folder, but not of a model.", fix)


def _why_unknown(path: Path, head: bytes, size: int) -> tuple[str, str]:
    """Cause and fix for a file that is none of the kinds."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(_LFS):
        return f"{path} is a Git LFS pointer, not the model itself.", "Fetch the model with `git lfs pull`."
    if start.startswith(_PAGES):
        return f"{path} is an HTML page, not a model.", "Download the raw file, not the page that shows it."
    if head[8:9] == b"{" and b'"' in head[9:32]:
        return f"{path} is a safetensors file cut short at {size:,} bytes, or damaged.", archive.AGAIN
    if _is_text(head):
        return f"{path} is a text file, not a model.", _SAVE_TENSORS
    other = next((words for magic, words in _OTHER_FORMATS.items() if head.startswith(magic)), None)
    fix = "Save data by np.savez(path, x=inputs, y=targets)." if head.startswith(_NUMPY) else _SAVE_TENSORS
    return f"{path} is {other or 'not a model file of any known kind'}.", fix


def _is_text(head: bytes) -> bool:
    """Whether the bytes are the start of UTF-8 text without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\t\r\n\f\x1b" for char in text)
