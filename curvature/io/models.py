"""A module from a file or folder, of whatever kind: told by content, and without running its code unless trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule

from curvature.errors import BadFile, UnsafeFile, listing
from curvature.io.architecture import load_stock
from curvature.io.hugging_face import read_adapter, read_folder, weights_file
from curvature.io.recognise import FileKind, pickle_globals, recognise
from curvature.io.state_dicts import fitted, load_into, state_dict_of
from curvature.io.weights import load_trusted, read_tensors, read_trusted

Architecture = Callable[[Mapping[str, Any]], nn.Module]

WEIGHTS = (FileKind.TENSORS, FileKind.LEGACY, FileKind.LIGHTNING, FileKind.SAFETENSORS, FileKind.SHARDS, FileKind.DCP)
_PICKLED = (FileKind.TENSORS, FileKind.LEGACY, FileKind.LIGHTNING, FileKind.DCP)


class Weights(NamedTuple):
    """Tensors by the names of a state_dict, notes on how they were found, and Lightning's hyper_parameters."""

    state_dict: Mapping[str, Tensor]
    notes: list[str]
    hyper_parameters: Mapping[str, Any]


def read_module(
    path: str | Path,
    *,
    arch: Architecture | None = None,
    base: Path | None = None,
    trust: bool = False,
    allow: Sequence[str] = (),
) -> tuple[nn.Module, list[str]]:
    """The module at `path`, on the CPU, and notes on what was done to read it.

    Weights need `arch`, which makes the module they belong to, from the hyper_parameters of a Lightning checkpoint
    (empty for others). A pickled nn.Sequential of stock layers and a Hugging Face folder load as data, as does a PEFT
    adapter, of whose model `base` is the folder; any other pickled module, TorchScript and .pt2 run code and need
    `trust`. `allow` names further classes that may be unpickled. Raises BadFile or UnsafeFile with the ways on, before
    any code has run.
    """
    path = Path(path)
    kind = recognise(path)

    def read(file: Path) -> Mapping[str, Tensor]:
        return read_weights(file, trust=False, allow=allow).state_dict

    if arch is not None:
        held = read_weights(path, trust=trust, allow=allow)
        module = arch(held.hyper_parameters)
        state, notes = fitted(module, held.state_dict, path)
        load_into(module, state, path)
        return module, [*held.notes, *notes]
    if kind is FileKind.HUGGING_FACE:
        return read_folder(path, read)
    if kind is FileKind.ADAPTER:
        return read_adapter(path, read, base)
    if kind in WEIGHTS and kind is not FileKind.LEGACY and (trust or kind is not FileKind.DCP):
        raise BadFile(
            f"{path} is {kind.value}: weights without the model they belong to.",
            "Name the code that makes the model: --arch ./file.py:NAME.",
        )
    if trust:
        return load_trusted(path), [f"ran code of {path}, as --trust allows"]
    return _stock_or_refuse(path, kind), []


def fixed_batch(module: nn.Module) -> int | None:
    """The only number of examples that an exported program takes; None when it takes any, or is something else."""
    if not isinstance(module, GraphModule):
        return None
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    first = [value.shape[0] for value in inputs if isinstance(value, Tensor) and value.ndim]
    fixed = bool(first) and all(isinstance(size, int) and size == first[0] for size in first)  # others are symbols
    return first[0] if fixed else None


def read_weights(path: str | Path, *, trust: bool = False, allow: Sequence[str] = ()) -> Weights:
    """The weights in a file or folder of any kind; those inside a module or a program as its state_dict."""
    path = Path(path)
    kind = recognise(path)
    if kind is FileKind.HUGGING_FACE:
        return read_weights(weights_file(path), trust=trust, allow=allow)
    if kind in (FileKind.MODULE, FileKind.TORCHSCRIPT, FileKind.EXPORTED):
        module = load_trusted(path) if trust else _stock_or_refuse(path, kind)
        return Weights(module.state_dict(), [f"took the weights of {kind.value}"], {})
    held = read_trusted(path) if trust and kind in _PICKLED else read_tensors(path, allow=allow)
    if isinstance(held, nn.Module):  # in the format before 1.6, where only reading tells
        return Weights(held.state_dict(), [f"took the weights of {kind.value}"], {})
    given = held.get("hyper_parameters") if kind is FileKind.LIGHTNING else None
    return Weights(*state_dict_of(held, path), given if isinstance(given, Mapping) else {})


def _stock_or_refuse(path: Path, kind: FileKind) -> nn.Module:
    """The module of stock layers pickled in the file; UnsafeFile for everything that would run code."""
    if kind in (FileKind.MODULE, FileKind.LEGACY):
        return load_stock(path)
    if kind is FileKind.DCP:
        read_tensors(path)  # raises with its own ways on
    names = f" ({listing(pickle_globals(path), 3)})" if kind is FileKind.MODULE else ""
    raise UnsafeFile(
        f"{path} is {kind.value}, and loading it runs code{names}.",
        "Pass --trust if you trust its author, or save model.state_dict() and pass --arch ./file.py:NAME.",
    )
