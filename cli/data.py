"""What is looked at: the data that --data names, and for a Hugging Face folder a text as its model takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .code import called, is_spec
from .options import Misuse, Task
from .output import warn

if TYPE_CHECKING:
    import torch

OF_NUMBERS = ("bce", "mse", "poisson-nll")  # losses whose targets are shaped like outputs (n, 1)
TEXTS = 8  # rows of tokens computed at a time: each has as many logits for every token as there are words


def data_of(name: str | None, task: Task) -> Any:
    """What --data or --held-out name: arrays from a file, a demo's batches, or what code returns."""
    import curvature as cv
    from curvature.io.data import read_data

    if name is None:
        return None
    if name.startswith("demo:"):
        return cv.demo(name.removeprefix("demo:")).batches
    if is_spec(name):
        made = called(name)
        if made is None:
            raise cv.BadObjective(f"{name} returned nothing.", "Return a DataLoader, batches, or tensors.")
        return made
    return read_data(name, target=task.target, numbers=task.loss in OF_NUMBERS)


def parts_of_folder(path: Path, task: Task) -> tuple[torch.nn.Module, Any, Task]:
    """(model, data, task) of a Hugging Face folder: without --loss its loss is that of what the model predicts."""
    from curvature.io.models import read_module
    from curvature.io.tasks import task_of
    from curvature.objective.batches import Batches

    if task.data is None:
        raise Misuse(f"{path} says nothing about data.", "Pass --data: a text, or arrays such as input_ids and labels.")
    module, notes = read_module(path, base=task.base, allow=task.allow_global)
    say_all(notes)
    known, data = task_of(module), data_of_folder(task.data, path, module, task)
    if task.loss is None:
        if known is None:
            raise Misuse(
                f"{path} does not tell what its {type(module).__name__} is trained for.",
                "Pass --loss and --data with arrays as the model takes them, or --objective ./file.py:NAME that "
                "returns a curvature.Objective.",
            )
        warn(f"{path} predicts {known.predicts}, so the loss is {known.loss}")
        task = replace(task, loss=known.loss)
    return module, data, replace(task, batch_size=None) if isinstance(data, Batches) else task


def data_of_folder(name: str, path: Path, module: torch.nn.Module, task: Task) -> Any:
    """What --data or --held-out name, as the model of a Hugging Face folder takes it: a text in batches of tokens, or
    arrays, for which without --loss the labels are where the loss of its task looks for them."""
    from curvature.io.hugging_face import base_of, read_tokenizer
    from curvature.io.recognise import is_text
    from curvature.io.tasks import as_trained
    from curvature.io.texts import read_text
    from curvature.objective.batches import Batches

    if name.startswith("demo:") or is_spec(name) or not is_text(name):
        data = data_of(name, task)
        return as_trained(data, module) if task.loss is None else data
    folders = [folder for folder in (path, task.base or base_of(path)) if folder is not None]
    data = read_text(Path(name), module, read_tokenizer(*folders), block=task.block_size, target=task.target)
    rows, length = data["input_ids"].shape
    warn(f"cut {name} into {rows} rows of {length} tokens")
    return Batches.of(data, batch_size=task.batch_size or TEXTS)


def whole_batches(data: Any, size: int, limit: int | None, name: str) -> Any:
    """The first `limit` examples of the data set in batches of `size`, the only one that the program takes, without
    what is left over."""
    import curvature as cv
    from curvature.objective.batches import Batches, leading, shortened, whole

    length = leading(data) if whole(data) else None
    if length is None:
        return data
    length = length if limit is None else min(length, limit)
    if length < size:
        raise cv.BadObjective(
            f"{name} was exported for batches of {size}, but the data are {length} examples.",
            "Give more, or export it with dynamic_shapes.",
        )
    if length % size:
        warn(f"{name} was exported for batches of {size}: left out the last {length % size} of {length} examples")
    return list(Batches.of(shortened(data, length - length % size), batch_size=size))


def say_all(notes: list[str]) -> None:
    """Each on a line of stderr."""
    for note in notes:
        warn(note)
