"""Training small networks to a target, everyone tuned the same: the question "training" of `optimizers.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from operators import failure
from optimizer_contenders import BASELINES, ROOT, Contender
from optimizer_tasks import Task

POINTS = 100  # measurements of the loss in a run
WARM = 0.05  # of the steps
SEEDS = {"autoencoder": 5}  # else 3
LONGER = 2  # values beyond the first five
HOPELESS = 1e3  # times the loss at the start
Rows = list[dict[str, Any]]


@dataclass
class Run:
    """A training: at each measurement the steps made, the seconds they took, and the loss; at the end what the task
    judges."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    judged: float = math.nan
    error: str | None = None

    @property
    def final(self) -> float:
        """The last loss; infinite where training came to nothing."""
        return math.inf if self.error or not math.isfinite(self.losses[-1]) else self.losses[-1]

    def until(self, target: float) -> tuple[float, float]:
        """Steps and seconds to the first loss of at most the target."""
        for steps, seconds, loss in zip(self.steps, self.seconds, self.losses, strict=True):
            if loss <= target:
                return steps, seconds
        return math.inf, math.inf


def trained(task: Task, contender: Contender, value: float, seed: int) -> Run:
    """One run; what a contender fails with is in it."""
    run, seconds = Run(), 0.0
    model = task.model(seed)
    length = task.few if contender.solves else task.steps
    every = math.ceil(length / POINTS)
    start = task.distance(model)
    try:
        optimizer = contender.optimizer(model, value)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step, batch in enumerate(task.batches(seed, length)):
            if contender.scheduled:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scheduled(step, length)
            started = time.process_time()
            optimizer.zero_grad()
            if not contender.differentiates(step):
                task.mean_loss(model, batch).backward(create_graph=contender.graph and not contender.objective)
            if contender.asks(step):
                optimizer.step(objective=task.objective(model, batch))
            else:
                optimizer.step()
            seconds += time.process_time() - started
            if (step + 1) % every == 0 or step + 1 == length:
                run.steps.append(step + 1)
                run.seconds.append(seconds)
                run.losses.append(task.distance(model))
                if not run.losses[-1] < HOPELESS * start:
                    run.error = "diverged"
                    return run
        run.judged = task.judge(model)
    except Exception as error:  # a finding
        run.error = failure(error)
    return run


def scheduled(step: int, length: int) -> float:
    """What the learning rate is multiplied by."""
    warm = max(1, round(WARM * length))
    return min(1.0, (step + 1) / warm) * (1 - step / length)


@dataclass
class Tuning:
    """The values that were tried, with the last losses; the best, and the seconds of it all."""

    tried: dict[float, float]
    best: float
    seconds: float
    errors: dict[float, str]

    @property
    def at_end(self) -> bool:
        """Whether a further value might have been better."""
        return self.best in (min(self.tried), max(self.tried))


def tuned(task: Task, contender: Contender, quick: bool) -> Tuning:
    tried: dict[float, float] = {}
    errors: dict[float, str] = {}
    started = time.process_time()

    def attempt(value: float) -> None:
        run = trained(task, contender, value, 0)
        tried[value] = run.final
        if run.error:
            errors[value] = run.error

    for value in contender.values[2:3] if quick else contender.values:
        attempt(value)
    for _ in range(0 if quick else LONGER):
        best = min(tried, key=tried.__getitem__)
        if not math.isfinite(tried[best]):
            best = min(tried)
        if best not in (min(tried), max(tried)):
            break
        attempt(best * ROOT if best == max(tried) else best / ROOT)
    return Tuning(tried, min(tried, key=tried.__getitem__), time.process_time() - started, errors)


def training(task: Task, contenders: Sequence[Contender], quick: bool) -> Iterator[tuple[Rows, dict[str, Any]]]:
    """The rows of a task, and its facts: again after each contender, so that a run may be cut."""
    task = replace(task, steps=5, few=2) if quick else task
    seeds = range(1, 2 if quick else 1 + SEEDS.get(task.name, 3))
    first, rows = {}, []
    for contender in BASELINES[:2]:
        tuning = tuned(task, contender, quick)
        first[contender.name] = contender, tuning, [trained(task, contender, tuning.best, seed) for seed in seeds]
    standard, how, ends = min(first.values(), key=lambda found: median(run.final for run in found[2]))
    target = median(run.final for run in ends)
    facts = {
        "task": task.name,
        "parameters": sum(p.numel() for p in task.model(0).parameters()),
        "steps": task.steps,
        "few": task.few,
        "batch": task.batch or "all",
        "seeds": len(seeds),
        "standard": standard.name,
        "target": target,
        "judged": task.judged,
        "least": task.least,
    }
    for contender in contenders:
        if task.name not in contender.tasks:
            continue
        row = {"task": task.name, "method": contender.method, "library": contender.source}
        rows.append(row)
        if contender.missing:
            row["error"] = "missing"
            continue
        tuning = first[contender.name][1] if contender.name in first else tuned(task, contender, quick)
        own, beside = [], []
        for seed in seeds if math.isfinite(tuning.tried[tuning.best]) else ():
            pair = [(own, contender, tuning.best), (beside, standard, how.best)]
            for runs, one, value in pair if seed % 2 else reversed(pair):
                runs.append(trained(task, one, value, seed))
        row |= summary(own, beside, target, tuning)
        note(task, contender, tuning)
        yield rows, facts


def note(task: Task, contender: Contender, tuning: Tuning) -> None:
    figures = ", ".join(f"{value:.2g}: {loss:.4g}" for value, loss in sorted(tuning.tried.items()))
    print(
        f"{task.name}, {contender.name}: {figures}  ({tuning.seconds:.0f} s)", *set(tuning.errors.values()), flush=True
    )


def summary(own: list[Run], standard: list[Run], target: float, tuning: Tuning) -> dict[str, Any]:
    """Medians over the seeds, all figures they are of, and how it was tuned."""
    tried = {f"{value:.3g}": loss for value, loss in sorted(tuning.tried.items())}
    how = {"value": tuning.best, "at end": tuning.at_end, "tried": tried, "tuning seconds": tuning.seconds}
    if not own:
        return {"error": next(iter(tuning.errors.values())), **how}
    finals = [run.final for run in own]
    steps, seconds = zip(*[run.until(target) for run in own], strict=True)
    fewer = [run.steps[-1] / s for run, s in zip(standard, steps, strict=True)]
    of_time = [s / run.seconds[-1] for run, s in zip(standard, seconds, strict=True)]
    whole = [run.losses for run in own if not run.error]
    return {
        "final": median(finals),
        "least": min(finals),
        "most": max(finals),
        "judged": median(run.judged for run in own),
        "steps": median(steps),
        "seconds": median(seconds),
        "times fewer": median(fewer),
        "of the time": median(of_time),
        "ms a step": 1e3 * median(run.seconds[-1] / run.steps[-1] for run in own),
        "whole seconds": median(run.seconds[-1] for run in own),
        "failed": sum(run.error is not None for run in own),
        **how,
        "runs": {
            "final": finals,
            "judged": [run.judged for run in own],
            "steps": steps,
            "seconds": seconds,
            "times fewer": fewer,
            "of the time": of_time,
        },
        "curve": {"steps": own[0].steps, "loss": [median(losses) for losses in zip(*whole, strict=True)]},
    }
