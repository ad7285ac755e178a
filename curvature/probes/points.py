"""The loss at many points of the parameter space, in as few passes over the data and as few calls as is fast.

No derivatives are asked for, so that any model will do; what is not finite is returned as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from curvature.linalg.work import Work
from curvature.objective.batches import leading
from curvature.objective.losses import accuracy_of
from curvature.objective.objective import Objective
from curvature.objective.operations import Program
from curvature.objective.passes import Passes, Sums
from curvature.objective.work import work_on
from curvature.probes.together import Together
from curvature.progress import Run

Norm = Literal["frozen", "recalibrated", "batch"]

AT_ONCE = 64  # points between two looks at who wants to stop, and between two records of a checkpoint
BLOCK = 1 << 26  # entries of points that are held at once: 256 MiB in float32


class Points:
    """What an objective is at points of its space: its loss and, if asked for, the share of right answers; then the
    same of other data, `held_out`.

    `norm` says what batch normalisation does away from the parameters: "frozen" keeps the statistics that the model has
    learned, "recalibrated" takes those of the objective's data, anew at every point, and "batch" those of each batch,
    as in training. Batches and points are computed together where tensors are so small that calls are what takes time
    (curvature.probes.together).
    """

    def __init__(
        self, objective: Objective, *, norm: Norm = "frozen", accuracy: bool = False, held_out: Any = None
    ) -> None:
        if norm not in ("frozen", "recalibrated", "batch"):
            raise ValueError(f"norm is 'frozen', 'recalibrated' or 'batch', but got {norm!r}.")
        self.norm: Norm = norm
        self.objective = objective.in_mode("train") if norm == "batch" else objective
        self.others = [] if held_out is None else [self.objective.on(held_out)]
        self.recalibrated = norm == "recalibrated" and bool(_normalisations(objective))
        self.right = accuracy_of(objective.loss) if accuracy else None

    @property
    def names(self) -> list[str]:
        """What the values at a point are, in order."""
        own = ["loss"] if self.right is None else ["loss", "accuracy"]
        return [*own, *(f"held_out_{name}" for _ in self.others for name in own)]

    def __call__(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        """The values at each row, in float64."""
        space = self.objective.space
        rows = rows.to(space.device, space.dtype).contiguous()
        if self.recalibrated:
            return torch.cat([self._at(row, [each.objective for each in self._together]) for row in rows])
        return torch.cat([self._means(*each(rows), rows) for each in self._together], dim=1)

    def alone(self, row: Float[Tensor, " n"]) -> Float[Tensor, "1 m"]:
        """Those at one point, computed as the value of the objective is."""
        return self._at(row, [self.objective, *self.others])

    def work(self, question: str, options: Mapping[str, Any], run: Run | None, seed: int | None = None) -> Work:
        """Work on a question that these values answer."""
        others = [other.fingerprint["data"] for other in self.others]
        own = {"norm": self.norm, "accuracy": self.right is not None, "held_out": others}
        return work_on(self.objective, question, options={**options, **own}, seed=seed, run=run, others=self.others)

    def nothing(self, count: int) -> Float[Tensor, "count m"]:
        """Room for the values at so many points, not-a-number until `fill` comes."""
        return torch.full((count, len(self.names)), torch.nan, dtype=torch.float64)

    def fill(self, found: Float[Tensor, "c m"], work: Work, rows: Callable[[slice], Float[Tensor, "k n"]]) -> None:
        """Write the values at c points into `found`, those of a slice of them at a time: a piece of the work each."""
        step = max(1, min(AT_ONCE, BLOCK // self.objective.space.size))
        for start in range(0, len(found), step):
            some = slice(start, min(start + step, len(found)))
            for each in self._together:
                each.expect(len(found) - start)
            found[some] = work.piece(lambda some=some: {"values": self(rows(some))})["values"].cpu()
            work.report(some.stop, len(found), unit="points")

    @cached_property
    def _together(self) -> list[Together]:
        """The objectives, made for many points."""
        return [Together(objective, self._program(objective)) for objective in (self.objective, *self.others)]

    def _at(self, row: Float[Tensor, " n"], objectives: list[Objective]) -> Float[Tensor, "1 m"]:
        """The values of these objectives at one point."""
        if self.recalibrated:
            fresh = statistics(self.objective, row)
            objectives = [replace(o, buffers={**o.buffers, **fresh}) for o in objectives]
        return torch.cat([self._alone(objective, row) for objective in objectives], dim=1)

    def _alone(self, objective: Objective, row: Float[Tensor, " n"]) -> Float[Tensor, "1 m"]:
        program = self._program(objective)
        sums, terms = Passes(objective).total(lambda batch: program(row, batch).detach().double())
        return self._means(sums[None], terms, row[None])

    def _means(self, sums: Float[Tensor, "k s"], terms: float, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        loss = sums[:, 0] / terms + self.objective.penalty(rows)
        return torch.stack([loss, *([] if self.right is None else [sums[:, 1] / sums[:, 2]])], dim=1)

    def _program(self, objective: Objective) -> Program:
        """The loss summed over the terms of a batch, right answers and all, at one point."""
        named, right = objective.space.named, self.right

        def program(row: Float[Tensor, " n"], batch: Any) -> Float[Tensor, " s"]:
            if right is None:
                return objective.total(named(row), batch).reshape(1)
            outputs, targets = objective.outputs(named(row), batch)
            total = objective.loss.total(outputs, targets)
            return torch.stack([total, *(count.to(total.dtype) for count in right(outputs, targets))])

        return program


def statistics(objective: Objective, row: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """The means and variances that batch normalisations have on the data at a point: averages over its batches, each by
    its number of examples.

    A layer moves its statistics towards those of a batch, by its momentum: from zeros that leaves their multiple.
    """
    training, momenta = objective.in_mode("train"), _normalisations(objective)
    kept = {name: tensor for name, tensor in objective.buffers.items() if name in momenta}
    counts = {name: t for name, t in objective.buffers.items() if name.endswith("num_batches_tracked")}

    def see(batch: Any) -> Sums:
        fresh = {name: torch.zeros_like(tensor) for name, tensor in {**kept, **counts}.items()}
        training.function.total({**training.complete(training.space.named(row)), **fresh}, batch)
        size = float(leading(batch) or 1)
        return Sums({name: fresh[name].double() * (size / momenta[name]) for name in kept} | {"": torch.tensor(size)})

    sums, _ = Passes(training).total(see)
    return {name: (sums[name] / sums[""]).to(tensor.dtype) for name, tensor in kept.items()}


def _normalisations(objective: Objective) -> dict[str, float]:
    """The momentum of every running statistic of batch normalisation, by the name of its buffer."""
    return {
        f"{path}.{name}".lstrip("."): layer.momentum or 1.0
        for path, layer in objective.function.module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
        for name in ("running_mean", "running_var")
    }
