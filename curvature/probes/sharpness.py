"""All measures of sharpness of a model in one table, and whether they depend on how its function is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import CurvatureError, Interrupted, listing
from curvature.linalg.work import Record
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.probes.measures import MEASURES, Measure, Numbers, Setting
from curvature.probes.points import Points
from curvature.probes.rescaling import rescaled
from curvature.progress import Run
from curvature.result import Cost, Origin, Quantity, Result, with_error

ALPHAS = (0.5, 2.0)  # powers of 2: the scaled network rounds as the given one does


@dataclass(frozen=True, kw_only=True, repr=False)
class Sharpness(Result):
    """A table of measures: `values` (m,) of those in `names`, and their standard errors `stderrs` (m,), NaN where
    nothing is random, with their degrees of freedom `dofs` (m,); `bounds` (m,) are of what no repetition shows, such as
    the residual of an eigenvalue.

    `invariant` says whether theory has a measure unchanged where the weights of ReLU networks are scaled without
    changing the function, and `changes` (m,) by how much at most it changed, relatively, where that was tried.
    `left_out` are those that do not apply, each with the reason.
    """

    names: tuple[str, ...]
    values: Float[Tensor, " m"]
    stderrs: Float[Tensor, " m"]
    dofs: Float[Tensor, " m"]
    bounds: Float[Tensor, " m"]
    invariant: tuple[bool, ...]
    changes: Float[Tensor, " m"] | None = None
    left_out: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        """The value of one measure."""
        if name not in self.names:
            raise KeyError(f"There is no {name!r} among {listing(self.names, 30)}.")
        return float(self.values[self.names.index(name)])

    def summary(self) -> dict[str, str]:
        rows = {}
        changes = torch.full_like(self.values, torch.nan) if self.changes is None else self.changes
        columns = (self.values.tolist(), self.stderrs.tolist(), self.dofs.tolist(), self.invariant, changes.tolist())
        for name, value, stderr, dof, invariant, change in zip(self.names, *columns, strict=True):
            number = f"{value:.6g}" if stderr != stderr else with_error(value, stderr, dof)
            told = "invariant" if invariant else "not invariant"
            rows[name] = f"{number:<24} {told}" + ("" if change != change else f" (changed by {change:.1e})")
        return rows | ({"left out": "; ".join(self.left_out)} if self.left_out else {})

    def table(self) -> dict[str, list[Any]]:
        changes = [None] * len(self.names) if self.changes is None else self.changes.tolist()
        stderrs = [None if stderr != stderr else stderr for stderr in self.stderrs.tolist()]
        columns = {"value": self.values.tolist(), "stderr": stderrs, "bound": self.bounds.tolist()}
        return {"measure": list(self.names), **columns, "invariant": list(self.invariant), "change": changes}

    def quantities(self) -> dict[str, Quantity]:
        columns = self.values, self.stderrs.nan_to_num(0.0), self.dofs, self.bounds
        rows = zip(self.names, *(column.tolist() for column in columns), strict=True)
        return {name: Quantity(*numbers) for name, *numbers in rows}

    __repr__ = Result.__str__


def sharpness(
    objective: Objective,
    *,
    measures: Sequence[str] = tuple(MEASURES),
    rho: float = 0.05,
    sigma: float = 0.01,
    samples: int = 16,
    products: int = 64,
    invariance: bool = False,
    seed: int = 0,
    run: Run | None = None,
) -> Sharpness:
    """The measures of sharpness in one table, each with its standard error and whether it depends on how the function
    is written as weights. Those that are named in `measures`, all of them if nothing else is said:

    - of the Hessian H: "lambda_max", "trace", "frobenius", and "criteria" (r_e, K_H, K_1 of `spectral_criteria`);
    - within a ball of radius `rho`: "sam" by one step, "worst" by 20 from two starts; "keskar" within a box;
    - on average over `samples` draws: "average" at `sigma`, "pac_bayes" 1 / sigma^2 where the error rises by 0.1, or
      the loss where no answer is right or wrong;
    - "critical", of a step along the gradient;
    - of relative changes of the weights: "adaptive_lambda_max", "adaptive_sam", "adaptive_worst", "adaptive_average",
      "adaptive_pac_bayes", and "filter" and "fisher_rao": these are invariant.

    For the options of one measure ask for it alone. With `invariance` each is taken twice more, at weights `rescaled`
    by 1/2 and 2 at which the function is the same, where the model has layers that can be. Measures that do not apply
    are left out with the reason. With a checkpoint in `run` a measure is a piece of the work; an interrupt raises
    Interrupted with the table so far.

    What is sharp by one need not be by another, and none tells generalisation in every setting (Andriushchenko et al.
    2023, arXiv:2302.07011): compare models by those that are invariant, or know that the weights have one scale.
    """
    need_objective("sharpness", objective)
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise ValueError(f"measures are some of {listing(list(MEASURES), 30)}, but got {listing(unknown) or 'none'}.")
    if not (rho > 0 and sigma > 0 and samples >= 2 and products >= 4):
        raise ValueError(
            f"Expected positive rho and sigma, samples >= 2 and products >= 4, but got {rho}, {sigma}, {samples} and "
            f"{products}."
        )
    options = {"measures": list(measures), "rho": rho, "sigma": sigma, "samples": samples, "products": products}
    work = Points(objective).work("sharpness", options | {"invariance": invariance}, run, seed)
    objectives, left_out = [objective], []
    if invariance:
        try:
            objectives += [rescaled(objective, alpha) for alpha in ALPHAS]
        except CurvatureError as reason:
            left_out.append(f"invariance: {reason}")
    table: dict[str, list[Numbers]] = {}
    total = len(measures) * len(objectives)

    def result(*, complete: bool) -> Sharpness:
        return _tabled(table, left_out, len(objectives) > 1, complete=complete, cost=work.cost, origin=work.origin)

    try:
        for place, at in enumerate(objectives):
            setting = Setting(at, rho, sigma, samples, products, seed, replace(work.run, checkpoint=None))
            for done, name in enumerate(measures, 1):
                record = work.piece(lambda name=name, setting=setting: _taken(MEASURES[name], setting))
                if "values" in record:
                    work.products += int(record["products"])
                    table.setdefault(name, []).append(Numbers(*(record[kind].cpu() for kind in Numbers._fields)))
                elif not place:
                    left_out.append(f"{name}: {bytes(record['reason'].tolist()).decode()}")
                work.report(place * len(measures) + done, total, name, "measures")
    except KeyboardInterrupt as stop:
        if not table:
            raise KeyboardInterrupt from stop
        raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


def _taken(measure: Measure, setting: Setting) -> Record:
    """The numbers of a measure, or why there are none."""
    try:
        answer = measure.ask(setting)
        return {**measure.read(answer)._asdict(), "products": torch.tensor(answer.cost.products)}
    except (CurvatureError, ValueError) as reason:
        return {"reason": torch.tensor(list(str(reason).encode()), dtype=torch.uint8)}


def _tabled(
    table: dict[str, list[Numbers]], left_out: list[str], compared: bool, *, complete: bool, cost: Cost, origin: Origin
) -> Sharpness:
    """The rows of all measures that were taken."""
    rows = {name: MEASURES[name].rows or (name,) for name in table}
    columns = {
        kind: torch.cat([*(found[0]._asdict()[kind] for found in table.values()), torch.zeros(0)])
        for kind in Numbers._fields
    }
    changes = [_change([numbers.values for numbers in found]) for found in table.values()]
    return Sharpness(
        names=tuple(row for name in table for row in rows[name]),
        **columns,
        invariant=tuple(MEASURES[name].invariant for name in table for _ in rows[name]),
        changes=torch.cat(changes) if compared and changes else None,
        left_out=tuple(left_out),
        complete=complete,
        cost=cost,
        origin=origin,
    )


def _change(values: list[Float[Tensor, " r"]]) -> Float[Tensor, " r"]:
    """The largest relative difference to the first; 0 between equals, NaN where there are no others."""
    if len(values) == 1:
        return torch.full_like(values[0], torch.nan)
    differences = (torch.stack(values[1:]) - values[0]).abs().amax(0)
    return differences.where(differences == 0, differences / values[0].abs())
