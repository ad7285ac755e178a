"""Whether an objective can be analysed: everything that can be asked before, and what an analysis would take.

The probes are those that every operator passes before its first product, asked one by one so that each finding can be
read, and beside them what only a doctor asks: the environment, the mode, the engines that work, the cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from curvature.errors import BadObjective, CurvatureError, NonFinite, TooLarge
from curvature.linalg.memory import peak_bytes
from curvature.objective.check import PROBES, Examination, Seen, explained
from curvature.objective.objective import Objective
from curvature.operators.vitals import Plan, Trials, environment, mode, model, randomness, rewrites, terms
from curvature.result import Cost, Origin, Part, Quantity, Result

Status = Literal["ok", "warning", "failed", "skipped"]
FIGURES = (
    "asymmetry",
    "difference",
    "gradient_seconds",
    "product_seconds",
    "graph_bytes",
    "forecast_seconds",
    "forecast_bytes",
)  # of a diagnosis


@dataclass(frozen=True, kw_only=True)
class Finding(Part):
    """One answer: `seen` is what was found in a sentence, `fix` what to do where something is to be done, and `error`
    the class of the error that an analysis would end with. "skipped" is what could not be tried, or need not work."""

    name: str
    status: Status
    seen: str
    fix: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis(Result):
    """What was found about an objective, in the order in which it was asked.

    Of the first batch: `asymmetry` is how far u.Hv is from v.Hu relative to the products, 0 where rounding explains it;
    `difference` that between a product and a finite difference of gradients in float64; seconds are of one gradient and
    one product, and `graph_bytes` what the graph of the gradient holds. The forecast is of the work that was asked
    about; None what was not measured. `rewrites` counts the calls of one pass that are replaced to be twice
    differentiable.
    """

    findings: tuple[Finding, ...]
    rewrites: Mapping[str, int] = field(default_factory=dict)
    asymmetry: float | None = None
    difference: float | None = None
    gradient_seconds: float | None = None
    product_seconds: float | None = None
    graph_bytes: float | None = None
    forecast_seconds: float | None = None
    forecast_bytes: float | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing failed, so that the objective can be analysed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that stand in the way."""
        return tuple(finding for finding in self.findings if finding.status == "failed")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that do not, but should be known."""
        return tuple(finding for finding in self.findings if finding.status == "warning")

    def summary(self) -> dict[str, str]:
        return {f.name: f"{f.status:<7}  {f.seen}{f'. {f.fix}' if f.fix else ''}" for f in self.findings}

    def quantities(self) -> dict[str, Quantity]:
        numbers = {name: getattr(self, name) for name in FIGURES}
        known = {name: Quantity(number) for name, number in numbers.items() if number is not None}
        return {"warnings": Quantity(len(self.warnings)), **known}

    __repr__ = Result.__str__


def check(
    objective: Objective | Callable[[], Objective],
    *,
    products: int = 0,
    passes: int | None = None,
    losses: int = 0,
    vectors: int = 0,
    layer_products: int = 0,
    parameter_products: int = 0,
) -> Diagnosis:
    """Whether `objective` can be analysed, and if not, which part of the model, which words of torch, and which fix.

    Nothing that is wrong with an objective raises here: it is a finding, and what can no longer be tried is skipped.
    Instead of an objective a function that makes one may be given, so that what making it refuses is a finding too.
    On the first batch, by at most ten products and four gradients: numbers are finite, the loss repeats, its gradient
    reaches the parameters (or else losses at other parameters tell whether it depends on them), every backward can be
    differentiated, the Hessian is symmetric and agrees with differences of gradients in float64, and which engines
    work. With `products` (in so many `passes` over the data, as many by default), `losses` and `vectors` to keep, the
    time and the memory of such work are forecast; `layer_products` and `parameter_products` are those with the block of
    each layer and of each parameter. Parameters, gradients, buffers, modes and random generators are as before.

    >>> import torch
    >>> from torch import nn
    >>> diagnosis = check(Objective.of(nn.Linear(2, 3), "cross-entropy", (torch.ones(4, 2), torch.arange(4) % 3)))
    >>> diagnosis.healthy, diagnosis.findings[-1].name
    (True, 'cost')
    """
    passes = max(products, layer_products, parameter_products) if passes is None else passes
    plan = Plan(products, passes, losses, vectors, layer_products, parameter_products)
    return _Visit(plan).diagnosis(objective)


class _Visit:
    """One check, as far as it has come."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.started = time.perf_counter()
        self.findings: list[Finding] = []
        self.failed = ""  # the finding after which the rest cannot be tried

    def diagnosis(self, objective: Objective | Callable[[], Objective]) -> Diagnosis:
        """All findings."""
        made = objective if isinstance(objective, Objective) else self.made(objective)
        if made is None:
            return self.result({"operator": "hessian", "shape": []}, Cost(seconds=self.seconds))
        examination, trials, before = Examination(made), Trials(), made.meter.passes
        self.ask("environment", partial(environment, made.space.device))
        questions = {"model": model, "mode": mode, **PROBES, "randomness": randomness, "terms": terms}
        questions |= {"rewrites": rewrites, **trials.questions}
        if any(self.plan):
            questions["forecast"] = partial(trials.forecast, self.plan)
        for name, question in questions.items():
            self.ask(name, partial(examination.run, question))
            if question is PROBES["symmetry"] and not self.failed and not made._health:
                made._health.append(examination.health)  # operators need not look again
        cost = Cost(
            products=examination.products + trials.products,
            passes=made.meter.passes - before,
            seconds=self.seconds,
            peak_bytes=peak_bytes(made.space.device),
        )
        figures = {"asymmetry": examination.asymmetry, "difference": examination.difference, **trials.figures}
        return self.result(_described(made), cost, rewrites=examination.rewrites, **figures)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def result(self, operator: dict[str, Any], cost: Cost, **figures: Any) -> Diagnosis:
        options = {name: value for name, value in self.plan._asdict().items() if value}
        origin = Origin(question="check", options=options, seed=operator.get("seed"), operator=operator)
        return Diagnosis(findings=tuple(self.findings), cost=cost, origin=origin, **figures)

    def made(self, make: Callable[[], Objective]) -> Objective | None:
        """The objective, where it can be made; what is wrong with a file is no finding."""
        try:
            return make()
        except (BadObjective, NonFinite, TooLarge) as error:
            self.fail("objective", error)
        return None

    def ask(self, name: str, question: Callable[[], Seen]) -> None:
        """Add the answer to the findings."""
        if self.failed:
            self.findings.append(Finding(name=name, status="skipped", seen=f"not tried, since {self.failed} failed"))
            return
        try:
            seen = question()
        except Exception as error:  # models and losses can raise anything
            self.fail(name, explained(error, 1))
            return
        status = "skipped" if seen.open else "warning" if seen.advice else "ok"
        self.findings.append(Finding(name=name, status=status, seen=seen.text, fix=seen.advice))

    def fail(self, name: str, error: CurvatureError) -> None:
        """Add the finding that nothing behind it can be tried."""
        kind = type(error).__name__
        self.findings.append(Finding(name=name, status="failed", seen=error.cause, fix=error.fix, error=kind))
        self.failed = name


def _described(objective: Objective) -> dict[str, Any]:
    """What the objective is made of; without fingerprints where the data cannot be read."""
    space = objective.space
    facts = {"operator": "hessian", "model": type(objective.function.module).__name__, "loss": objective.function.name}
    with suppress(Exception):  # data can be anything
        facts = {"operator": "hessian", **objective.facts}
    place = {"dtype": str(space.dtype).removeprefix("torch."), "device": str(space.device)}
    return {**facts, "seed": objective.seed, "shape": [space.size, space.size], **place}
