"""Whether tensors that came out of a file are plain dense data that can be used as weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, printable

_Place = tuple[Any, Any] | None  # the place of the container, and the key in it; None for the whole


def check_tensors(loaded: Any, path: str | PathLike[str]) -> None:
    """Raise BadFile naming the first tensor, in nested containers too, that is not plain dense data."""
    for name, tensor in _tensors(loaded):
        if flaw := _flaw(tensor):
            cause, fix = flaw
            raise BadFile(f"In {path}, {printable(name) or 'the tensor'} {cause}.", fix)


def non_finite_tensors(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in state_dict.items() if not _finite(tensor)]


def _tensors(loaded: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and tuples, with its keys joined by dots."""
    waiting: list[tuple[_Place, Any]] = [(None, loaded)]
    entered: set[int] = set()  # a pickle can share and nest containers without end: enter each once
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, Tensor):
            yield _name(place), item
        elif isinstance(item, Mapping | list | tuple) and id(item) not in entered:
            entered.add(id(item))
            children = item.items() if isinstance(item, Mapping) else enumerate(item)
            waiting.extend(((place, key), child) for key, child in children)


def _name(place: _Place) -> str:
    """The keys on the way to a place; put together only where it is wanted, since a pickle can nest deeply."""
    keys = []
    while place is not None:
        place, key = place
        keys.append(printable(key))
    return ".".join(reversed(keys))


def _flaw(tensor: Tensor) -> tuple[str, str] | None:
    """What keeps a tensor from being used as plain dense data, and the fix; None for a good one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}, not a plain tensor", "Save plain tensors instead."
    if tensor.is_quantized:
        return "is quantised and has no derivatives", "Give the float model that it was made from."
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout})", "Save tensor.to_dense() instead."
    if tensor.is_meta:
        return "is a meta tensor, which holds no numbers", "Save the model after its weights were loaded."
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.itemsize > stored:
        return f"has shape {list(tensor.shape)} but {stored} bytes are stored", "Save tensor.clone() instead."
    if tensor._backward_hooks or any(hasattr(Tensor, name) for name in vars(tensor)):
        return "carries hooks or replaces methods of tensors", "Save tensor.detach().clone() instead."
    return None


def _finite(tensor: Tensor) -> bool:
    """Whether all entries are finite numbers, as integers always are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:  # isfinite knows no 8-bit floats
        tensor = tensor.float()
    return bool(tensor.isfinite().all())
