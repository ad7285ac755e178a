"""Losses of outputs and targets with closed forms for what curvature needs; one family a file.

A Loss knows its sum over terms, how many terms there are, and its Hessian product with respect to the outputs.
Nothing outside this folder asks what kind of loss it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.losses.classification import CrossEntropy
from curvature.objective.losses.regression import SquaredError


@runtime_checkable
class Loss(Protocol):
    """A loss of outputs and targets that is a sum over terms; the objective is the mean over their weight."""

    @property
    def offers(self) -> frozenset[str]:
        """What the loss can do beyond its value: "ggn" needs a convex loss and its `hessian_product`."""
        ...

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective when the loss cannot take these."""
        ...

    def total(self, outputs: Tensor, targets: Any) -> Float[Tensor, ""]:
        """The sum of the loss over weighted terms."""
        ...

    def weight(self, targets: Any) -> Float[Tensor, ""]:
        """What the mean divides by: examples, tokens that are not ignored, the sum of their class weights."""
        ...

    def hessian_product(self, outputs: Tensor, targets: Any, tangent: Tensor) -> Tensor:
        """The Hessian of `total` with respect to the outputs, times `tangent`; all shaped like the outputs."""
        ...


NAMES: dict[str, Callable[..., Loss]] = {
    "cross-entropy": CrossEntropy,
    "mse": SquaredError,
}
CLASSES = {"CrossEntropy": CrossEntropy, "SquaredError": SquaredError}


def as_loss(loss: Any) -> Loss:
    """A Loss from a Loss, a name ("cross-entropy", "mse") or an `nn.*Loss` module; BadObjective when there is none."""
    if isinstance(loss, str):
        if loss not in NAMES:
            raise BadObjective(f"There is no loss called {loss!r}.", f"The names are {', '.join(NAMES)}.")
        return NAMES[loss]()
    if type(loss) is nn.CrossEntropyLoss:  # a subclass may compute something else
        return CrossEntropy.of(loss)
    if type(loss) is nn.MSELoss:
        return SquaredError.of(loss)
    if isinstance(loss, type | nn.Module) or not isinstance(loss, Loss):
        raise BadObjective(
            f"{_name(loss)} has no closed-form Hessian here.",
            "Use Objective.from_loss(model, lambda model, batch: ..., data), which takes any scalar loss.",
        )
    return loss


def written(loss: Loss) -> dict[str, Any]:
    """The class name and the fields of a loss, as plain values; BadObjective for one that is not from here."""
    if CLASSES.get(type(loss).__name__) is not type(loss):
        raise BadObjective(
            f"The loss {type(loss).__name__} is your own, and cannot be written to a file.",
            "Keep the function that builds the objective, and use `--objective FILE.py:NAME`.",
        )
    return {"name": type(loss).__name__, "options": dataclasses.asdict(loss)}  # pyright: ignore[reportArgumentType]


def by_class_name(name: str, options: dict[str, Any]) -> Loss:
    """The loss that `written` wrote down; BadObjective for an unknown one."""
    if name not in CLASSES:
        raise BadObjective(f"There is no loss class {name!r} here.", f"Known are {', '.join(CLASSES)}.")
    return CLASSES[name](**options)


def described(loss: Loss) -> str:
    """The class of a loss and the fields that differ from their defaults."""
    fields = dataclasses.fields(loss) if dataclasses.is_dataclass(loss) else ()
    own = [f"{f.name}={getattr(loss, f.name)!r}" for f in fields if getattr(loss, f.name) != f.default]
    return f"{type(loss).__name__}({', '.join(own)})"


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
