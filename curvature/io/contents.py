"""What is in a model file, found without running any of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from curvature.errors import BadFile, CurvatureError, listing, printable
from curvature.io.architecture import load_stock
from curvature.io.archive import AGAIN
from curvature.io.hugging_face import ADAPTER, weights_file
from curvature.io.models import read_weights
from curvature.io.pickles import scan
from curvature.io.recognise import FileKind, json_object, pickle_globals, recognise
from curvature.io.state_dicts import state_dict_of
from curvature.io.tensors import non_finite_tensors
from curvature.io.weights import read_tensors

Looked = tuple[dict[str, Tensor], list[str], list[str]]  # tensors by name, notes, code that loading would run

_PROGRAMS = {FileKind.TORCHSCRIPT: "TorchScript", FileKind.EXPORTED: "an exported program"}
_UNREAD = "tensors are not listed, since reading them runs code"


def contents(path: str | Path) -> dict[str, Any]:
    """Kind, tensors (name, dtype, shape), their count and bytes, which are not finite, and the code loading would run.

    JSON-ready. `code` is empty when the file loads as data; where it is not, there may be no tensors to list.
    """
    path = Path(path)
    kind = recognise(path)
    state, notes, code = _looked_into(path, kind)
    return {
        "kind": kind.value,
        "tensors": [
            {"name": printable(name), "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
            for name, t in state.items()
        ],
        "parameters": sum(t.numel() for t in state.values()),
        "bytes": sum(t.nbytes for t in state.values()),
        "not_finite": [printable(name) for name in non_finite_tensors(state)],
        "code": code,
        "notes": notes,
    }


def _looked_into(path: Path, kind: FileKind) -> Looked:
    if kind in _PROGRAMS:
        return {}, [_UNREAD], [_PROGRAMS[kind]]
    if kind is FileKind.DCP:
        return {}, [_UNREAD], ["pickled metadata", *_names_in(path / ".metadata")]
    if kind is FileKind.OBJECTIVE:
        return _objective(path)
    if kind is FileKind.MODULE:
        return _pickled(path)
    if kind is FileKind.HUGGING_FACE:
        return _folder(path)
    if kind is FileKind.ADAPTER:
        base = json_object(path / "adapter_config.json").get("base_model_name_or_path")
        state, notes = state_dict_of(read_tensors(weights_file(path, ADAPTER)), path)
        return state, [f"base model {printable(base)}", *notes], []
    state, notes, given = read_weights(path)
    options = [f"hyper_parameters {listing([f'{key}={value}' for key, value in given.items()])}"] if given else []
    return dict(state), [*options, *notes], []


def _objective(path: Path) -> Looked:
    held = read_tensors(path)
    state, loss, architecture = (held.get(key) for key in ("state", "loss", "architecture"))
    if not all(isinstance(entry, Mapping) for entry in (state, loss, architecture)):
        raise BadFile(f"{path} is not a complete objective.", "Write it again with objective.save.")
    code = [printable(entry["path"]) for entry in (architecture, loss) if "path" in entry]
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return tensors, [f"loss {printable(loss.get('name', loss.get('path')))}"], code


def _folder(path: Path) -> Looked:
    config = json_object(path / "config.json")
    named, remote = config.get("architectures"), config.get("auto_map")
    state, notes, _ = read_weights(path)
    notes = [f"architecture {listing(named if isinstance(named, list) else ['not named'])}", *notes]
    if isinstance(remote, Mapping):
        notes.append(f"brings code of its own, which is never run: {listing(list(remote.values()), 3)}")
    return dict(state), notes, []


def _names_in(metadata: Path) -> list[str]:
    """What the pickle would look up, found without running it."""
    with open(metadata, "rb") as file:
        try:
            return [printable(name) for name in scan(file).globals]
        except ValueError as error:
            raise BadFile(f"{metadata} is damaged: {printable(error)}.", AGAIN) from error


def _pickled(path: Path) -> Looked:
    try:
        module = load_stock(path)
    except CurvatureError as error:
        return {}, [error.cause], [printable(name) for name in pickle_globals(path)]
    return module.state_dict(), ["a model of stock torch.nn layers, which loads without --trust"], []
