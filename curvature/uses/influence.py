"""Which training examples a prediction rests on: influence functions, with whatever inverse there is of the curvature.

Leaving an example out moves the minimum by A^-1 g / T to first order, where g is the gradient of its loss, A the damped
Hessian of the objective or what stands for it, and T the number of terms in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
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

SHOWN = 3


@dataclass(frozen=True, kw_only=True, repr=False)
class Influence(Result):
    """`scores` (N, m) in units of the loss: by how much the loss of test example j rises when training example i is
    left out, to first order; (N,) where there is one test, or each example is its own. Positive ones helped."""

    scores: Float[Tensor, "N ..."]

    def top(self, count: int = 10) -> Tensor:
        """The indices of the examples with the largest scores, (count,) or (count, m), largest first."""
        return self.scores.topk(min(count, len(self.scores)), dim=0).indices

    def summary(self) -> dict[str, str]:
        if not self.scores.numel():
            return {"examples": "none"}
        shown = {"examples": f"{len(self.scores):,}"}
        if self.scores.ndim == 1:
            shown["largest"] = ", ".join(f"{float(self.scores[i]):.3g} ({int(i)})" for i in self.top(SHOWN))
        else:
            shown["tests"] = f"{self.scores.shape[1]:,}"
        return shown

    __repr__ = Result.__str__


def influence(
    train: Objective, test: Objective | Float[Tensor, "m n"], inverse: LinearOperator, *, run: Run | None = None
) -> Influence:
    """How much each training example helped each test: g_i . A^-1 g_j / T, (N, m).

    `test` is an objective at the same parameters, each example of which is a test, or the gradients (m, n) or (n,) of
    anything else at them: `test.gradient()` asks about the mean loss, with one product in place of m. `inverse` is
    that of the damped curvature of `train`: `inverse(ggn(train), damping=mu)` solves by conjugate gradients, and those
    of `kfac`, `ekfac` and of a `GradientWindow` are exact; with the identity the scores are inner products of
    gradients (TracIn, for one checkpoint). One pass over the training data, in which never more than the gradients of
    a layer are held. With a checkpoint it goes on where it was, and an interrupt returns the examples so far.

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
    asking = _Asking("influence", train, inverse, run)

    rows = _gradients(test, train)
    # one of them first: of a checkpoint, that is computed again to see whether the inverse is the same
    directions = torch.cat([asking.measurement.apply(some) for some in (rows[:1], rows[1:]) if len(some)])

    def scores(examples: ExampleGradients, batch: Batch) -> Float[Tensor, "b ..."]:
        along = examples.along(directions, batch)
        return along if isinstance(test, Objective) or test.ndim == 2 else along[:, 0]

    return asking.scores(scores)


def self_influence(train: Objective, inverse: LinearOperator, *, run: Run | None = None) -> Influence:
    """How much each training example helped itself: g_i . A^-1 g_i / T, (N,), which is large where a label is wrong.

    Arguments as in `influence`. Every example is multiplied with the inverse, a batch at a time: with an exact one
    that is cheap; with conjugate gradients it is a solve for each, those of a batch in the same passes over the data.
    The gradients of a batch are held, so that batches should be as large as memory allows.
    """
    asking = _Asking("self_influence", train, inverse, run)

    def scores(examples: ExampleGradients, batch: Batch) -> Float[Tensor, " b"]:
        rows = examples.rows(batch)
        return train.space.diagonal(rows, asking.measurement.apply(rows))

    return asking.scores(scores)


class _Asking:
    """A pass over the training data that asks for the scores of every batch."""

    def __init__(self, question: str, train: Objective, inverse: LinearOperator, run: Run | None) -> None:
        inverse = as_operator(inverse)
        need_objective(question, train)
        if inverse.shape != (train.space.size, train.space.size):
            n = train.space.size
            raise ValueError(f"The inverse is {inverse.shape}, but the objective has {n} parameters: make it of them.")
        options = {"data": train.fingerprint["data"], "model": train.fingerprint["model"]}
        self.measurement = Measurement(inverse, question, options=options, run=run)
        self.train, self.passes = train, train.meter.passes
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
        return Influence(
            scores=torch.cat(self.found).cpu() / self.terms if self.found else torch.zeros(0),
            complete=complete,
            cost=replace(cost, passes=passes),
            origin=self.measurement.origin,
        )


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
