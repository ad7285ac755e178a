"""Weights cut into several files, with an index in JSON that says which tensor is in which of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from curvature.errors import BadFile, listing, printable
from curvature.io.archive import AGAIN
from curvature.io.recognise import FileKind, index_of, json_object, recognise


def read_shards(path: str | PathLike[str], read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """All tensors of the index at `path`, or of the one in that folder; `read` reads one of its files.

    BadFile when a file or a tensor is missing, and for a name that leads out of the folder.
    """
    index = Path(path)
    if index.is_dir():
        found = index_of(index)
        assert found is not None, "recognised as such"
        index = found
    places = json_object(index).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(map(_is_plain, places.values())):
        raise BadFile(f"{index} does not say which tensor is in which file of its folder.", AGAIN)
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        if not os.path.lexists(index.parent / shard):
            raise BadFile(f"There is no file {index.parent / shard}, which {index.name} names.", AGAIN)
        if recognise(index.parent / shard) is FileKind.SHARDS:  # which could be this one
            raise BadFile(f"{index} names {printable(shard)}, which is no file of weights.", AGAIN)
        held = read(index.parent / shard)
        if not isinstance(held, Mapping):
            raise BadFile(f"{index.parent / shard} holds a {type(held).__name__}, not tensors by name.", AGAIN)
        tensors |= {name: tensor for name, tensor in held.items() if places.get(name) == shard}
    if missing := [name for name in places if name not in tensors]:
        raise BadFile(f"The files of {index} lack {len(missing)} of its tensors: {listing(missing, 3)}.", AGAIN)
    return tensors


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file, without a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and printable(name) == name
