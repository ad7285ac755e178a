"""Optimal brain surgery: which weights a quadratic model of the loss can do without, and how the others make up for it.

At trained weights w the gradient is taken to be 0, so that a step d changes the loss by d.F d / 2. What is asked for is
H, the inverse of F: a window of gradients gives that of the whole matrix (M-FAC) or, of its blocks, WoodFisher's; a
diagonal is optimal brain damage, and the identity pruning by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.linalg.inverse import inverse as inverse_of
from curvature.linalg.known import known_diagonal, principal
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.result import Estimate, Quantity, Result

PruneMethod = Literal["joint", "separate"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Pruning(Result):
    """Weights (n,) after pruning, flat as the objective has them: zero where `mask` (n,) is false.

    `saliency` (n,) is what the removal of each weight alone would have added to the loss, and `increase` what the whole
    step adds, both by the quadratic model: far too little where F is the empirical Fisher matrix of a model that fits
    its data, as its gradients are small.
    """

    params: Float[Tensor, " n"]
    mask: Bool[Tensor, " n"]
    saliency: Float[Tensor, " n"]
    increase: float

    @property
    def sparsity(self) -> float:
        """The share of the weights that are zero."""
        return 1 - float(self.mask.double().mean())

    def summary(self) -> dict[str, str]:
        return {
            "kept": f"{int(self.mask.sum()):,} of {len(self.mask):,} weights ({1 - self.sparsity:.1%})",
            "predicted increase": f"{self.increase:.3g}",
        }

    def quantities(self) -> dict[str, Quantity]:
        return {"sparsity": Quantity(self.sparsity), "increase": Quantity(self.increase)}

    __repr__ = Result.__str__


def saliency(objective: Objective, inverse: LinearOperator) -> Estimate:
    """What the removal of each weight alone adds to the loss, (n,): w_a^2 / (2 H_aa), the others making up for it.

    For `inverse`, H, as in `prune`. A weight that is zero stays so, and has none.

    LeCun, Denker & Solla 1989, with a diagonal; Hassibi & Stork 1992.

    >>> import curvature as cv
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> net.load_state_dict({"weight": torch.tensor([[3.0, -1.0]])})
    <All keys matched successfully>
    >>> objective = cv.Objective.of(net, "mse", (torch.eye(2), torch.zeros(2, 1)))
    >>> cv.saliency(objective, cv.identity(objective.space)).value
    tensor([4.5000, 0.5000], dtype=torch.float64)
    """
    measurement = _measured("saliency", objective, inverse)
    model = _Quadratic.at(objective, inverse)
    return measurement.exact(model.everywhere(model.saliency))


def prune(objective: Objective, inverse: LinearOperator, *, sparsity: float, method: PruneMethod = "joint") -> Pruning:
    """The weights without a share `sparsity` of all, those of least saliency, and the others moved to make up for them.

    `inverse`, H, is that of the damped curvature F at these weights: positive definite and of known structure. Weights
    that are zero already count as pruned, and stay zero. Ties are broken by index. Which weights may be pruned is for
    the objective to say: `objective.narrowed(lambda name, p: p.ndim > 1)` is one of all but biases and norms.

    - "joint" takes the others to the minimum of the quadratic: a step -H_:P (H_PP)^-1 w_P, with P the removed ones.
    - "separate" is the papers' -H_:P diag(H_PP)^-1 w_P, what every removal would ask for if it were the only one, added
      up. Where many weights go at once that may be worse than to move nothing.

    A quadratic model is right nearby, so that many weights are better removed in rounds, each with the curvature where
    the last one has led, and with the share that is kept falling by the same factor:

        for k in range(1, 9):
            window = cv.gradient_window(objective, 512, seed=k)
            pruned = cv.prune(objective, cv.inverse(window.fisher, damping=1e-5), sparsity=1 - 0.1 ** (k / 8))
            objective = objective.at(pruned.params)

    Hassibi & Stork 1992; Singh & Alistarh 2020 (arXiv:2004.14340), WoodFisher; Frantar, Kurtic & Alistarh 2021
    (arXiv:2107.03356), M-FAC.

    >>> import curvature as cv
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> net.load_state_dict({"weight": torch.tensor([[3.0, -1.0]])})
    <All keys matched successfully>
    >>> objective = cv.Objective.of(net, "mse", (torch.eye(2), torch.zeros(2, 1)))
    >>> cv.prune(objective, cv.identity(objective.space), sparsity=0.5).params
    tensor([3., 0.])
    """
    measurement = _measured("prune", objective, inverse, sparsity=sparsity, method=method)
    if method not in MULTIPLIERS:
        raise ValueError(f"method is {' or '.join(map(repr, MULTIPLIERS))}, but got {method!r}.")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"The sparsity is a share, between 0 and 1, but got {sparsity}.")
    model = _Quadratic.at(objective, inverse)
    alive = len(model.weights)
    count = alive - round((1 - sparsity) * objective.space.size)
    if count < 0:
        raise ValueError(
            f"A sparsity of {sparsity} was asked for, but {1 - alive / objective.space.size:.4g} of all weights are "
            "zero already. Ask for that or more."
        )
    removed = torch.zeros_like(model.weights, dtype=torch.bool)
    removed[model.saliency.argsort(stable=True)[:count]] = True
    multipliers = model.weights.new_zeros(alive)
    if count:
        multipliers[removed] = MULTIPLIERS[method](model, removed).double()
    measurement.products += 1
    pruned = (model.weights - (model.inverse @ multipliers).double()).masked_fill(removed, 0.0)
    return Pruning(
        params=model.everywhere(pruned).to(objective.space.dtype),
        mask=model.everywhere(~removed),
        saliency=model.everywhere(model.saliency),
        increase=model.increase(pruned - model.weights),
        cost=measurement.cost,
        origin=measurement.origin,
    )


@dataclass(frozen=True)
class _Quadratic:
    """d.F d / 2, for steps d of the weights that are not zero: `weights` (k,) in float64, F and its `inverse` (k, k).

    `places` (n,) tells which of all they are.
    """

    weights: Float[Tensor, " k"]
    curvature: LinearOperator
    inverse: LinearOperator
    places: Bool[Tensor, " n"]

    @classmethod
    def at(cls, objective: Objective, inverse: LinearOperator) -> _Quadratic:
        weights = objective.position.double()
        places, curvature = weights != 0, inverse_of(inverse)
        if not places.any():
            raise ValueError("All weights are zero: there is none left to prune. Start from trained ones.")
        if not places.all():  # the inverse of a part of F is not that part of its inverse
            curvature = principal(curvature, places)
            inverse = inverse_of(curvature)
        return cls(weights[places], curvature, inverse, places)

    @cached_property
    def diagonal(self) -> Float[Tensor, " k"]:
        """That of the inverse."""
        diagonal = known_diagonal(self.inverse)
        if diagonal is None:
            raise TypeError(
                f"The structure of {self.inverse!r} does not tell its diagonal. Take that of a window of "
                "gradients, of a Diagonal, or of Dense(A.dense())."
            )
        if not (diagonal > 0).all():
            raise ValueError(
                f"An inverse is positive definite, but one entry of its diagonal is {float(diagonal.min()):.3g}. Give "
                "it more damping."
            )
        return diagonal

    @cached_property
    def saliency(self) -> Float[Tensor, " k"]:
        return self.weights.square() / (2 * self.diagonal)

    def increase(self, step: Float[Tensor, " k"]) -> float:
        return float(step @ (self.curvature @ step).double()) / 2

    def everywhere(self, values: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        """The same with 0 for the weights that are zero."""
        return values.new_zeros(len(self.places)).masked_scatter(self.places, values)


def _joint(model: _Quadratic, removed: Bool[Tensor, " k"]) -> Tensor:
    return inverse_of(principal(model.inverse, removed)) @ model.weights[removed]


def _separate(model: _Quadratic, removed: Bool[Tensor, " k"]) -> Tensor:
    return (model.weights / model.diagonal)[removed]


# Lagrange multipliers of w + d = 0 at what is removed
MULTIPLIERS: dict[PruneMethod, Callable[[_Quadratic, Tensor], Tensor]] = {"joint": _joint, "separate": _separate}


def _measured(question: str, objective: Objective, inverse: LinearOperator, **options: Any) -> Measurement:
    need_objective(question, objective)
    n = objective.space.size
    if inverse.shape != (n, n):
        raise ValueError(
            f"The inverse is {inverse.shape[0]} x {inverse.shape[1]}, but the objective has {n} parameters. Take that "
            "of a matrix of this objective: narrow it before, not after."
        )
    return Measurement(inverse, question, options={**options, "weights": objective.fingerprint["model"]})
