"""Tensors and modules from files: data is read without running code, code only where the caller says trust.

`read_tensors` is the safe way, `load_trusted` the other; nothing else in the package opens a model file.
torch's safe reader (`weights_only=True`) judges what may be built. Around it: checksums before, since torch
checks none, and a look at the tensors after, since some that load are no weights. Only zip files carry
checksums: damage in safetensors, or in the format before 1.6, goes unseen unless lengths or headers change.
"""

from __future__ import annotations

import io
import pickle
import pkgutil
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from curvature.errors import BadFile, TooLarge, UnsafeFile, printable
from curvature.io import archive
from curvature.io.recognise import FileKind, pickle_globals, recognise
from curvature.io.tensors import check_tensors
from curvature.io.tensors import non_finite_tensors as non_finite_tensors

SHOWN = 3  # names listed of each kind of mismatch

_WRAPPINGS = ("state_dict", "model_state_dict", "model", "module")
_ARCH = "Name the class of the model with --arch FILE.py:NAME."
_WEIGHTS = "use torch.save(model.state_dict(), path) and --arch FILE.py:NAME."


def read_tensors(path: str | PathLike[str], *, allow: Sequence[str] = ()) -> Any:
    """The dict (or other plain object) of tensors that the file holds, on the CPU; none of its code is run.

    `allow` names further classes and functions, by dotted path, that the file may use: they are imported, and
    the file may call them. UnsafeFile lists those it uses that are neither harmless nor allowed. BadFile when
    it is damaged, or a tensor is not plain dense data (sparse, quantised, larger than what is stored of it).
    """
    kind = recognise(path)
    if kind is FileKind.SAFETENSORS:
        loaded = _read_safetensors(path)
    elif kind in _UNREADABLE:
        error, cause, fix = _UNREADABLE[kind]
        raise error(f"{path} is {kind.value}{cause}", fix)
    else:
        loaded = read_pickled(path, [(_resolved(name), name) for name in allow])
    check_tensors(loaded, path)
    return loaded


_UNREADABLE: dict[FileKind, tuple[type[BadFile | UnsafeFile], str, str]] = {
    FileKind.HUGGING_FACE: (BadFile, ", not one file of weights.", "Give the model.safetensors in it."),
    FileKind.TORCHSCRIPT: (
        UnsafeFile,
        ", which can run code when it is loaded.",
        f"Pass --trust if you trust its author, or {_WEIGHTS}",
    ),
    FileKind.EXPORTED: (
        UnsafeFile,
        ", which can run code when it is loaded.",
        f"Pass --trust if you trust its author, or {_WEIGHTS}",
    ),
    FileKind.DCP: (
        UnsafeFile,
        ", whose index is a pickle that can run code.",
        "If you trust it, convert it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save.",
    ),
}


def read_pickled(path: str | PathLike[str], allowed: Sequence[Any]) -> Any:
    """What a torch.save file holds, built from torch's harmless classes and the `allowed` ones.

    `allowed` is as for `torch.serialization.safe_globals`. UnsafeFile and BadFile are raised as by
    `read_tensors`, TooLarge when memory does not suffice; the tensors are yet to be checked.
    """
    # On leaving, torch forgets all that was listed: list nothing that the program had allowed before.
    new = [one for one in allowed if one not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(new), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error below
        if refused := _refused(pickle_globals(path)):
            raise _unsafe(path, refused)
        if archive.is_zip(path):
            archive.verify(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _not_plain(path, str(error)) from None  # torch's text advises weights_only=False
        except Exception as error:  # a hostile or damaged pickle can make its reader raise anything
            if _out_of_memory(error):
                raise TooLarge(f"{path} needs more memory than there is.", "Use a larger machine.") from error
            raise BadFile(f"{path} is damaged: {_told(error)}.", archive.AGAIN) from error


def state_dict_of(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict inside what a file holds, and a note for each thing that was taken off or left out.

    Looks through the usual wrappings of checkpoints (also Lightning's), then strips the prefixes of
    torch.compile and DistributedDataParallel. BadFile when no tensors are where a state_dict should be.
    """
    notes = []
    while wrapping := _wrapping(loaded):
        left = [printable(key) for key in loaded if key != wrapping]
        notes.append(f"took {wrapping!r}" + (f", left out {', '.join(left)}" if left else ""))
        loaded = loaded[wrapping]
    entries = loaded if isinstance(loaded, Mapping) else {}
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    tensors = {name: entry for name, entry in tensors.items() if isinstance(name, str)}
    if not tensors:
        held = ", ".join(printable(key) for key in list(entries)[:8]) or f"a {type(loaded).__name__}"
        raise BadFile(f"There is no state_dict in what the file holds: {held}.", f"To save one {_WEIGHTS}")
    if len(tensors) < len(entries):
        left = [printable(name) for name in entries if name not in tensors]
        notes.append(f"left out what is not a tensor: {', '.join(left)}")
    return _without_prefixes(tensors, notes), notes


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy `state_dict` into `module`; a module on the meta device takes the tensors themselves.

    BadFile, before any tensor changed, when names or shapes differ, or complex numbers would become real.
    """
    own = {name: entry for name, entry in module.state_dict().items() if isinstance(entry, Tensor)}
    differences = {name: _difference(own[name], state_dict[name]) for name in own if name in state_dict}
    problems = {
        "missing": [printable(name) for name in own if name not in state_dict],
        "unexpected": [printable(name) for name in state_dict if name not in own],
        "different": [f"{printable(name)} ({words})" for name, words in differences.items() if words],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
            for kind, names in problems.items()
            if names
        )
        raise BadFile(
            f"The file's tensors do not fit {type(module).__name__}: {listed}.",
            "Check that --arch builds the model with the options it was trained with.",
        )
    module.load_state_dict(state_dict, assign=any(tensor.is_meta for tensor in own.values()))


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


def _read_safetensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file; BadFile when its header or its length is wrong."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:  # KeyError: dtype unknown to torch
        raise BadFile(f"{path} is damaged: {_told(error)}.", archive.AGAIN) from error


def _resolved(name: str) -> Any:
    """The class or function of that dotted name, imported; ValueError when there is none."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--allow-global {printable(name)} cannot be imported: {_told(error)}.") from error


def _refused(names: Sequence[str]) -> list[str]:
    """Those of the dotted names that torch's safe reader does not allow at this moment.

    torch tells only for a whole file in the zip format: it is shown one that mentions them and nothing else.
    """
    split = (name.replace("\n", "?").rpartition(".") for name in names)
    mentions = "".join(f"c{module}\n{attribute}\n" for module, _, attribute in split)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        records.writestr("names/data.pkl", b"\x80\x02" + mentions.encode(errors="replace") + b".")
        records.writestr("names/version", b"3")
    file.seek(0)
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def _unsafe(path: str | PathLike[str], names: Sequence[str]) -> UnsafeFile:
    """The refusal of a file that uses these names."""
    shown = [printable(name) for name in names]
    return UnsafeFile(
        f"{path} uses what could run code: {', '.join(shown)}.",
        f"If these are harmless pass --allow-global {','.join(shown)}, or save the tensors as safetensors; "
        "if you trust the author of the file pass --trust.",
    )


def _not_plain(path: str | PathLike[str], told: str) -> BadFile | UnsafeFile:
    """Why torch's safe reader stopped although every name in the file is allowed."""
    if "Unsupported operand" in told:
        return BadFile(
            f"{path} was saved with a pickle protocol that cannot be read safely.",
            "Save it again with torch.save and its default pickle_protocol, or as safetensors.",
        )
    built = re.search(r"<class '([\w.]+)'>", told)  # met only as the type of an object: numpy's dtypes
    if built:
        return _unsafe(path, [built[1]])
    cause = f"{path} does more than a file of tensors needs."
    return UnsafeFile(cause, "Pass --trust if you trust its author.")


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


def _difference(own: Tensor, new: Tensor) -> str:
    """Why `new` cannot take the place of `own`; empty when it can."""
    if nn.parameter.is_lazy(own):  # takes any shape
        return ""
    if own.shape != new.shape:
        return f"file {list(new.shape)}, model {list(own.shape)}"
    if new.is_complex() and not own.is_complex():
        return f"file {new.dtype}, model {own.dtype}"
    return ""


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
        return cause, f"Install it or add its folder to PYTHONPATH, or {_WEIGHTS}"
    missing = re.match(r"Can't get attribute '([\w.]+)' on <module '([\w.]+)'", str(error))
    if missing is None:
        cause = f"{path} failed while it was loaded: {_told(error)}."
        return cause, f"Load it where it was saved, or {_WEIGHTS}"
    name, module = missing.groups()
    if module.endswith("__main__"):  # under `python -m package` it is shown as package.__main__
        return f"{path} needs the class {name} of the script that saved it.", f"Instead {_WEIGHTS}"
    cause = f"{path} needs {module}.{name}, which the installed {module} lacks."
    return cause, f"Install the version it was saved with, or {_WEIGHTS}"


def _told(error: BaseException) -> str:
    """The error in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {printable(first, 160).rstrip('.')}" if first else type(error).__name__


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
