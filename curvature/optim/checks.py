"""What arguments optimizers take: errors say what was expected, what came, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from curvature.objective.objective import Objective


def listed(params: Any) -> Any:
    """Parameters, pairs or groups as a list, which torch looks at next."""
    if isinstance(params, nn.Module | Mapping) or not isinstance(params, Iterable):
        raise TypeError(
            f"Expected parameters, (name, parameter) pairs or groups of such, but got a {type(params).__name__}. "
            "Give model.named_parameters()."
        )
    if isinstance(params, Tensor):
        return params
    found = list(params)
    if not found:
        raise ValueError(
            "The optimizer got an empty parameter list: the model has none, or this iterator was gone through before. "
            "Give model.named_parameters() anew."
        )
    return found


def number(name: str, value: Any) -> float:
    """The value; TypeError for what is no number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is a number, but got {value!r}. Convert it first, as by float(...).")
    return float(value)


def check_numbers(part: Any) -> None:
    """TypeError where a field of a dataclass that is declared as a number is none, and ValueError where a whole number
    is not whole."""
    for field in fields(part):
        value, kinds = getattr(part, field.name), str(field.type).split(" | ")
        if not {"int", "float"} & set(kinds) or (value is None and "None" in kinds):
            continue
        if number(field.name, value) % 1 and "float" not in kinds:
            raise ValueError(f"{field.name} is a whole number, but got {value}. Round it.")


def decays(betas: Any) -> tuple[float, float]:
    """A pair of numbers."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(
            f"betas are two numbers, the decays of the averages of gradients and of second moments or curvature, but "
            f"got {betas!r}. Give betas=(0.9, 0.99) or the like."
        )
    for beta in betas:
        number("Each of betas", beta)
    return betas[0], betas[1]


def check_part(name: str, part: Any, kind: type, examples: str) -> None:
    """TypeError unless an argument is an instance of that protocol, with numbers where it declares them."""
    if isinstance(part, type) or not isinstance(part, kind):
        raise TypeError(f"{name} is a {kind.__name__}, such as {examples}, but got {part!r}.")
    if is_dataclass(part):
        check_numbers(part)


def check_mini_batch(objective: Any) -> None:
    """TypeError for what is no Objective."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"The objective is the mini-batch as a curvature.Objective, but got {objective!r}. "
            "Give Objective.of(model, loss, [batch])."
        )


def check_closure(closure: Any) -> None:
    """TypeError for what cannot be called."""
    if not callable(closure):
        what = "step(objective=...)" if isinstance(closure, Objective) else "step()"
        raise TypeError(f"The closure is a function that returns the loss, but got {closure!r}. Call {what}.")


def check_group(group: Mapping[str, Any], arguments: Iterable[str], hyperparameters: Iterable[str]) -> None:
    """TypeError or ValueError for what no step could be made with, and for what a group cannot have of its own among
    the `arguments` of the optimizer."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is one number, but got a tensor of {tuple(lr.shape)}. Give groups for several.")
    for name, value in (("lr", lr.item() if isinstance(lr, Tensor) else lr), ("weight_decay", group["weight_decay"])):
        number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is 0 or more, and finite, but got {value}.")
    own = sorted(set(hyperparameters))
    if alien := sorted(set(group) & set(arguments) - set(own) - {"params"}):
        raise ValueError(f"A group has no {', '.join(alien)} of its own. It may have {', '.join(own)}.")
    wrong = [p for p in group["params"] if not p.is_floating_point()]
    if wrong:
        raise ValueError(f"Expected real parameters, but got one of {wrong[0].dtype}. Leave it out.")
    shards = [p for p in group["params"] if type(p.data).__name__ == "DTensor"]
    if shards:
        raise ValueError(
            f"Expected whole parameters, but one of {tuple(shards[0].shape)} is a DTensor, as of fully_shard. "
            "Train with DistributedDataParallel, where every process has them all."
        )


def check_saved(groups: Iterable[Mapping[str, Any]], hyperparameters: Iterable[str], name: str) -> None:
    """ValueError for the groups of a state that this optimizer has not saved."""
    for group in groups:
        if missing := sorted(set(hyperparameters) - set(group) - {"differentiable"}):  # of torch, for all
            raise ValueError(
                f"Expected a state of {name}, but got one of another optimizer, without {', '.join(missing)}. "
                "Load what the same class has saved."
            )


def check_fits(name: str, saved: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """ValueError for the saved state of a parameter whose tensors have other names or shapes than their places."""
    advice = "Load it into the same optimizer of the same model, with the same arguments."
    if saved.keys() != places.keys():
        lists = (", ".join(sorted(names)) or "nothing" for names in (saved.keys(), places.keys()))
        raise ValueError("What was saved of {} is {}, but here it is {}. {}".format(name, *lists, advice))
    for key, place in places.items():
        if saved[key].shape != place.shape:
            shapes = tuple(saved[key].shape), tuple(place.shape)
            raise ValueError("The {} of {} was saved as {}, but here it is {}. {}".format(key, name, *shapes, advice))


def check_names(names: list[str]) -> None:
    """ValueError for parameters of one name, which could not be told from each other."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two parameters are called {twice}. Give each a name of its own, or none a name.")
