"""Several questions about one objective, asked one after another: what a report is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from curvature.diagnostics.stability import stable_learning_rates
from curvature.diagnostics.subspace import gradient_share
from curvature.errors import CurvatureError, Interrupted, listing
from curvature.io.files import write_atomically
from curvature.linalg.eigen import eigsh
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.operator import LinearOperator
from curvature.linalg.spectrum import spectral_density
from curvature.linalg.trace import trace
from curvature.objective.objective import Objective
from curvature.objective.work import work_on
from curvature.operators.by_layer import by_layer
from curvature.operators.doctor import check
from curvature.operators.engine import need_objective
from curvature.operators.hessian import hessian
from curvature.probes.landscape import plane
from curvature.probes.sharpness import sharpness
from curvature.progress import Progress, Run
from curvature.result import Quantity, Result

R = TypeVar("R", bound=Result)

RTOL = 1e-3  # of eigenvalues
SINGLE: Any = {"block": 1, "max_steps": 800}  # of few eigenvalues blocks of 4 take thrice the products


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Result):
    """The answers to several questions about one objective, by name: `report["spectrum"]`.

    `loss` is the value of the objective; `left_out` are the questions that have no answer, each with the reason.
    """

    names: tuple[str, ...]
    results: tuple[Result, ...]
    loss: float
    left_out: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(f"There is no {name!r} among {listing(self.names)}.")
        return self.results[self.names.index(name)]

    def summary(self) -> dict[str, str]:
        rows = {"loss": f"{self.loss:.6g}", "parameters": f"{self.origin.operator['parameters']:,}"}
        for name, result in zip(self.names, self.results, strict=True):
            rows |= {f"{name}: {label}": text for label, text in result.summary().items()}
        return rows | ({"left out": "; ".join(self.left_out)} if self.left_out else {})

    def quantities(self) -> dict[str, Quantity]:
        both = zip(self.names, self.results, strict=True)
        numbers = {f"{name}.{label}": q for name, result in both for label, q in result.quantities().items()}
        return {"loss": Quantity(self.loss)} | numbers

    def page(self, *, made_by: str = "") -> str:
        """One HTML page with tables, pictures and how to obtain it again, `made_by` if that was a command: it loads
        nothing and runs nothing. Pictures need the extra `plot`; without it there are tables only."""
        from curvature.reporting.page import page_of

        return page_of(self, made_by)

    def save_page(self, path: str | Path, *, made_by: str = "") -> Path:
        """Write the page into a file; returns its path."""
        write_atomically(path, self.page(made_by=made_by).encode())
        return Path(path)

    __repr__ = Result.__str__


@dataclass(frozen=True)
class Setting:
    """What is asked about, and how thoroughly."""

    objective: Objective
    k: int
    probes: int
    steps: int
    products: int
    points: int
    seed: int
    answers: dict[str, Result]  # until now

    @cached_property
    def hessian(self) -> LinearOperator:
        """That of the loss."""
        return hessian(self.objective)


Question = Callable[[Setting, Run | None], Result]


def _health(s: Setting, run: Run | None) -> Result:
    return check(s.objective)


def _spectrum(s: Setting, run: Run | None) -> Result:
    return spectral_density(s.hessian, probes=s.probes, steps=s.steps, seed=s.seed, run=run)


def _eigenvalues(s: Setting, run: Run | None) -> Eigenpairs:
    return eigsh(s.hessian, min(s.k, s.objective.space.size), rtol=RTOL, seed=s.seed, run=run)


def _layers(s: Setting, run: Run | None) -> Result:
    return by_layer(eigsh, s.hessian, k=1, rtol=RTOL, seed=s.seed, run=run, **SINGLE)


def _traces(s: Setting, run: Run | None) -> Result:
    return by_layer(trace, s.hessian, products=s.products, seed=s.seed, run=run)


def _gradient(s: Setting, run: Run | None) -> Result:
    if isinstance(pairs := s.answers.get("eigenvalues"), Eigenpairs):
        return gradient_share(s.objective, pairs)
    pairs = _pairs(s, run, s.k)
    return _after(pairs, gradient_share(s.objective, pairs))


def _rates(s: Setting, run: Run | None) -> Result:
    return stable_learning_rates(s.objective, rtol=RTOL, seed=s.seed, run=run)


def _sharpness(s: Setting, run: Run | None) -> Result:
    return sharpness(s.objective, products=s.products, seed=s.seed, run=run)


def _plane(s: Setting, run: Run | None) -> Result:
    ends = _pairs(s, run, 2, which="both", **SINGLE)
    return _after(ends, plane(s.objective, ends, points=s.points, run=run))


def _pairs(s: Setting, run: Run | None, k: int, **options: Any) -> Eigenpairs:
    """For a question that is about something else: all or none."""
    part = None if run is None else run.part("pairs")
    try:
        return eigsh(s.hessian, min(k, s.objective.space.size), rtol=RTOL, seed=s.seed, run=part, **options)
    except Interrupted as stop:
        raise KeyboardInterrupt from stop


def _after(pairs: Eigenpairs, result: R) -> R:
    """The result with the cost of the pairs that were found for it."""
    return replace(result, cost=pairs.cost + result.cost)


QUESTIONS: dict[str, Question] = {
    "health": _health,
    "spectrum": _spectrum,
    "eigenvalues": _eigenvalues,
    "layers": _layers,
    "traces": _traces,
    "gradient": _gradient,
    "rates": _rates,
    "sharpness": _sharpness,
    "landscape": _plane,
}


def report(
    objective: Objective,
    *,
    questions: Sequence[str] = tuple(QUESTIONS),
    k: int = 10,
    probes: int = 4,
    steps: int = 60,
    products: int = 32,
    points: int = 25,
    seed: int = 0,
    run: Run | None = None,
) -> Report:
    """What is worth knowing of the curvature at the parameters, in one result and on one page: `save_page(path)`.

    `questions` are some of "health" (`check`, whose warnings head the page), "spectrum" (`spectral_density` with
    `probes` and `steps`), "eigenvalues" (the `k` largest by `eigsh`), "layers" and "traces" (the largest eigenvalue and
    the trace of every layer, by `products` each), "gradient" (`gradient_share` in those k directions), "rates"
    (`stable_learning_rates`), "sharpness" (the table of `sharpness`), and "landscape" (a `plane` of `points` x `points`
    along the ends of the spectrum). A question that has no answer for this objective is left out with the reason.

    With a checkpoint in `run`, each question keeps its own beside it, as NAME.question. An interrupt raises Interrupted
    with what there is. Raises CurvatureError where `objective.check()` does.
    """
    need_objective("report", objective)
    unknown = [name for name in questions if name not in QUESTIONS]
    if unknown or not questions:
        raise ValueError(f"questions are some of {listing(list(QUESTIONS))}, but got {listing(unknown) or 'none'}.")
    if min(k, probes, steps, products, points) < 1 or points % 2 == 0:
        raise ValueError(
            "Expected positive numbers, and an odd one of points, but got "
            f"k={k}, probes={probes}, steps={steps}, products={products}, points={points}."
        )
    options = {"questions": list(questions), "k": k, "probes": probes, "steps": steps}
    work = work_on(objective, "report", options=options | {"products": products, "points": points}, seed=seed)
    objective.check()
    loss = float(objective.value())
    answers: dict[str, Result] = {}
    setting = Setting(objective, k, probes, steps, products, points, seed, answers)
    left_out: list[str] = []

    def result(*, complete: bool) -> Report:
        work.products = sum(answer.cost.products for answer in answers.values())
        return Report(
            names=tuple(answers),
            results=tuple(answers.values()),
            loss=loss,
            left_out=tuple(left_out),
            complete=complete,
            cost=work.cost,
            origin=work.origin,
        )

    for place, name in enumerate(questions):
        try:
            answers[name] = QUESTIONS[name](setting, _part(run, name, place, len(questions)))
        except CurvatureError as reason:
            left_out.append(f"{name}: {reason}")
        except KeyboardInterrupt as stop:
            if (partial := getattr(stop, "result", None)) is not None:
                answers[name] = partial
            raise Interrupted(result(complete=False)) from stop
    return result(complete=True)


def _part(run: Run | None, name: str, place: int, total: int) -> Run | None:
    """How the question of that name reports and is kept."""
    if run is None:
        return None

    def told(progress: Progress) -> None:
        note = f"{name}, {progress.done}/{progress.total} {progress.unit}, {progress.note}"
        run.report(Progress("report", place, total, "questions", note, progress.left))

    return replace(run.part(name), progress=told)
