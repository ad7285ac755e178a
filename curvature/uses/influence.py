"""Which training examples a prediction rests on: influence functions, with whatever inverse there is of the curvature.

Leaving an example out moves the minimum by A^-1 g / T to first order, where g is the gradient of its loss, A the damped
Hessian of the objective or what stands for it, and T the number of terms in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.operators.engine import need_objective
from curvature.operators.layerwise import Batch
from curvature.operators.per_example import ExampleGradients, example_gradients
from curvature.progress import Run
from curvature.result import Result

TOP = 3
TESTS = 10  # for which the summary names examples


@dataclass(frozen=True, kw_only=True, repr=False)
class Influence(Result):
    """`scores` (N, m) in units of the loss: by how much the loss of test example j rises when training example i is
    left out, to first order; (N,) where there is one test, or each example is its own. Positive ones helped.

    `ranked` (r, m) or (r,) are the indices of the examples that were asked for, those with the largest scores and then
    those with the smallest, by falling score; `ranked_scores` are theirs.
    """

    scores: Float[Tensor, "N ..."]
    ranked: Int[Tensor, "r ..."]
    ranked_scores: Float[Tensor, "r ..."]

    def top(self, count: int = 10) -> Tensor:
        """The indices of the examples with the largest scores, (count,) or (count, m), largest first."""
        return self.scores.topk(min(count, len(self.scores)), dim=0).indices

    def table(self) -> dict[str, list[Any]]:
        if self.scores.ndim == 1:
            return {"example": list(range(len(self.scores))), "score": self.scores.tolist()}
        tests = {f"test {test}": scores.tolist() for test, scores in enumerate(self.scores.unbind(1))}
        return {"example": list(range(len(self.scores))), **tests}

    def summary(self) -> dict[str, str]:
        if not self.scores.numel():
            return {"examples": "none"}
        shown = {"examples": f"{len(self.scores):,}"}
        if self.scores.ndim == 1:
            pairs = zip(self.ranked.tolist(), self.ranked_scores.tolist(), strict=True)
            return shown | {f"example {i}": f"{score: .4g}" for i, score in pairs}
        shown["tests"] = f"{self.scores.shape[1]:,}"
        columns = zip(self.ranked.T.tolist(), self.ranked_scores.T.tolist(), strict=True)
        for test, (indices, scores) in enumerate(islice(columns, TESTS)):
            pairs = zip(scores, indices, strict=True)
            shown[f"test {test}"] = ", ".join(f"{score:.3g} ({i})" for score, i in pairs)
        return shown

    __repr__ = Result.__str__


def influence(
    train: Objective,
    test: Objective | Float[Tensor, "m n"],
    inverse: LinearOperator,
    *,
    top: int = TOP,
    run: Run | None = None,
) -> Influence:
    """How much each training example helped each test: g_i . A^-1 g_j / T, (N, m).

    `test` is an objective at the same parameters, each example of which is a test, or the gradients (m, n) or (n,) of
    anything else at them: `test.gradient()` asks about the mean loss, with one product in place of m. `inverse` is
    that of the damped curvature of `train`: `inverse(ggn(train), damping=mu)` solves by conjugate gradients, and those
    of `kfac`, `ekfac` and of a `GradientWindow` are exact; with the identity the scores are inner products of
    gradients (TracIn, for one checkpoint). One pass over the training data, in which never more than the gradients of
    a layer are held. The `top` largest and smallest scores of each test are `ranked`. With a checkpoint it goes on
    where it was, and an interrupt returns the examples so far.

    Examples are numbered in the order of the data; a batch of which no target counts is left out.
    The parameters should be near a minimum of `train`, and the network nearly linear in what one example changes:
    compare with retraining on some. Koh & Liang 2017 (arXiv:1703.04730); Pruthi et al. 2020 (arXiv:2002.08484).

    >>> from curvature import egn, inverse
    >>> line, x = torch.nn.Linear(1, 1, bias=False), torch.ones(3, 1)  # fitted: the mean of 1, 2 and 6
    >>> _ = torch.nn.init.constant_(line.weight, 3.0)
    >>> train = Objective.of(line, "mse", (x, torch.tensor([[1.0], [2.0], [6.0]])))
    >>> at_four = train.on((torch.ones(1, 1), torch.tensor([[4.0]])))  # a test; without the 6 it would lose
    >>> influence(train, at_four, inverse(egn(train))).scores[:, 0].tolist()  # doctest: +ELLIPSIS
    [-1.33..., -0.66..., 2.0...]
    """
    asking = _Asking("influence", train, inverse, _count(top), _count(top), run)
    rows = _gradients(test, train)
    # one of them first: of a checkpoint, that is computed again to see whether the inverse is the same
    directions = torch.cat([asking.measurement.apply(some) for some in (rows[:1], rows[1:]) if len(some)])

    def scores(examples: ExampleGradients, batch: Batch) -> Float[Tensor, "b ..."]:
        along = examples.along(directions, batch)
        return along if isinstance(test, Objective) or test.ndim == 2 else along[:, 0]

    return asking.scores(scores)


def self_influence(train: Objective, inverse: LinearOperator, *, top: int = TOP, run: Run | None = None) -> Influence:
    """How much each training example helped itself: g_i . A^-1 g_i / T, (N,), which is large where a label is wrong.

    Arguments as in `influence`. Every example is multiplied with the inverse, a batch at a time: with an exact one
    that is cheap; with conjugate gradients it is a solve for each, those of a batch in the same passes over the data.
    The `top` largest scores are `ranked`.
    The gradients of a batch are held, so that batches should be as large as memory allows.
    """
    asking = _Asking("self_influence", train, inverse, _count(top), 0, run)

    def scores(examples: ExampleGradients, batch: Batch) -> Float[Tensor, " b"]:
        rows = examples.rows(batch)
        return train.space.diagonal(rows, asking.measurement.apply(rows))

    return asking.scores(scores)


class _Asking:
    """A pass over the training data that asks for the scores of every batch, of which so many are `ranked`."""

    def __init__(
        self, question: str, train: Objective, inverse: LinearOperator, largest: int, smallest: int, run: Run | None
    ) -> None:
        inverse = as_operator(inverse)
        need_objective(question, train)
        if inverse.shape != (train.space.size, train.space.size):
            n = train.space.size
            raise ValueError(f"The inverse is {inverse.shape}, but the objective has {n} parameters: make it of them.")
        options = {"data": train.fingerprint["data"], "model": train.fingerprint["model"]}
        self.measurement = Measurement(inverse, question, options=options, run=run)
        self.train, self.passes = train, train.meter.passes
        self.ends = largest, smallest
        self.examples = ExampleGradients(train)
        self.terms = Passes(train).total(lambda batch: torch.zeros(()))[1]
        self.found: list[Tensor] = []

    def scores(self, of: Callable[[ExampleGradients, Batch], Tensor]) -> Influence:
        """Those of all examples; of those so far where it is interrupted."""
        measurement, batches = self.measurement, len(self.train.batches.digests)

        def see(batch: Batch) -> None:
            number = torch.tensor([[float(batch.index)]])
            self.found.append(measurement.once(lambda: {"scores": of(self.examples, batch)}, number)["scores"])
            measurement.report(len(self.found), batches, unit="batches")

        try:
            Passes(self.train, Batch).each(see)
        except KeyboardInterrupt as stop:
            raise Interrupted(self._result(complete=False)) from stop
        return self._result(complete=True)

    def _result(self, *, complete: bool) -> Influence:
        cost = self.measurement.cost
        passes = max(cost.passes, self.train.meter.passes - self.passes)  # an exact inverse counts none
        scores = torch.cat(self.found).cpu() / self.terms if self.found else torch.zeros(0)
        largest, smallest = self.ends
        order = scores.argsort(dim=0, descending=True, stable=True)
        if largest + smallest < len(order):
            order = torch.cat([order[:largest], order[len(order) - smallest :]])
        return Influence(
            scores=scores,
            ranked=order,
            ranked_scores=scores.gather(0, order),
            complete=complete,
            cost=replace(cost, passes=passes),
            origin=self.measurement.origin,
        )


def _count(top: int) -> int:
    if top < 1:
        raise ValueError(f"top is a number of examples, 1 or more, but got {top}.")
    return top


def _gradients(test: Objective | Tensor, train: Objective) -> Float[Tensor, "m n"]:
    """Those of the tests, in the space of the parameters."""
    if isinstance(test, Objective):
        if [n for n, p in train.params.items() if n not in test.params or not torch.equal(p, test.params[n])]:
            raise ValueError(
                "The test is at other parameters than the training objective: make it by `train.on(data)`, or take "
                "`test.at(train.params)`."
            )
        rows = example_gradients(test)
    else:
        rows = torch.atleast_2d(test)
    if rows.shape[1:] != (train.space.size,):
        n, got = train.space.size, tuple(rows.shape)
        raise ValueError(f"Expected gradients (m, {n}), one entry a parameter of `train`, but got {got}.")
    return rows.detach().to(train.space.device, train.space.dtype)
