"""Calling a module with given tensors in place of its parameters and buffers, which stay as they were.

That is torch.func.functional_call, and what it leaves out: TorchScript modules, alone or as parts of others,
and the second list of their parameters that recurrent layers keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.jit import ScriptModule


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """What `module(*args, **kwargs)` returns with the named tensors as its parameters and buffers.

    Gradients flow to `tensors`. The name of one of several tied parameters stands for all of them. Buffers
    that the call updates in place are updated in `tensors`: pass copies.
    """
    kwargs = dict(kwargs or {})
    parts = list(module.named_modules())
    slots = [slot for path, part in parts if isinstance(part, ScriptModule) for slot in _slots(path, part)]
    scripted = {slot.path for slot in slots}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scripted}
    with _swapped(slots, tensors):
        if not isinstance(module, ScriptModule):
            return _call_eager(module, rest, args, kwargs)
        if rest:
            raise KeyError(f"The TorchScript module has no parameter or buffer named {min(rest)!r}.")
        return module(*args, **kwargs)


def _call_eager(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return functional_call(module, _by_slot(module, tensors), args, kwargs, tie_weights=False)
    finally:
        for part in module.modules():
            if isinstance(part, nn.RNNBase):  # its _flat_weights would stay `tensors` until its next call
                part._update_flat_weights()


def _by_slot(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by one name for each place that a module keeps one, tied ones at all of theirs.

    torch ties them by itself, but where a module is registered twice it then restores the wrong tensors.
    """
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    given = {id(t): tensors[name] for name, t in every if name in tensors}
    slots = {}
    for path, part in module.named_modules():  # each once
        if not isinstance(part, ScriptModule):
            own = (
                *part.named_parameters(recurse=False, remove_duplicate=False),
                *part.named_buffers(recurse=False, remove_duplicate=False),
            )
            slots |= {f"{path}.{name}".lstrip("."): given[id(t)] for name, t in own if id(t) in given}
    known = {name for name, _ in every}
    return slots | {name: t for name, t in tensors.items() if name not in known}


class _Slot(NamedTuple):
    """Where the C++ module behind a part of a TorchScript module keeps a value, and the value it has."""

    owner: torch._C.ScriptModule
    name: str
    path: str
    value: Any


def _slots(path: str, part: ScriptModule) -> list[_Slot]:
    """All its attributes, not only tensors: some modules keep state between calls in plain attributes."""
    names = torch._C.ConcreteModuleType.from_jit_type(part._c._type()).get_attributes()  # type: ignore
    return [_Slot(part._c, name, f"{path}.{name}".lstrip("."), part._c.getattr(name)) for name in names]


@contextmanager
def _swapped(slots: list[_Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """`tensors` in their slots and wherever else the tensors from there appear; then all is as before."""
    swaps = {id(slot.value): tensors[slot.path] for slot in slots if slot.path in tensors}

    def new(value: Any) -> Any:  # the weights of a recurrent layer, for one, also appear in a list
        if isinstance(value, list | tuple):
            return type(value)(new(item) for item in value)
        if isinstance(value, dict):
            return {key: new(item) for key, item in value.items()}
        return swaps.get(id(value), value)

    try:
        for slot in slots:
            slot.owner.setattr(slot.name, new(slot.value))
        yield
    finally:
        for slot in slots:
            slot.owner.setattr(slot.name, slot.value)
