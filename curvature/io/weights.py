"""Tensors and modules from files: data is read without running code, code only where the caller says trust.

`read_tensors` is the safe way (checksums, torch's safe reader, a look at the tensors), `load_trusted` the
other. Only zip files carry checksums: damage in safetensors, or in the format before 1.6, goes unseen unless
lengths or headers change.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from curvature.errors import BadFile, UnsafeFile, one_line
from curvature.io import archive
from curvature.io.recognise import FileKind, recognise
from curvature.io.safe import SAVE_WEIGHTS, read_pickled, read_safetensors, resolved
from curvature.io.shards import read_shards
from curvature.io.tensors import check_tensors

_ARCH = "Name the class of the model with --arch FILE.py:NAME."
_MODULES = ("model", "module", "state_dict", "net")  # keys under which a dict keeps a whole module


def read_tensors(path: str | PathLike[str], *, allow: Sequence[str] = ()) -> Any:
    """The dict (or other plain object) of tensors that the file holds, on the CPU; none of its code is run.

    `allow` names further classes and functions, by dotted path, that the file may use: they are imported, and
    the file may call them. UnsafeFile lists those it uses that are neither harmless nor allowed. BadFile when
    it is damaged, or a tensor is not plain dense data (sparse, quantised, larger than what is stored of it).
    """
    kind = recognise(path)
    if kind is FileKind.SAFETENSORS:
        loaded = read_safetensors(path)
    elif kind is FileKind.SHARDS:
        loaded = read_shards(path, lambda shard: read_tensors(shard, allow=allow))
    elif kind in _UNREADABLE:
        error, cause, fix = _UNREADABLE[kind]
        raise error(f"{path} is {kind.value}{cause}", fix)
    else:
        loaded = read_pickled(path, [(resolved(name), name) for name in allow])
    check_tensors(loaded, path)
    return loaded


_UNREADABLE: dict[FileKind, tuple[type[BadFile | UnsafeFile], str, str]] = {
    FileKind.HUGGING_FACE: (BadFile, ", not one file of weights.", "Give the model.safetensors in it."),
    FileKind.TORCHSCRIPT: (
        UnsafeFile,
        ", which can run code when it is loaded.",
        f"Pass --trust if you trust its author, or {SAVE_WEIGHTS}",
    ),
    FileKind.EXPORTED: (
        UnsafeFile,
        ", which can run code when it is loaded.",
        f"Pass --trust if you trust its author, or {SAVE_WEIGHTS}",
    ),
    FileKind.ADAPTER: (BadFile, ", not one file of weights.", "Give the adapter_model.safetensors in it."),
    FileKind.DCP: (
        UnsafeFile,
        ", whose index is a pickle that can run code.",
        "Pass --trust if you trust its author, or convert it where it was saved: python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt.",
    ),
}


def load_trusted(path: str | PathLike[str]) -> nn.Module:
    """The module in a file whose code the user trusts, on the CPU: pickled, TorchScript or exported.

    Runs code from the file. BadFile when it is damaged, holds no module, or needs classes that are not here.
    """
    return module_in(read_trusted(path), path)


def read_trusted(path: str | PathLike[str]) -> Any:
    """Whatever object the trusted file holds, on the CPU. Runs its code; BadFile as by `load_trusted`."""
    kind = recognise(path)
    if kind not in _TRUSTED:
        raise BadFile(f"{path} is {kind.value}, which holds no module.", _ARCH)
    if kind is not FileKind.DCP and archive.is_zip(path):
        archive.verify(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but nothing else reads its files
            loaded = _TRUSTED[kind](path)
    except Exception as error:  # the file's own code can raise anything
        raise BadFile(*_why_not_loaded(path, error)) from error
    check_tensors(loaded, path)
    return loaded


def module_in(loaded: Any, path: str | PathLike[str]) -> nn.Module:
    """The module that a file held, alone or under a usual key of a dict; BadFile when there is none."""
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in _MODULES if isinstance(loaded.get(key), nn.Module)), loaded)
    if not isinstance(loaded, nn.Module):
        raise BadFile(f"{path} holds a {type(loaded).__name__} without a module.", _ARCH)
    return loaded


def _load_pickled(path: str | PathLike[str]) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _load_torchscript(path: str | PathLike[str]) -> nn.Module:
    import torch.jit

    return torch.jit.load(path, map_location="cpu")


def _load_exported(path: str | PathLike[str]) -> nn.Module:
    import torch.export

    with open(path, "rb") as file:  # given a path, torch would look at its extension
        program = torch.export.load(file)
    # Where the example was a view, torch demands of every input that it is a view of such sizes, too. What is computed
    # does not depend on that, and data that are read, or copied before the call, are none.
    program._guards_code = [code for code in program._guards_code if not _LAYOUT.search(code)]
    return _tied(program.module())


_LAYOUT = re.compile(r"\._base\b|\.stride\(\)|\.storage_offset\(\)")


def _tied(program: GraphModule) -> GraphModule:
    """The program, with one object for each of its tied parameters, which are read as several in the same memory.

    Its graph uses one of their names: a parameter that it does not use is tied to the one in its place.
    """
    used = {node.target for node in program.graph.nodes if node.op == "get_attr" and node.users}
    named = program.named_parameters(remove_duplicate=False)
    in_place = {_place(parameter): parameter for name, parameter in named if name in used}
    for path, part in program.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if f"{path}.{name}".lstrip(".") not in used:
                setattr(part, name, in_place.get(_place(parameter), parameter))
    return program


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _load_distributed(path: str | PathLike[str]) -> Any:
    """The tensors of a distributed checkpoint, gathered into one file that is read and removed."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        gathered = os.path.join(folder, "gathered.pt")
        dcp_to_torch_save(path, gathered)
        return _load_pickled(gathered)


_TRUSTED: dict[FileKind, Callable[[str | PathLike[str]], Any]] = {
    FileKind.TENSORS: _load_pickled,
    FileKind.MODULE: _load_pickled,
    FileKind.LEGACY: _load_pickled,
    FileKind.LIGHTNING: _load_pickled,
    FileKind.TORCHSCRIPT: _load_torchscript,
    FileKind.EXPORTED: _load_exported,
    FileKind.DCP: _load_distributed,
}


def _why_not_loaded(path: str | PathLike[str], error: Exception) -> tuple[str, str]:
    """Cause and fix for a trusted file whose code raised `error`."""
    if isinstance(error, ModuleNotFoundError):
        cause = f"{path} needs the Python module {error.name}, which cannot be imported."
        return cause, f"Install it or add its folder to PYTHONPATH, or {SAVE_WEIGHTS}"
    missing = re.match(r"Can't get attribute '([\w.]+)' on <module '([\w.]+)'", str(error))
    if missing is None:
        cause = f"{path} failed while it was loaded: {one_line(error)}."
        return cause, f"Load it where it was saved, or {SAVE_WEIGHTS}"
    name, module = missing.groups()
    if module.endswith("__main__"):  # under `python -m package` it is shown as package.__main__
        return (
            f"{path} needs the class {name} of the script that saved it.",
            f"Pass --arch SCRIPT.py:{name}, too, or {SAVE_WEIGHTS}",
        )
    cause = f"{path} needs {module}.{name}, which the installed {module} lacks."
    return cause, f"Install the version it was saved with, or {SAVE_WEIGHTS}"
