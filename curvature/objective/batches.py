"""Data that can be read again and again: the same batches in the same order every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from curvature.errors import BadObjective, CurvatureError, one_line
from curvature.objective.guard import frozen_randomness

BATCH = 256  # examples at a time when whole tensors are given: bounds memory
Cut = int | Literal["auto"] | None  # examples at a time of whole tensors; "auto" is BATCH, None does not cut
TARGETS = ("labels", "label", "targets", "target", "y")  # the names under which dict batches keep targets
OWN = "take a loss of (model, batch), by Objective.from_loss or --loss ./file.py:name"


@dataclass(frozen=True)
class Batches:
    """A re-iterable source of batches; `fixed` when it lies in memory and cannot change between passes, `cut` when it
    was cut from whole tensors here.

    Every pass runs from the same random state, so that a shuffling loader repeats its order and random augmentation its
    draws; the global generators are as before afterwards. What still differs (a loader with a generator of its own) is
    refused by Objective.check.
    """

    source: Iterable[Any] = field(repr=False)
    fixed: bool = False
    seed: int = 0
    cut: bool = False

    @classmethod
    def of(cls, data: Any, *, batch_size: Cut = None) -> Batches:
        """Batches of a DataLoader (or anything that can be iterated again), a list of batches, or tensors.

        A tuple or dict of tensors or arrays is one data set: with `batch_size` it is cut along the first axis, else it
        is one batch. Raises BadObjective for what can be read only once.
        """
        if isinstance(batch_size, int) and batch_size < 1:
            raise ValueError(f"A batch has at least one example, but got batch_size={batch_size}.")
        if whole(data):
            batches = _cut(data, BATCH if batch_size == "auto" else batch_size)
            return cls(batches, fixed=True, cut=len(batches) > 1)
        if isinstance(batch_size, int):
            raise ValueError(f"batch_size={batch_size} is for whole tensors, but a {type(data).__name__} has batches.")
        if isinstance(data, Batches):
            return data
        if isinstance(data, Mapping):
            raise BadObjective(
                f"A {type(data).__name__} of {', '.join(map(str, data))} is no data set: not all of it are tensors.",
                "Give a list of batches, [batch] for one, or a dict of tensors.",
            )
        if isinstance(data, Sequence) and not isinstance(data, str):
            return cls(data, fixed=isinstance(data, list | tuple))
        if not isinstance(data, Iterable) or isinstance(data, str):
            raise BadObjective(
                f"Data of type {type(data).__name__} cannot be iterated.",
                "Give a DataLoader, a list of batches, or a tuple (inputs, targets) of tensors.",
            )
        if isinstance(data, Iterator):  # iter(loader) would draw from the global generator
            raise BadObjective(
                f"The data ({type(data).__name__}) can be read only once.",
                "Products read them many times: give list(data), or a DataLoader.",
            )
        return cls(data)

    def __iter__(self) -> Iterator[Any]:
        if self.fixed:
            yield from self.source
            return
        iterator = None
        for index in count():
            try:
                with frozen_randomness(self.seed + index):
                    iterator = iter(self.source) if iterator is None else iterator
                    batch = next(iterator, END)
            except CurvatureError:
                raise
            except Exception as error:  # data sets can raise anything
                raise BadObjective(
                    f"Reading batch {index + 1} of the data failed: {one_line(error)}.",
                    "Run `for batch in data: pass` to see where.",
                ) from error
            if batch is END:
                return
            yield batch

    def first(self, examples: int) -> Batches:
        """The same batches up to so many examples, the last one cut."""
        return replace(self, source=_First(self, examples))

    def extent(self) -> tuple[int, int]:
        """How many batches there are, and how many examples in them."""
        sizes = [leading(batch) or 1 for batch in self]
        return len(sizes), sum(sizes)

    def at_most(self, examples: int) -> Batches:
        """The same examples, at most so many in a batch."""
        return replace(self, source=_AtMost(self, examples), cut=False)

    def separate(self) -> Iterator[Batches]:
        """Every batch by itself."""
        for index, batch in enumerate(self):
            yield Batches([batch], fixed=True, seed=self.seed + index)

    def of_several(self) -> Any:
        """The first batch of more than one example, which shows how a model keeps examples apart; else the last."""
        batch = None
        for batch in self:
            if leading(batch) != 1:
                break
        return batch

    @cached_property
    def digests(self) -> list[str]:
        """A hash of every batch: equal lists mean equal data in equal order."""
        return self.digested()

    def digested(self) -> list[str]:
        """The same, from the data as they are now."""
        return [digest(batch) for batch in self]


@dataclass(frozen=True)
class _First:
    batches: Batches
    examples: int

    def __iter__(self) -> Iterator[Any]:
        left = self.examples
        for batch in self.batches:
            length = leading(batch)
            if left <= 0 or length is None:
                return
            yield shortened(batch, left)
            left -= length


@dataclass(frozen=True)
class _AtMost:
    batches: Batches
    examples: int

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            length = leading(batch)
            for start in range(0, length or 1, self.examples):
                yield part(batch, start, start + self.examples)


def shortened(batch: Any, kept: int) -> Any:
    """The first `kept` examples of a batch; what has no axis of its length belongs to no example."""
    return part(batch, 0, kept)


def part(batch: Any, start: int, stop: int) -> Any:
    """Some examples of a batch; what has no axis of its length belongs to no example."""
    length = leading(batch)
    if length is None or (start == 0 and length <= stop):
        return batch

    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if _has_axis(leaf) and len(leaf) == length and not _is_sparse(leaf) else leaf

    return mapped(cut, batch)


def examples(batch: Any, length: int) -> Iterator[Any]:
    """The examples of a batch, so many, each as a batch of one; what has no axis of their number belongs to all."""

    def cut(leaf: Any, index: int) -> Any:
        own = _has_axis(leaf) and len(leaf) == length and not _is_sparse(leaf)
        return leaf[index : index + 1] if own else leaf

    for index in range(length):
        yield mapped(partial(cut, index=index), batch)


END = object()


def digest(batch: Any) -> str:
    """A hash of all numbers and texts in a batch, and of how they are nested."""
    state = hashlib.sha256()
    _absorb(batch, state.update)
    return state.hexdigest()


def moved(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The batch with every tensor on `device`, and floating-point ones in `dtype`; NumPy arrays become tensors."""

    def move(leaf: Any) -> Any:
        tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiub" else leaf
        if not isinstance(tensor, Tensor):
            return leaf
        with torch.inference_mode(False):
            tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
            return tensor.clone() if tensor.is_inference() else tensor  # autograd refuses tensors of inference mode

    return mapped(move, batch)


def mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with `function` applied to every leaf of its lists, tuples, dicts and dataclasses."""
    if isinstance(batch, Mapping):
        items = {key: mapped(function, item) for key, item in batch.items()}
        return items if type(batch) is dict else _rebuilt(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(function, item) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(mapped(function, item) for item in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return type(batch)(**{f.name: mapped(function, getattr(batch, f.name)) for f in fields(batch)})
    return function(batch)


def leaves(batch: Any) -> Iterator[Any]:
    """What lists, tuples, dicts and dataclasses in the batch hold, in order."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    elif is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, f.name) for f in fields(batch)]
    if isinstance(batch, list | tuple):
        for item in batch:
            yield from leaves(item)
    else:
        yield batch


def arrays(batch: Any) -> Iterator[Any]:
    """The tensors and arrays among them."""
    return filter(_is_array, leaves(batch))


def leading(batch: Any) -> int | None:
    """The length of the first axis of the first tensor or array in the batch, if there is one."""
    return next((len(leaf) for leaf in arrays(batch) if leaf.ndim), None)


def bytes_of(batch: Any) -> int:
    """What the tensors and arrays in the batch hold."""
    return sum(stored_values(leaf).nbytes if isinstance(leaf, Tensor) else leaf.nbytes for leaf in arrays(batch))


def lengths(batch: Any) -> set[int]:
    """The lengths of the first axes of all tensors and arrays in the batch."""
    return {len(leaf) for leaf in arrays(batch) if leaf.ndim}


def targets_of(batch: Any) -> Any:
    """The targets of a batch where they can be told, else None."""
    try:
        return split(batch)[1]
    except BadObjective:
        return None


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray)


def _has_axis(leaf: Any) -> bool:
    return _is_array(leaf) and leaf.ndim > 0


def split(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch: the last of a tuple, or what a dict keeps under a usual name, are the targets."""
    if isinstance(batch, Mapping):
        name = next((name for name in TARGETS if name in batch), None)
        if name is None:
            raise BadObjective(
                f"A dict batch has no targets: its keys are {', '.join(map(str, batch))}.",
                f"Name them {' or '.join(TARGETS[:2])}, in a file also x and y, or {OWN}.",
            )
        return {key: item for key, item in batch.items() if key != name}, batch[name]
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return inputs, batch[-1]
    raise BadObjective(
        f"A batch is (inputs, targets), but a {type(batch).__name__} came.",
        f"Give a list of pairs, or one data set as a tuple (inputs, targets), not a list; or {OWN}.",
    )


def whole(data: Any) -> bool:
    """Whether this is one data set, a tensor or a tuple or dict of tensors or arrays, rather than batches."""
    leaves = data if isinstance(data, tuple) else data.values() if isinstance(data, Mapping) else ()
    return _is_array(data) or (bool(leaves) and all(map(_is_array, leaves)))


def _cut(data: Any, batch_size: int | None) -> list[Any]:
    """The data set as a list of batches; one batch without `batch_size` or when the first axes differ."""
    found = {len(leaf) if leaf.ndim and not _is_sparse(leaf) else -1 for leaf in leaves(data)}
    if found == {0}:
        return []
    if batch_size is None or len(found) != 1 or found == {-1}:
        return [data]
    (length,) = found

    def piece(start: int, stop: int) -> Any:
        return mapped(lambda leaf: leaf[start:stop], data)

    return [piece(start, start + batch_size) for start in range(0, length, batch_size)]


def halves(batch: Any) -> list[Any]:
    """The batch, which was cut from whole tensors, in two."""
    return _cut(batch, -(-(leading(batch) or 1) // 2))


def _is_sparse(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout != torch.strided


def stored_values(tensor: Tensor) -> Tensor:
    """The numbers that a tensor holds: of a sparse one those that are not left out."""
    return _strided_parts(tensor)[-1]


def _rebuilt(original: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """`items` as the kind of mapping they came in (Hugging Face's BatchEncoding is no dict), if it can be made so."""
    try:
        return type(original)(items)  # pyright: ignore[reportCallIssue]
    except TypeError:
        return items


def _strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor itself, or what a sparse one consists of."""
    match tensor.layout:
        case torch.strided:
            return (tensor,)
        case torch.sparse_coo:
            return tensor.coalesce().indices(), tensor.coalesce().values()
        case torch.sparse_csr:
            return tensor.crow_indices(), tensor.col_indices(), tensor.values()
        case _:
            return (tensor.to_dense(),)


def _absorb(leaf: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(leaf, Tensor):
        update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        for part in _strided_parts(leaf.detach().cpu()):
            update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(leaf, np.ndarray):
        update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    elif isinstance(leaf, Mapping):
        for key, item in leaf.items():
            update(f"{key}:".encode())
            _absorb(item, update)
    elif isinstance(leaf, list | tuple):
        update(f"[{len(leaf)}".encode())
        for item in leaf:
            _absorb(item, update)
    elif is_dataclass(leaf) and not isinstance(leaf, type):
        _absorb({f.name: getattr(leaf, f.name) for f in fields(leaf)}, update)
    elif isinstance(leaf, str | bytes | int | float | bool | None):
        update(repr(leaf).encode())
