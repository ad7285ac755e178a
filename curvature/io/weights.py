"""Tensors and modules from files: data is read without running code, code only where the caller says trust.

`read_tensors` is the safe way (checksums, torch's safe reader, a look at the tensors), `load_trusted` the
other. Only zip files carry checksums: damage in safetensors, or in the format before 1.6, goes unseen unless
lengths or headers change.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, UnsafeFile, listing, one_line
from curvature.io import archive
from curvature.io.recognise import FileKind, recognise
from curvature.io.safe import SAVE_WEIGHTS, read_pickled, read_safetensors, resolved
from curvature.io.tensors import check_tensors
from curvature.io.tensors import non_finite_tensors as non_finite_tensors

_ARCH = "Name the class of the model with --arch FILE.py:NAME."
_DEEPEST = 4  # wrappings that are looked through: a pickled dict can contain itself
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "module")


def read_tensors(path: str | PathLike[str], *, allow: Sequence[str] = ()) -> Any:
    """The dict (or other plain object) of tensors that the file holds, on the CPU; none of its code is run.

    `allow` names further classes and functions, by dotted path, that the file may use: they are imported, and
    the file may call them. UnsafeFile lists those it uses that are neither harmless nor allowed. BadFile when
    it is damaged, or a tensor is not plain dense data (sparse, quantised, larger than what is stored of it).
    """
    kind = recognise(path)
    if kind is FileKind.SAFETENSORS:
        loaded = read_safetensors(path)
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
    FileKind.DCP: (
        UnsafeFile,
        ", whose index is a pickle that can run code.",
        "If you trust it, convert it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save.",
    ),
}


def state_dict_of(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict inside what a file holds, and a note for each thing that was taken off or left out.

    Looks through the usual wrappings of checkpoints (also Lightning's), then strips the prefixes of
    torch.compile and DistributedDataParallel. BadFile when no tensors are where a state_dict should be.
    """
    notes = []
    while len(notes) < _DEEPEST and (wrapping := _wrapping(loaded)):
        left = [key for key in loaded if key != wrapping]
        notes.append(f"took {wrapping!r}" + (f", left out {listing(left)}" if left else ""))
        loaded = loaded[wrapping]
    entries = loaded if isinstance(loaded, Mapping) else {}
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    tensors = {name: entry for name, entry in tensors.items() if isinstance(name, str)}
    if not tensors:
        held = listing(list(entries)) or f"a {type(loaded).__name__}"
        cause = f"There is no state_dict in what the file holds: {held}."
        raise BadFile(cause, f"To save one {SAVE_WEIGHTS}")
    if len(tensors) < len(entries):
        left = [name for name in entries if name not in tensors]
        notes.append(f"left out what is not a tensor: {listing(left)}")
    return _without_prefixes(tensors, notes), notes


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy `state_dict` into `module`; a module on the meta device takes the tensors themselves.

    Of names that are tied in the module one is enough. BadFile, before any tensor changed, when names,
    shapes or kinds of number (complex, real, integer) differ; the precision may.
    """
    own = module.state_dict(keep_vars=True)
    state_dict = _with_tied(own, state_dict)
    differences = {name: _difference(own[name], state_dict[name]) for name in own if name in state_dict}
    problems = {
        "missing": [name for name in own if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in own],
        "different": [f"{name} ({words})" for name, words in differences.items() if words],
    }
    if any(problems.values()):
        told = [f"{len(names)} {kind}: {listing(names, 3)}" for kind, names in problems.items() if names]
        raise BadFile(
            f"The file's tensors do not fit {type(module).__name__}: {'; '.join(told)}.",
            "Check that --arch builds the model with the options it was trained with.",
        )
    on_meta = any(isinstance(entry, Tensor) and entry.is_meta for entry in own.values())
    module.load_state_dict(state_dict, assign=on_meta)


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
    if archive.is_zip(path):
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
        loaded = next((loaded[key] for key in _WRAPPINGS if isinstance(loaded.get(key), nn.Module)), loaded)
    if not isinstance(loaded, nn.Module):
        raise BadFile(f"{path} holds a {type(loaded).__name__} without a module.", _ARCH)
    return loaded


def _wrapping(loaded: Any) -> str | None:
    """The key under which a checkpoint keeps its state_dict; None when this is not a wrapping."""
    if not isinstance(loaded, Mapping):
        return None
    return next((key for key in _WRAPPINGS if isinstance(loaded.get(key), Mapping)), None)


def _without_prefixes(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The same tensors under the names of the unwrapped model; appends what was stripped to `notes`."""
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if plain.keys() != tensors.keys() and len(plain) == len(tensors):
        notes.append("stripped '_orig_mod.' (torch.compile) from names")
        tensors = plain
    if all(name.startswith("module.") for name in tensors):
        notes.append("stripped 'module.' (DistributedDataParallel) from names")
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _with_tied(own: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the names added that the module has for tensors it holds under another name, too."""
    present = {id(entry): name for name, entry in own.items() if name in state_dict}
    tied = {name: state_dict[present[id(entry)]] for name, entry in own.items() if id(entry) in present}
    return {**tied, **state_dict}


def _difference(own: Any, new: Tensor) -> str:
    """Why `new` cannot take the place of `own`; empty when it can."""
    if not isinstance(own, Tensor) or nn.parameter.is_lazy(own):  # extra state; a shape that is yet to come
        return ""
    if own.shape != new.shape:
        return f"file {list(new.shape)}, model {list(own.shape)}"
    same_kind = (own.is_complex(), own.is_floating_point()) == (new.is_complex(), new.is_floating_point())
    return "" if same_kind else f"file {new.dtype}, model {own.dtype}"


def _load_pickled(path: str | PathLike[str]) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _load_torchscript(path: str | PathLike[str]) -> nn.Module:
    import torch.jit

    return torch.jit.load(path, map_location="cpu")


def _load_exported(path: str | PathLike[str]) -> nn.Module:
    import torch.export

    with open(path, "rb") as file:  # given a path, torch would look at its extension
        return torch.export.load(file).module()


_TRUSTED: dict[FileKind, Callable[[str | PathLike[str]], Any]] = {
    FileKind.TENSORS: _load_pickled,
    FileKind.MODULE: _load_pickled,
    FileKind.LEGACY: _load_pickled,
    FileKind.TORCHSCRIPT: _load_torchscript,
    FileKind.EXPORTED: _load_exported,
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
        return f"{path} needs the class {name} of the script that saved it.", f"Instead {SAVE_WEIGHTS}"
    cause = f"{path} needs {module}.{name}, which the installed {module} lacks."
    return cause, f"Install the version it was saved with, or {SAVE_WEIGHTS}"
