"""Which few parameters are worth training: those that the Fisher information of the model is largest for."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.linalg.measurement import describe
from curvature.linalg.memory import peak_bytes
from curvature.objective.objective import Objective
from curvature.objective.params import Select, nothing_selected, predicate
from curvature.operators.engine import need_objective
from curvature.operators.moments import ggn_diagonal
from curvature.operators.residuals import FisherKind
from curvature.result import Cost, Origin, Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Mask(Result):
    """Which parameters to train: those where `mask` (n,) is true, flat as the objective has them.

    `fisher` (n,) is the diagonal that they were chosen by, and `always` how many were kept whatever it is there.
    """

    mask: Bool[Tensor, " n"]
    fisher: Float[Tensor, " n"]
    always: int

    def summary(self) -> dict[str, str]:
        kept, held = int(self.mask.sum()), float(self.fisher[self.mask].sum() / self.fisher.sum().clamp(min=1e-300))
        return {
            "kept": f"{kept:,} of {len(self.mask):,} parameters ({kept / len(self.mask):.2%}), {self.always:,} always",
            "with": f"{held:.1%} of the trace of the Fisher matrix",
        }

    __repr__ = Result.__str__


def fish_mask(
    objective: Objective,
    keep: float = 0.005,
    *,
    fisher: FisherKind = "empirical",
    always: Select | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Mask:
    """The share `keep` of the parameters with the largest entries of the Fisher diagonal, to train these alone.

    `always` names parameters or layers by globs, such as a new head, that are kept first and count; the rest of the
    budget goes to the largest of all others, and of equal ones to those that come first. `fisher`, `samples` and `seed`
    are those of `ggn_diagonal`, from one pass over the data: a few hundred examples do, as in `objective.first(256)`.

        mask = cv.fish_mask(objective.first(256), 0.005, always="head")
        for name, kept in objective.space.named(mask.mask).items():
            net.get_parameter(name).register_hook(kept.mul)

    and train as ever, without weight decay: that would move what has no gradient. Raises ValueError where those that
    are always kept are more than the budget.

    Sung, Nair & Raffel 2021 (arXiv:2111.09839).
    """
    need_objective("fish_mask", objective)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a share, above 0 and up to 1, but got {keep}.")
    started, passes = time.perf_counter(), objective.meter.passes
    space, budget = objective.space, round(keep * objective.space.size)
    if budget == 0:
        raise ValueError(f"A share of {keep:g} of {space.size:,} parameters is less than one. Raise it.")
    held = _named(objective, always)
    count = int(held.sum())
    if count > budget:
        raise ValueError(
            f"{count:,} parameters are always kept, but a share of {keep:g} is {budget:,} of {space.size:,}. Raise it, "
            "or name fewer in always."
        )
    diagonal = ggn_diagonal(objective, fisher=fisher, samples=samples, seed=seed)
    ranked = diagonal.entries.masked_fill(held, float("inf")).argsort(descending=True, stable=True)
    mask = torch.zeros_like(held)
    mask[ranked[:budget]] = True
    options = {"keep": keep, "fisher": fisher, "always": always, "samples": samples}
    cost = Cost(
        passes=objective.meter.passes - passes,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(space.device),
    )
    origin = Origin(question="fish_mask", options=options, seed=seed, operator=describe(diagonal))
    return Mask(mask=mask, fisher=diagonal.entries, always=count, cost=cost, origin=origin)


def _named(objective: Objective, select: Select | None) -> Bool[Tensor, " n"]:
    """Which entries belong to the parameters that `select` names; none for None."""
    space = objective.space
    matches = predicate(() if select is None else select)
    parameters = dict(objective.function.module.named_parameters())
    chosen = [matches(name, parameters[name]) for name in space.names]
    if select is not None and not any(chosen):
        raise nothing_selected(select, list(space.names))
    sizes = torch.tensor([shape.numel() for shape in space.shapes])
    return torch.tensor(chosen).repeat_interleave(sizes).to(space.device)
