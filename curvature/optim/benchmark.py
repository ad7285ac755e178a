"""Several optimizers on one objective, from the same start and over the same mini-batches: which of them gets further,
and what that takes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective, CurvatureError, Interrupted, NonFinite, listing
from curvature.linalg.operator import Meter
from curvature.linalg.work import Record, Work
from curvature.objective.function import cast
from curvature.objective.objective import Objective
from curvature.objective.work import work_on
from curvature.operators.engine import need_objective
from curvature.optim.optimizer import PreconditionedOptimizer
from curvature.optim.registry import OPTIMIZERS, Make
from curvature.progress import Run
from curvature.result import Quantity, Result, with_error

POINTS = 20  # at which the loss of all data is measured
HOPELESS = 1e3  # times the loss at the start: training has diverged
NAMED = ("adamw", "sgd", "soap")


@dataclass(frozen=True, kw_only=True, repr=False)
class Benchmark(Result):
    """Trainings of m optimizers with r learning rates each, and s more with the best of these.

    `tried` (m, r) are the losses at the end with each of `lrs` (r,), infinite where training diverged, and `best` (m,)
    the learning rate of the least. With it, over mini-batches in s other orders, `losses` (m, s, t) are those of all
    data after `steps` (t,) steps, `held_out` likewise of other data, and `seconds` (m, s, t) what these took: gradients
    and steps, and not the measuring. `step_seconds` (m,) are medians over steps, `state_bytes` (m,) what the optimizer
    keeps. `left_out` are those that cannot train this model, with the reason.
    """

    names: tuple[str, ...]
    lrs: Float[Tensor, " r"]
    tried: Float[Tensor, "m r"]
    best: Float[Tensor, " m"]
    steps: Tensor
    losses: Float[Tensor, "m s t"]
    seconds: Float[Tensor, "m s t"]
    step_seconds: Float[Tensor, " m"]
    state_bytes: Tensor
    held_out: Float[Tensor, "m s t"] | None = None
    left_out: tuple[str, ...] = ()

    def summary(self) -> dict[str, str]:
        rows = {"start": f"loss {float(self.losses[0, 0, 0]):.6g}"} if self.names else {}
        finals = self.quantities()
        for i in sorted(range(len(self.names)), key=lambda i: finals[self.names[i]].value):
            final, lr = finals[self.names[i]], float(self.best[i])
            lost = int((~self.tried[i].isfinite()).sum())
            ends = len(self.lrs) > 2 and lr in (float(self.lrs.min()), float(self.lrs.max()))
            texts = [
                f"lr {lr:.3g}" + (" (at the end of those tried)" if ends else ""),
                f"{1e3 * float(self.step_seconds[i]):.2g} ms a step",
                f"state {int(self.state_bytes[i]) / 2**20:.2g} MiB",
                *([] if not lost else [f"diverged with {lost} of {len(self.lrs)} rates"]),
            ]
            loss = f"loss {with_error(final.value, final.stderr, final.dof)},"
            rows[self.names[i]] = f"{loss:<30} {', '.join(texts)}"
        return rows | ({"left out": "; ".join(self.left_out)} if self.left_out else {})

    def quantities(self) -> dict[str, Quantity]:
        count = self.losses.shape[1]
        finals = zip(self.names, self.losses[..., -1], strict=True)
        return {
            name: Quantity(float(f.mean()), float(f.std()) / count**0.5 if count > 1 else 0.0, count - 1 or math.inf)
            for name, f in finals
        }

    __repr__ = Result.__str__


def benchmark(
    objective: Objective,
    optimizers: Sequence[str] | Mapping[str, Make] = NAMED,
    *,
    lrs: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    steps: int = 200,
    minibatch: int | None = 64,
    repeats: int = 3,
    held_out: Any = None,
    seed: int = 0,
    run: Run | None = None,
) -> Benchmark:
    """Train from the parameters of the objective with each of some optimizers, tuned the same, and say how far it came.

    Each is trained with every learning rate in `lrs`, on the same mini-batches, and then `repeats` times with the best
    of these, on others: the mean of the last losses has a standard error over these orders of the data, and says
    nothing about other starts. Mini-batches are those of the objective, cut to `minibatch` examples, in a new order in
    each epoch. Optimizers are names ("adamw", "sgd" with momentum 0.9, "soap", "kfac", ...), without weight decay and
    else as they are by default, or functions of a module, a learning rate and a seed. There is no schedule. Where
    training comes to numbers that are not finite, or a thousand times the first loss, it has diverged.

    The mode is that of the objective and its buffers stay as they are; the model itself is left alone. `restarted`
    gives an objective at new parameters. With a checkpoint a training is a piece of the work.

    >>> torch.manual_seed(0) and None
    >>> line, x = torch.nn.Linear(2, 1), torch.randn(100, 2)
    >>> objective = Objective.of(line, "mse", (x, x.sum(1, keepdim=True)))
    >>> found = benchmark(objective, ["sgd", "soap"], lrs=[0.01, 0.1], steps=50, repeats=2)
    >>> bool((found.losses[..., -1] < 0.01 * found.losses[..., 0]).all())
    True
    """
    need_objective("benchmark", objective)
    makes = dict(optimizers) if isinstance(optimizers, Mapping) else _named(optimizers)
    _check(makes, lrs, steps, minibatch, repeats)
    objective.check()
    track = _Track(objective, steps, minibatch, held_out)
    options = {"optimizers": list(makes), "lrs": list(lrs), "steps": steps, "minibatch": minibatch, "repeats": repeats}
    others = [track.others] if track.others is not None else []
    options |= {"held_out": [other.fingerprint["data"] for other in others]}
    work = work_on(objective, "benchmark", options=options, seed=seed, run=run, others=others)
    table = _Table(track, lrs, repeats, seed, work, len(makes))
    try:
        for name, make in makes.items():
            table.fill(name, make)
    except KeyboardInterrupt as stop:
        if not table.rows:
            raise KeyboardInterrupt from stop
        raise Interrupted(table.result(complete=False)) from stop
    return table.result(complete=True)


def restarted(objective: Objective, *, seed: int = 0) -> Objective:
    """The objective at parameters drawn anew, by the `reset_parameters` of each layer, and with buffers as at first.

    A model that draws its parameters in a way of its own starts elsewhere than here: give it as it is before training.
    BadObjective where a parameter belongs to a layer that cannot draw it.
    """
    module = copy.deepcopy(objective.function.module).cpu()
    drawn: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in module.modules():
            for name in ("reset_parameters", "_reset_parameters"):
                if callable(draw := getattr(layer, name, None)):
                    draw()
                    drawn |= {id(p) for p in layer.parameters(recurse=name.startswith("_"))}
    left = [name for name, p in module.named_parameters() if id(p) not in drawn]
    if left:
        raise BadObjective(
            f"{listing(left, 3)} belong to layers without reset_parameters, which would draw them anew.",
            "Start from the parameters as they are, or give the layers that method.",
        )
    return objective.with_state(module.state_dict())


class _Track:
    """What is the same for all: the start, the mini-batches, and where the loss is measured."""

    def __init__(self, objective: Objective, steps: int, minibatch: int | None, held_out: Any) -> None:
        self.objective, self.steps = objective, steps
        self.others = None if held_out is None else objective.on(held_out)
        fewer = objective.batches if minibatch is None else objective.batches.at_most(minibatch)
        self.parts = [part for _, part in replace(objective, batches=fewer).split()]
        self.marks = sorted({round(steps * k / POINTS) for k in range(POINTS + 1)})

    def train(self, make: Make, lr: float, seed: int) -> Record:
        """Losses and seconds at the marks, infinite from where it diverged."""
        live = self._live()
        optimizer = make(live.function.module, lr, seed)
        params = dict(live.function.module.named_parameters())
        parts = [replace(live, batches=p.batches, seed=p.seed, meter=Meter()) for p in self.parts]
        seconds, total = [], 0.0
        found = torch.full((3, len(self.marks)), math.inf, dtype=torch.float64)  # losses, held out, seconds
        order = self._order(seed)
        try:
            for place, mark in enumerate(self.marks):
                for step in range(self.marks[place - 1] if place else 0, mark):
                    seconds.append(_step(optimizer, params, parts[order[step]]))
                    total += seconds[-1]
                loss = live.value()
                if not loss < HOPELESS * abs(float(found[0, 0]) if place else math.inf):
                    break
                held_out = math.nan if self.others is None else replace(live, batches=self.others.batches).value()
                found[:, place] = torch.tensor([loss, held_out, total], dtype=torch.float64)
        except (NonFinite, torch.linalg.LinAlgError):  # no number is left to go on with: the losses stay infinite
            return self._record(found, seconds, optimizer)
        return self._record(found, seconds, optimizer)

    def _record(self, found: Float[Tensor, "3 t"], seconds: list[float], optimizer: torch.optim.Optimizer) -> Record:
        step = median(seconds) if seconds else math.nan
        return {"found": found, "numbers": torch.tensor([step, _state_bytes(optimizer)], dtype=torch.float64)}

    def _live(self) -> Objective:
        """The objective with a model of its own, at whose parameters it stays while these are trained."""
        space = self.objective.space
        module = copy.deepcopy(self.objective.function.module)
        start = cast({**self.objective.params, **self.objective.frozen}, space.device, space.dtype)
        for name, p in module.named_parameters():
            p.data, p.grad = start[name], None
            p.requires_grad_(name in self.objective.params)
        for name, buffer in module.named_buffers():
            buffer.data = self.objective.buffers[name].clone()
        tensors = {name: p.detach() for name, p in module.named_parameters()}  # the same memory
        return replace(
            self.objective,
            function=replace(self.objective.function, module=module),
            params={name: tensors[name] for name in self.objective.params},
            frozen={name: t for name, t in tensors.items() if name not in self.objective.params},
        )

    def _order(self, seed: int) -> list[int]:
        generator, count = torch.Generator().manual_seed(seed), len(self.parts)
        epochs = -(-self.steps // count)
        return torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)]).tolist()


class _Table:
    """The trainings so far, an optimizer a row."""

    def __init__(
        self, track: _Track, lrs: Sequence[float], repeats: int, seed: int, work: Work, optimizers: int
    ) -> None:
        self.track, self.lrs, self.repeats, self.seed, self.work = track, lrs, repeats, seed, work
        self.each = len(lrs) + repeats
        self.done, self.total = 0, optimizers * self.each
        self.rows: dict[str, tuple[list[Record], int, list[Record]]] = {}
        self.left_out: list[str] = []

    def fill(self, name: str, make: Make) -> None:
        """Train with an optimizer."""
        try:
            tried = [self._trained(name, make, lr, self.seed) for lr in self.lrs]
            finals = [float(record["found"][0, -1]) for record in tried]
            best = min(range(len(finals)), key=finals.__getitem__)
            rate = self.lrs[best]
            again = [self._trained(name, make, rate, self.seed + 1 + place) for place in range(self.repeats)]
        except CurvatureError as reason:
            self.left_out.append(f"{name}: {reason}")
            return
        self.rows[name] = tried, best, again

    def _trained(self, name: str, make: Make, lr: float, seed: int) -> Record:
        record = self.work.piece(lambda: self.track.train(make, lr, seed))
        self.done += 1
        note = f"{name}, lr {lr:g}: loss {float(record['found'][0, -1]):.4g}"
        self.work.report(self.done, self.total, note, "trainings")
        return {key: tensor.cpu() for key, tensor in record.items()}

    def result(self, *, complete: bool) -> Benchmark:
        rows = list(self.rows.values())
        if not rows:
            raise BadObjective("No optimizer can train this model.", f"Choose others: {'; '.join(self.left_out)}")
        found = torch.stack(
            [torch.stack([record["found"] for record in again]) for _, _, again in rows]
        )  # (m, s, 3, t)
        numbers = torch.stack([torch.stack([record["numbers"] for record in again]) for _, _, again in rows])
        return Benchmark(
            names=tuple(self.rows),
            lrs=torch.tensor(list(self.lrs), dtype=torch.float64),
            tried=torch.stack([torch.stack([record["found"][0, -1] for record in tried]) for tried, _, _ in rows]),
            best=torch.tensor([self.lrs[best] for _, best, _ in rows], dtype=torch.float64),
            steps=torch.tensor(self.track.marks),
            losses=found[:, :, 0].contiguous(),
            seconds=found[:, :, 2].contiguous(),
            step_seconds=numbers[..., 0].median(1).values,
            state_bytes=numbers[:, 0, 1].long(),
            held_out=None if self.track.others is None else found[:, :, 1].contiguous(),
            left_out=tuple(self.left_out),
            complete=complete,
            cost=self.work.cost,
            origin=self.work.origin,
        )


def _step(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], part: Objective) -> float:
    """Take one step on a mini-batch; its seconds."""
    started = time.perf_counter()
    for name, gradient in part.space.named(part.gradient()).items():
        params[name].grad = gradient
    if isinstance(optimizer, PreconditionedOptimizer):
        optimizer.step(objective=part)
    else:
        optimizer.step()
    return time.perf_counter() - started


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the tensors of the state take; views of one storage count once."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _named(names: Sequence[str]) -> dict[str, Make]:
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise ValueError(f"optimizers are some of {listing(list(OPTIMIZERS), 30)}, but got {listing(unknown)}.")
    return {name: OPTIMIZERS[name] for name in names}


def _check(makes: Mapping[str, Make], lrs: Sequence[float], steps: int, minibatch: int | None, repeats: int) -> None:
    if not makes or not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise ValueError(f"Expected an optimizer and positive learning rates, but got {list(makes)} and {list(lrs)}.")
    if steps < 1 or repeats < 1 or (minibatch is not None and minibatch < 1):
        raise ValueError(
            f"Expected steps, repeats and minibatch of 1 at least, but got {steps}, {repeats} and {minibatch}."
        )
