"""Which of the things in a checkpoint are the weights of a model, and under which names the model knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvature.errors import BadFile, listing
from curvature.io.safe import SAVE_WEIGHTS

_DEEPEST = 4  # wrappings that are looked through: a pickled dict can contain itself
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "ema", "model_ema")
_ONE = "Save the state_dict of the one that you mean."
_INSERTED = {  # by wrappers of modules, anywhere in a name
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "checkpoint_wrapper",
}


def state_dict_of(loaded: Any, name: object = "The file") -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict inside what a file holds, and a note for each thing that was taken off or left out.

    Looks through the usual wrappings of checkpoints, or the only one that holds tensors by name, then strips what
    torch.compile and distributed training add to names. BadFile when no tensors are where a state_dict should be.
    """
    notes = []
    while len(notes) < _DEEPEST and (wrapping := _wrapping(loaded)):
        left = [key for key in loaded if key != wrapping]
        notes.append(f"took {wrapping!r}" + (f", left out {listing(left)}" if left else ""))
        loaded = loaded[wrapping]
    entries = loaded if isinstance(loaded, Mapping) else {}
    tensors = _named_tensors(entries)
    if not tensors:
        if places := [key for key, held in entries.items() if _named_tensors(held)]:
            raise BadFile(f"{name} holds tensors in {len(places)} places: {listing(places)}.", _ONE)
        kind = f"{'an empty' if isinstance(loaded, Mapping) else 'a'} {type(loaded).__name__}"
        held = listing(list(entries)) or kind
        raise BadFile(
            f"{name} holds no tensors by name, only {held}.", f"To save the weights of a model {SAVE_WEIGHTS}"
        )
    if len(tensors) < len(entries):
        left = [name for name in entries if name not in tensors]
        notes.append(f"left out what is not a tensor: {listing(left)}")
    return _without_prefixes(tensors, notes), notes


def fitted(
    module: nn.Module, state_dict: Mapping[str, Tensor], name: object = "the file"
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The part of `state_dict` that is the module's, under the module's names, and a note when it is not all as it is.

    A model that was saved as an attribute of another one (a LightningModule, AveragedModel, a teacher and its student)
    has the name of that attribute before all of its own; the other way round one may be missing. What fits in neither
    way comes back as it is. BadFile when it fits in several places.
    """
    own = module.state_dict(keep_vars=True)
    if not own or own.keys() & state_dict.keys():
        return state_dict, []
    first = next(iter(own.values()))
    keys = [key for key, entry in own.items() if entry is first]  # of tied tensors a file may have any name
    prefixes = {name.removesuffix(key) for key in keys for name in state_dict if name.endswith(f".{key}")}
    fits = sorted(prefix for prefix in prefixes if _with_tied(own, _below(prefix, state_dict)).keys() == own.keys())
    if len(fits) > 1:
        raise BadFile(
            f"The tensors of {name} fit {type(module).__name__} in {len(fits)} places: {listing(fits)}.",
            _ONE,
        )
    if fits:
        left = [name for name in state_dict if not name.startswith(fits[0])]
        note = f"took what is under {fits[0]!r}" + (f", left out {listing(left, 3)}" if left else "")
        return _below(fits[0], state_dict), [note]
    inside = f"{next(iter(own)).partition('.')[0]}."
    deeper = {f"{inside}{name}": tensor for name, tensor in state_dict.items()}
    return (deeper, [f"put it under {inside!r}"]) if _with_tied(own, deeper).keys() == own.keys() else (state_dict, [])


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor], name: object = "the file") -> None:
    """Copy `state_dict` into `module`; a module on the meta device takes the tensors themselves.

    Of names that are tied in the module one is enough. BadFile, before any tensor changed, when names,
    shapes or kinds of number (complex, real, integer) differ; the precision may.
    """
    own = module.state_dict(keep_vars=True)
    state_dict = _with_tied(own, state_dict)
    differences = {name: _difference(own[name], state_dict[name]) for name in own if name in state_dict}
    problems = {
        "missing": [name for name in own if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in own],
        "different": [f"{name} ({words})" for name, words in differences.items() if words],
    }
    if any(problems.values()):
        told = [f"{len(names)} {kind}: {listing(names, 3)}" for kind, names in problems.items() if names]
        raise BadFile(
            f"The tensors of {name} do not fit {type(module).__name__}: {'; '.join(told)}.",
            "Check that --arch builds the model with the options it was trained with.",
        )
    on_meta = any(isinstance(entry, Tensor) and entry.is_meta for entry in own.values())
    module.load_state_dict(state_dict, assign=on_meta)


def _wrapping(loaded: Any) -> str | None:
    """The key under which a checkpoint keeps its state_dict; None when this is not a wrapping."""
    if not isinstance(loaded, Mapping):
        return None
    usual = [key for key in _WRAPPINGS if isinstance(loaded.get(key), Mapping)]
    holding = [key for key, held in loaded.items() if isinstance(key, str) and _named_tensors(held)]
    only = holding if len(holding) == 1 and not _named_tensors(loaded) else []
    chosen = [key for key in usual if key in holding] or usual or only
    return chosen[0] if chosen else None


def _named_tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors that a mapping has under names; none when it is no mapping."""
    entries = loaded.items() if isinstance(loaded, Mapping) else ()
    return {name: entry for name, entry in entries if isinstance(name, str) and isinstance(entry, Tensor)}


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _without_prefixes(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The same tensors under the names of the unwrapped model; appends what was stripped to `notes`."""
    for inserted, wrapper in _INSERTED.items():
        plain = {name.replace(inserted, ""): tensor for name, tensor in tensors.items()}
        if plain.keys() != tensors.keys() and len(plain) == len(tensors):
            notes.append(f"stripped {inserted!r} ({wrapper}) from names")
            tensors = plain
    while all(name.startswith("module.") for name in tensors):
        notes.append("stripped 'module.' (DistributedDataParallel) from names")
        tensors = _below("module.", tensors)
    return tensors


def _with_tied(own: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the names added that the module has for tensors it holds under another name, too."""
    present = {id(entry): name for name, entry in own.items() if name in state_dict}
    tied = {name: state_dict[present[id(entry)]] for name, entry in own.items() if id(entry) in present}
    return {**tied, **state_dict}


def _difference(own: Any, new: Tensor) -> str:
    """Why `new` cannot take the place of `own`; empty when it can."""
    if not isinstance(own, Tensor) or nn.parameter.is_lazy(own):  # extra state; a shape that is yet to come
        return ""
    if own.shape != new.shape:
        return f"file {list(new.shape)}, model {list(own.shape)}"
    same_kind = (own.is_complex(), own.is_floating_point()) == (new.is_complex(), new.is_floating_point())
    return "" if same_kind else f"file {new.dtype}, model {own.dtype}"
