"""Reading without running: torch's safe reader and safetensors, with their refusals in our words.

`weights_only=True` judges what may be built. Before it comes the verification that torch leaves out; after it
the message, since torch's own advises to switch safety off.
"""

from __future__ import annotations

import io
import pickle
import pkgutil
import re
import warnings
import zipfile
from collections.abc import Sequence
from os import PathLike
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from curvature.errors import BadFile, TooLarge, UnsafeFile, listing, one_line, printable
from curvature.io import archive
from curvature.io.recognise import pickle_globals

_ATTACK = {  # modules and functions that run programs, open files or connections, or hide what does
    *("os", "posix", "nt", "subprocess", "pty", "socket", "shutil", "runpy", "sys", "importlib", "ctypes", "pickle"),
    *("_pickle", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.__import__"),
}
SAVE_WEIGHTS = "use torch.save(model.state_dict(), path) and --arch FILE.py:NAME."


def read_pickled(path: str | PathLike[str], allowed: Sequence[Any], *, fix: str | None = None) -> Any:
    """What a torch.save file holds, built from torch's harmless classes and the `allowed` ones.

    `allowed` is as for `torch.serialization.safe_globals`. UnsafeFile and BadFile are raised as by
    `read_tensors`, TooLarge when memory does not suffice; the tensors are yet to be checked.
    """
    # On leaving, torch forgets all that was listed: list nothing that the program had allowed before.
    new = [one for one in allowed if one not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(new), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error below
        if refused := _refused(pickle_globals(path)):
            raise _quantised(path) if any(".quantized." in name for name in refused) else _unsafe(path, refused, fix)
        if archive.is_zip(path):
            archive.verify(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _not_plain(path, str(error)) from None  # torch's text advises weights_only=False
        except Exception as error:  # a hostile or damaged pickle can make its reader raise anything
            if _out_of_memory(error):
                raise TooLarge(f"{path} needs more memory than there is.", "Use a larger machine.") from error
            raise BadFile(f"{path} is damaged: {one_line(error)}.", archive.AGAIN) from error


def read_safetensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file; BadFile when its header or its length is wrong."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:  # KeyError: an unknown dtype
        raise BadFile(f"{path} is damaged: {one_line(error)}.", archive.AGAIN) from error


def resolved(name: str) -> Any:
    """The class or function of that dotted name, imported; ValueError when there is none."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        refusal = f"--allow-global {printable(name)} cannot be imported: {one_line(error)}."
        raise ValueError(refusal) from error


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


def _unsafe(path: str | PathLike[str], names: Sequence[str], fix: str | None = None) -> UnsafeFile:
    """The refusal of a file that uses these names; the usual `fix` is to allow them, unless only attacks need them."""
    if any(name.partition(".")[0] in _ATTACK or name in _ATTACK for name in names):
        fix = "No model needs that: do not load it. If you made it yourself, save its tensors as safetensors."
    return UnsafeFile(
        f"{path} uses what could run code: {listing(names)}.",
        fix
        or f"If these are harmless pass --allow-global {listing(names).replace(', ', ',')}, or save the tensors "
        "as safetensors; if you trust the author of the file pass --trust.",
    )


def _quantised(path: str | PathLike[str]) -> BadFile:
    """The refusal of a file of torch.ao.quantization, which trust would not make differentiable."""
    return BadFile(f"{path} is quantised and has no derivatives.", "Give the float model that it was made from.")


def _not_plain(path: str | PathLike[str], told: str) -> BadFile | UnsafeFile:
    """Why torch's safe reader stopped although every name in the file is allowed."""
    if "Unsupported operand" in told:
        return BadFile(
            f"{path} was saved with a pickle protocol that cannot be read safely.",
            "Save it again with torch.save and its default pickle_protocol, or as safetensors.",
        )
    if "persistent_load" in told:
        cause = f"{path} is a pickled nn.Module in the format before 1.6, which only its code can read."
        return UnsafeFile(cause, f"Pass --trust if you trust its author, or {SAVE_WEIGHTS}")
    # Some classes are met only as the type of an object: numpy's dtypes.
    built = re.search(r"Can only (?:build|create) .*got <class '([\w.]+)'>", told)
    if built:
        return _unsafe(path, [built[1]])
    cause = f"{path} does more than a file of tensors needs."
    return UnsafeFile(cause, "Pass --trust if you trust its author.")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
