"""Losses of outputs and targets with closed forms for what curvature needs; one family a file.

A Loss knows its sum over terms, how many terms there are, and its first and second derivatives in the outputs.
Nothing outside this folder asks what kind of loss it has.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.losses.classification import BinaryCrossEntropy, CrossEntropy, KLDivergence
from curvature.objective.losses.counts import PoissonNLL
from curvature.objective.losses.criterion import Criterion
from curvature.objective.losses.elements import Uniform
from curvature.objective.losses.regression import GaussianNLL, SquaredError


@runtime_checkable
class Loss(Protocol):
    """A loss of outputs and targets that is a sum over terms; the objective is the mean over their weight."""

    @property
    def offers(self) -> frozenset[str]:
        """What there is beyond the Hessian: "ggn" where the loss is convex in the outputs, "sample" where it is a
        negative log-likelihood."""
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


@runtime_checkable
class Likelihood(Loss, Protocol):
    """A loss that is a negative log-likelihood: it offers "sample", and with it has Fisher matrices."""

    def event(self, outputs: Tensor, targets: Any) -> tuple[int, ...]:
        """The axes of the outputs within which entries belong to one term; over the others there is one each."""
        ...

    def residual(self, outputs: Tensor, targets: Any) -> Tensor:
        """The gradient of `total` with respect to the outputs."""
        ...

    def root(self, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        """Residuals whose outer products within each term sum to the expected Hessian: one for each entry of a term."""
        ...

    def sample(self, outputs: Tensor, targets: Any, uniform: Uniform) -> Tensor:
        """A residual at targets drawn from the model's own distribution, the real ones saying only what counts.

        Its mean is zero and its second moment the expected Hessian. `uniform(shape)` draws numbers between 0 and 1.
        """
        ...


@runtime_checkable
class Judged(Loss, Protocol):
    """A loss of outputs that are right or wrong."""

    def right(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """How many answers are right, and of how many."""
        ...


CLASSES: dict[str, Callable[..., Loss]] = {
    loss.__name__: loss
    for loss in (CrossEntropy, KLDivergence, BinaryCrossEntropy, SquaredError, GaussianNLL, PoissonNLL)
}
NAMES: dict[str, Callable[..., Loss]] = {
    "cross-entropy": CrossEntropy,
    "kl": KLDivergence,
    "bce": BinaryCrossEntropy,
    "mse": SquaredError,
    "gaussian-nll": GaussianNLL,
    "poisson-nll": PoissonNLL,
}
MODULES: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.CrossEntropyLoss: CrossEntropy.of,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy.of,
    nn.MSELoss: SquaredError.of,
    nn.PoissonNLLLoss: PoissonNLL.of,
}
FUNCTIONS: dict[Any, Callable[[], Loss]] = {
    F.cross_entropy: CrossEntropy,
    F.binary_cross_entropy_with_logits: BinaryCrossEntropy,
    F.mse_loss: SquaredError,
    F.poisson_nll_loss: PoissonNLL,
}
INSTEAD: dict[Any, str] = {  # of losses whose curvature in what they take is not that of the model's distribution
    nn.NLLLoss: "nn.CrossEntropyLoss, on logits instead of their log-softmax",
    nn.KLDivLoss: "curvature.KLDivergence ('kl'), on logits instead of their log-softmax",
    nn.BCELoss: "nn.BCEWithLogitsLoss, on logits instead of their sigmoid",
    nn.GaussianNLLLoss: "curvature.GaussianNLL, on outputs (..., 2) of mean and log-variance",
}
INSTEAD |= {
    F.nll_loss: INSTEAD[nn.NLLLoss],
    F.kl_div: INSTEAD[nn.KLDivLoss],
    F.binary_cross_entropy: INSTEAD[nn.BCELoss],
    F.gaussian_nll_loss: INSTEAD[nn.GaussianNLLLoss],
}


def as_loss(loss: Any) -> Loss:
    """A Loss from a Loss, a name such as "cross-entropy" or "mse", an `nn.*Loss` module, or a function of (outputs,
    targets); ValueError for another name, BadObjective for what is none of these, or is not a mean."""
    if isinstance(loss, str):
        if loss not in NAMES:
            near = difflib.get_close_matches(loss, NAMES, n=1)
            guess = f"Did you mean {near[0]}? " if near else ""
            raise ValueError(f"There is no loss called {loss!r}. {guess}The names are {', '.join(NAMES)}.")
        return NAMES[loss]()
    given: Any = loss
    kind = given if inspect.isroutine(given) else type(given)  # exactly: a subclass may compute something else
    if kind in MODULES:
        return MODULES[kind](loss)
    if kind in FUNCTIONS:
        return FUNCTIONS[kind]()
    if isinstance(loss, Loss) and not isinstance(loss, type):
        return loss
    if isinstance(loss, type) or not callable(loss):
        raise BadObjective(
            f"{_name(loss)} is no loss.",
            "Give a name, a loss such as nn.CrossEntropyLoss(), or a function of (outputs, targets).",
        )
    if kind in (nn.GaussianNLLLoss, F.gaussian_nll_loss):
        raise BadObjective(f"{_name(loss)} takes three arguments.", f"Use {INSTEAD[kind]}.")
    if getattr(loss, "reduction", "mean") != "mean" or getattr(loss, "weight", None) is not None:
        raise BadObjective(
            f"{loss} is not a mean over examples.",
            "Use reduction='mean' and no weight, or Objective.from_loss with terms=.",
        )
    return Criterion(given, INSTEAD[kind]) if kind in INSTEAD else Criterion(given)


def accuracy_of(loss: Loss) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    """The function of outputs and targets that counts right answers, and all; BadObjective for a loss without any."""
    if isinstance(loss, Judged):
        return loss.right
    raise BadObjective(
        f"{described(loss)} has no accuracy: no answer is right or wrong.",
        "Use 'cross-entropy' or 'bce', or ask for the loss alone.",
    )


def lacking(loss: Loss, what: str) -> BadObjective:
    """The error of asking for a matrix that a loss has not."""
    if isinstance(loss, Criterion):
        return BadObjective(
            f"{described(loss)} has no closed-form Hessian here, which {what} needs.",
            f"Use {loss.instead}; or ask for the Hessian.",
        )
    if "sample" in loss.offers:
        return BadObjective(
            f"{described(loss)} is not convex in the outputs: there is no {what}.",
            "Ask for the fisher, or the Hessian.",
        )
    return BadObjective(
        f"{described(loss)} says nothing about how targets are distributed, which {what} needs.",
        "Use one of the likelihoods, such as CrossEntropy or SquaredError, or ask for the ggn.",
    )


def written(loss: Loss) -> dict[str, Any]:
    """The class name and the fields of a loss, as plain values; BadObjective for one that is not from here."""
    if CLASSES.get(type(loss).__name__) is not type(loss):
        raise BadObjective(
            f"The loss {described(loss).partition('(')[0]} is your own, and cannot be written to a file.",
            "Keep the function that builds the objective, and use `--objective FILE.py:NAME`.",
        )
    return {"name": type(loss).__name__, "options": dataclasses.asdict(loss)}  # pyright: ignore[reportArgumentType]


def by_class_name(name: str, options: dict[str, Any]) -> Loss:
    """The loss that `written` wrote down; BadObjective for an unknown one."""
    if name not in CLASSES:
        raise BadObjective(f"There is no loss class {name!r} here.", f"Known are {', '.join(CLASSES)}.")
    return CLASSES[name](**options)


def described(loss: Loss) -> str:
    """The class of a loss and the fields that differ from their defaults; of a function its name."""
    if isinstance(loss, Criterion):
        return _name(loss.function)
    fields = dataclasses.fields(loss) if dataclasses.is_dataclass(loss) else ()
    own = [f"{f.name}={getattr(loss, f.name)!r}" for f in fields if getattr(loss, f.name) != f.default]
    return f"{type(loss).__name__}({', '.join(own)})"


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
