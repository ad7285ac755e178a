"""What is in a model file, found without running any of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvature.errors import BadFile, CurvatureError, printable
from curvature.io.architecture import load_stock
from curvature.io.recognise import FileKind, pickle_globals, recognise
from curvature.io.tensors import non_finite_tensors
from curvature.io.weights import read_tensors, state_dict_of

RUNS_CODE = {
    FileKind.TORCHSCRIPT: "TorchScript",
    FileKind.EXPORTED: "an exported program",
    FileKind.DCP: "pickled metadata",
}


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


def _looked_into(path: Path, kind: FileKind) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(tensors by name, notes, code it would run)."""
    if kind in RUNS_CODE:
        return {}, ["tensors are not listed, since reading them runs code"], [RUNS_CODE[kind]]
    if kind is FileKind.HUGGING_FACE:
        return _folder(path)
    if kind is FileKind.OBJECTIVE:
        held = read_tensors(path)
        loss, architecture = held.get("loss", {}), held.get("architecture", {})
        code = [printable(entry["path"]) for entry in (architecture, loss) if "path" in entry]
        return dict(held["state"]), [f"loss {printable(loss.get('name', loss.get('path')))}"], code
    if kind is FileKind.MODULE:
        return _pickled(path)
    state, notes = state_dict_of(read_tensors(path))
    return state, notes, []


def _pickled(path: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    try:
        module: nn.Module = load_stock(path)
    except CurvatureError as error:
        return {}, [error.cause], [printable(name) for name in pickle_globals(path)]
    return module.state_dict(), ["a model of stock torch.nn layers, which loads without --trust"], []


def _folder(path: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of a Hugging Face folder, from all its safetensors files."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}/config.json cannot be read: {error}.", "Download the folder again.") from error
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state.update(read_tensors(file))
    named = config.get("architectures") or ["not named"]
    return state, [f"architecture {printable(', '.join(map(str, named)))}"], []
