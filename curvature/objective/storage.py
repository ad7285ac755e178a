"""An objective as one file: architecture, weights, loss and data, so that nothing else is needed to ask again.

Everything in it is data. A model of stock torch.nn layers is written down layer by layer; of any other model only where
its class lives, and loading that runs code, so it needs trust or an architecture named by the person who loads.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from curvature.errors import BadFile, BadObjective, TooLarge, UnsafeFile, listing, one_line
from curvature.io.architecture import describe, restore
from curvature.io.data import read_data
from curvature.io.files import sha256, write_atomically
from curvature.io.recognise import OBJECTIVE_FORMAT
from curvature.io.weights import read_tensors
from curvature.objective.batches import Batches, Cut, leading, mapped, whole
from curvature.objective.function import OutputLoss, ScalarLoss
from curvature.objective.losses import by_class_name, written

if TYPE_CHECKING:
    from curvature.objective.objective import Objective

STORED = 256 << 20  # bytes of data that go into the file itself


def save(objective: Objective, path: Path, *, data: str | Path | None = None) -> Path:
    """Write `objective` to `path`; `data` names a file that holds its data, stored as path and checksum."""
    module = objective.function.module
    stock = describe(module)
    contents = {
        "format": OBJECTIVE_FORMAT,
        "architecture": stock if stock is not None else {"path": _path_of(type(module))},
        "state": {**objective.params, **objective.frozen, **objective.buffers},
        "selected": list(objective.params),
        "loss": _loss_entry(objective),
        "data": _data_entry(objective, path, data),
        "mode": objective.mode,
        "seed": objective.seed,
        "l2": objective.l2,
    }
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    buffer.seek(0)
    if code := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
        raise BadObjective(
            f"The batches hold objects of {listing(code)}, which is code and not data.",
            "Yield tuples, lists or dicts of tensors, numbers and text.",
        )
    write_atomically(path, buffer.getvalue())
    return path


def load(
    path: Path,
    *,
    trust: bool = False,
    arch: Callable[[], nn.Module] | None = None,
    data: Any = None,
    batch_size: Cut = "auto",
) -> Objective:
    """The objective that `save` wrote; `arch` makes the module where it is no stock one, `data` replaces its data.

    Raises UnsafeFile when the file names code and neither `trust` nor `arch` is given.
    """
    from curvature.objective.objective import Objective

    contents = read_tensors(path)
    try:
        state, selected = contents["state"], contents["selected"]
        module = _module(contents["architecture"], state, trust, arch, path)
        function = _function(contents["loss"], module, trust, path)
        batches = _batches(contents["data"], path) if data is None else Batches(())
        mode, seed = contents["mode"], int(contents["seed"])
        params = {name: state[name] for name in selected}
        frozen = {name: state[name] for name, _ in module.named_parameters() if name not in params}
        buffers = {name: state[name] for name, _ in module.named_buffers()}
        held = {name: t.shape for name, t in {**params, **frozen, **buffers}.items()}
        batches = dataclasses.replace(batches, seed=seed)
        objective = Objective(function, params, frozen, buffers, batches, mode, seed, contents["l2"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFile(
            f"{path} is not a complete objective: {error!r}.", "Write it again with objective.save."
        ) from error
    shapes = {name: t.shape for name, t in (*module.named_parameters(), *module.named_buffers())}
    if held != shapes or not params:
        raise BadFile(f"The weights in {path} do not fit its architecture.", "Give the right one with --arch.")
    return objective if data is None else objective.on(data, batch_size=batch_size)


def _module(
    entry: dict[str, Any], state: dict[str, Any], trust: bool, arch: Callable[[], nn.Module] | None, path: Path
) -> nn.Module:
    if arch is not None:
        return arch()
    if "path" not in entry:
        return restore(entry, state)  # around the stored tensors: allocates nothing that the file merely claims
    make = _trusted(entry["path"], trust, path, "--arch")
    try:
        return make()
    except Exception as error:  # a constructor can raise anything
        raise BadFile(
            f"{path} needs {entry['path']}, which cannot be made without arguments: {one_line(error)}.",
            "Name code that makes it with --arch FILE.py:NAME.",
        ) from error


def _function(entry: dict[str, Any], module: nn.Module, trust: bool, path: Path) -> OutputLoss | ScalarLoss:
    if "path" in entry:
        return ScalarLoss(module, _trusted(entry["path"], trust, path, "--objective"))
    return OutputLoss(module, by_class_name(entry["name"], entry["options"]))


def _trusted(name: str, trust: bool, path: Path, otherwise: str) -> Any:
    """The object at 'package.module:name', imported only with `trust`."""
    if not trust:
        raise UnsafeFile(
            f"{path} needs the code at {name}.", f"Pass --trust if you trust it, or name yours with {otherwise}."
        )
    try:
        return _at(name)
    except (ImportError, AttributeError) as error:
        raise BadFile(f"{path} needs {name}, which cannot be imported: {error}.", f"Use {otherwise}.") from error


def _at(name: str) -> Any:
    """The object at 'package.module:name', imported."""
    place, _, attribute = name.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(place))


def _path_of(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _is_found(thing: Any) -> bool:
    """Whether its path leads back to it, as those of lambdas, local functions and bound methods do not."""
    try:
        return _at(_path_of(thing)) is thing
    except (ImportError, AttributeError):
        return False


def _loss_entry(objective: Objective) -> dict[str, Any]:
    function = objective.function
    if isinstance(function, OutputLoss):
        return written(function.loss)
    if function.terms is not None or not _is_found(function.function):
        raise BadObjective(
            "A loss with `terms`, or that is no function of a module, cannot be written to a file.",
            "Keep the function that builds the objective, and use `--objective FILE.py:NAME`.",
        )
    return {"path": _path_of(function.function)}


def _data_entry(objective: Objective, path: Path, data: str | Path | None) -> dict[str, Any]:
    """Batches as they are, or the file they come from, relative to the objective's."""
    if data is not None:
        return _file_entry(objective, path, Path(data))
    batches = list(objective.batches)
    size = 0

    def measured(leaf: Any) -> Any:
        nonlocal size
        leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        size += leaf.nbytes if isinstance(leaf, torch.Tensor) else 0
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf  # a slice would drag its whole storage along

    stored = [mapped(measured, batch) for batch in batches]
    if size > STORED:
        raise TooLarge(
            f"The data take {size / 2**20:.0f} MiB, beyond the {STORED >> 20} MiB that are stored with an objective.",
            "Write them to a file (numpy.savez, safetensors) and pass its path: objective.save(path, data=FILE).",
        )
    return {"batches": stored}


def _file_entry(objective: Objective, path: Path, data: Path) -> dict[str, Any]:
    held = read_data(data)
    size = leading(next(iter(objective.batches), ())) if whole(held) else None
    if Batches.of(held, batch_size=size).digests != objective.batches.digests:
        raise BadObjective(
            f"{data} does not hold the data of this objective, batch for batch.",
            "Build the objective from that file, or save without `data`.",
        )
    place = Path(os.path.relpath(data.resolve(), path.resolve().parent))
    return {"path": place.as_posix(), "sha256": sha256(data), "batch_size": size}


def _batches(entry: dict[str, Any], path: Path) -> Batches:
    if "path" not in entry:
        return Batches(list(entry["batches"]), fixed=True)
    place = path.parent / entry["path"]
    if not place.is_file():
        raise BadFile(f"The data of {path} are missing: {place}.", "Put the file back, or give others with --data.")
    if sha256(place) != entry["sha256"]:
        raise BadFile(f"The data of {path} have changed since: {place}.", "Restore them, or give others with --data.")
    return Batches.of(read_data(place), batch_size=entry["batch_size"])
