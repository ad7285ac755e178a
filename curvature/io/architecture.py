"""Architectures as data: nested nn.Sequential of stock torch.nn layers, written down and built again.

A description is JSON: {"class": "Linear", "args": {...}} for a layer, and for a stack of them
{"class": "Sequential", "children": [[name, description], ...]}; "training": false and "frozen": [names] are
added where they apply. `describe` answers only when what it wrote builds the same module, so that a
description can replace a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, UnsafeFile, printable
from curvature.io.layers import LAYERS, arguments_of, make_layer, same_layer, tensors_of
from curvature.io.recognise import FileKind, pickles, recognise
from curvature.io.safe import read_pickled
from curvature.io.state_dicts import load_into
from curvature.io.tensors import check_tensors
from curvature.io.weights import module_in

MAX_LAYERS = 10_000
MAX_DEPTH = 32

_KEYS = {"class", "args", "children", "training", "frozen"}
_TRUST = "Pass --trust if you trust its author, or save model.state_dict() and pass --arch FILE.py:NAME."


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The description from which `build` makes the same module; None when it is not of stock layers alone.

    Whatever could make it compute something else counts: subclasses, hooks, replaced methods, parametrised,
    shared or additional parameters. Attributes that no layer reads are left out, as are the tensors' values.
    """
    layers = list(islice(_walk(module), MAX_LAYERS + 1))
    if len(layers) > MAX_LAYERS or _shares_tensors(layers):
        return None
    description = _described(module)
    if description is None:
        return None
    try:
        rebuilt = _assembled(description, "meta")
    except BadFile:
        return None
    return description if all(map(same_layer, layers, _walk(rebuilt))) else None


def build(description: Mapping[str, Any]) -> nn.Module:
    """The module described, on the CPU, with freshly drawn weights; the global random state stays as it was.

    BadFile names the layer that is unknown or impossible, TooLarge the one that memory does not suffice for.
    """
    with torch.random.fork_rng(devices=[]):
        return _assembled(description, "cpu")


def restore(description: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The module described, holding the tensors of `state_dict` themselves, with their dtype and device.

    Takes no memory of its own, whatever sizes the description claims; BadFile when the tensors do not fit it.
    """
    module = _assembled(description, "meta")
    load_into(module, state_dict)
    return module


def stock_globals() -> list[type[nn.Module]]:
    """The classes with which a pickled stock module loads under `torch.serialization.safe_globals`."""
    return [nn.Sequential, *LAYERS.values()]


def load_stock(path: str | PathLike[str]) -> nn.Module:
    """The stock module pickled in the file, rebuilt from its description: nothing else in it survives.

    Values, dtypes, training flags and frozen parameters are kept. UnsafeFile when it uses other classes
    or does more than its layers; BadFile when it is damaged or holds no module.
    """
    kind = recognise(path)
    if kind not in (FileKind.MODULE, FileKind.LEGACY):
        raise BadFile(f"{path} is {kind.value}, not a pickled nn.Module.", "Name its class with --arch.")
    # torch.save never has a constructor called: a file that does could claim any amount of memory.
    stock = {f"{layer.__module__}.{layer.__qualname__}" for layer in stock_globals()}
    if any(stock & pickle.called for pickle in pickles(path)):
        raise UnsafeFile(f"{path} calls constructors of layers, as torch.save never does.", _TRUST)
    module = module_in(read_pickled(path, stock_globals(), fix=_TRUST), path)
    description = _described_safely(module)
    if description is None:
        raise UnsafeFile(f"{path} holds a module with altered, shared or added parts.", _TRUST)
    state_dict = module.state_dict()
    check_tensors(state_dict, path)
    return restore(description, state_dict)


def _described_safely(module: nn.Module) -> dict[str, Any] | None:
    """`describe` for a module whose attributes a stranger chose: None, whatever they make it raise."""
    try:
        return describe(module)
    except Exception:
        return None


def _walk(module: nn.Module, depth: int = 0) -> Iterator[nn.Module]:
    """The module and all below it, parents first; one that is used twice comes twice."""
    yield module
    if depth <= MAX_DEPTH:  # a pickled module can contain itself
        for child in module._modules.values():
            if child is not None:
                yield from _walk(child, depth + 1)


def _shares_tensors(layers: list[nn.Module]) -> bool:
    """Whether a parameter or buffer is used in two places, which a description cannot say."""
    used = [id(tensor) for layer in layers for tensor in tensors_of(layer)]
    return len(set(used)) < len(used)


def _described(module: nn.Module, depth: int = 0) -> dict[str, Any] | None:
    """The description of a module and all below it; None when a class or an argument is not stock."""
    name = type(module).__name__
    if type(module) is nn.Sequential and depth <= MAX_DEPTH:
        children = [[key, _described(child, depth + 1)] for key, child in module._modules.items()]
        parts: Any = {"children": children} if all(child for _, child in children) else None
    elif type(module) is LAYERS.get(name):
        arguments = arguments_of(module)
        parts = None if arguments is None else {"args": arguments}
    else:
        parts = None
    if parts is None:
        return None
    frozen = [key for key, p in module._parameters.items() if p is not None and not p.requires_grad]
    mode = {} if module.training else {"training": False}
    return {"class": name, **parts, **mode, **({"frozen": frozen} if frozen else {})}


def _assembled(description: Any, device: str) -> nn.Module:
    """The described module, its tensors on `device`; BadFile when a part is wrong or there are too many."""
    return _part(description, device, (), iter(range(MAX_LAYERS)))


def _part(description: Any, device: str, path: tuple[str, ...], budget: Iterator[int]) -> nn.Module:
    """The module at `path` with all below it; each takes one from `budget`."""
    if next(budget, None) is None or len(path) > MAX_DEPTH + 1:
        raise _wrong(path, f"is one too many: at most {MAX_LAYERS} layers, nested {MAX_DEPTH} deep.")
    if not _is_well_formed(description):
        raise _wrong(path, "is not the description of a module.")
    if description["class"] == "Sequential":
        module: nn.Module = nn.Sequential()
        for name, child in description["children"]:
            part = _part(child, device, (*path, name), budget)
            try:
                module.add_module(name, part)
            except KeyError as error:  # "", "a.b", or the name of a method
                raise _wrong((*path, name), "has a name that torch does not allow.") from error
    else:
        try:
            module = make_layer(description["class"], description["args"], device=device)
        except BadFile as error:
            raise _wrong(path, f"cannot be made: {error.cause}") from error
    module.training = description.get("training", True)
    for name in description.get("frozen", []):
        if module._parameters.get(name) is None:
            raise _wrong(path, f"has no parameter {printable(name)!r} to freeze.")
        module.get_parameter(name).requires_grad_(False)
    return module


def _is_well_formed(description: Any) -> bool:
    """Whether the description of one module has the keys it must have, with values of the right types."""
    if not isinstance(description, Mapping) or not _KEYS.issuperset(description):
        return False
    name, children, arguments = (description.get(key) for key in ("class", "children", "args"))
    if name == "Sequential":
        parts = arguments is None and isinstance(children, list) and all(map(_is_named, children))
    else:
        parts = isinstance(name, str) and children is None and isinstance(arguments, Mapping)
    frozen = description.get("frozen", [])
    flags = isinstance(description.get("training", True), bool) and isinstance(frozen, list)
    return parts and flags and all(isinstance(key, str) for key in frozen)


def _is_named(child: Any) -> bool:
    """Whether this is a name and something."""
    return isinstance(child, list) and len(child) == 2 and isinstance(child[0], str)


def _wrong(path: tuple[str, ...], what: str) -> BadFile:
    """The refusal of a description, naming the part of it."""
    where = f"Layer {printable('.'.join(path))!r}" if path else "The module"
    return BadFile(f"{where} of the description {what}", "Save it again with this version of curvature.")
