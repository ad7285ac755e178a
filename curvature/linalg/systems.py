"""Many linear systems at once, in lockstep: which of them go on, and what is known of each.

A step is one product with a block of vectors (one pass over the data); what has converged is multiplied no more.
Residuals are recomputed with fresh products before anything is called solved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import Interrupted, NonFinite, NotConverged
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import Space
from curvature.linalg.structured import LowRank
from curvature.result import Quantity, Result

LOOK = 50  # steps after which residuals are recomputed
DRIFTED = 2.0  # times as large as thought they have to be made anew
NOISY = 0.1  # of a residual: what the rounding of a step may be
STALLED = 0.5  # a residual that is recomputed again and is not below this share of the last one will not fall further


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Result):
    """x of (A + damping I) x = b, in the shape of b: (n,), or (n, k) for as many right-hand sides.

    `residuals` (k,) are the norms |b - (A + damping I) x| / |b|, recomputed with fresh products (after an interrupt, as
    the recurrence has them); `converged`: which are below the tolerance; `steps` (k,) those that were done for each.
    `curvature` (k,) is the smallest p.(A + damping I)p / p.p of the directions p that were multiplied: where it is not
    positive the matrix is not positive definite, and conjugate gradients stopped there with what they had. It is no
    smaller than the smallest eigenvalue. Of least squares all this is said of their own system,
    (A^T A + damping I) x = A^T b.

    `energy` (k,) is b . x, which of a gradient b is the square of the Newton decrement: twice what the quadratic model
    falls by the step -x (Boyd & Vandenberghe 2004, 9.5.1). None of least squares.
    """

    x: Tensor
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    steps: Tensor
    curvature: Float[Tensor, " k"]
    energy: Float[Tensor, " k"] | None = None
    recycled_values: Tensor | None = None
    recycled_vectors: Tensor | None = None

    @property
    def recycled(self) -> LowRank | None:
        """What the directions that were kept tell of A, psd and of low rank; None where none were."""
        if self.recycled_values is None or self.recycled_vectors is None:
            return None
        source = {"operator": "recycled", "rank": len(self.recycled_values), "of": self.origin.operator}
        return LowRank(self.recycled_values, self.recycled_vectors, source=source)

    def summary(self) -> dict[str, str]:
        count = len(self.residuals)
        done = int(self.converged.sum())
        met = int((self.curvature <= 0).sum())
        return {
            "solved": f"{done} of {count} right-hand sides" if count != 1 else "yes" if done else "no",
            "residual": f"{float(self.residuals.max()) if count else 0.0:.1e} of the right-hand side",
            "steps": str(int(self.steps.max()) if count else 0),
            **({"norm of x": f"{float(self.x.norm()):.6g}"} if count == 1 else {}),
            **({"b . x": f"{float(self.energy):.6g}"} if count == 1 and self.energy is not None else {}),
            **({"negative curvature": f"met {met} times, down to {float(self.curvature.min()):.3g}"} if met else {}),
            **({} if self.recycled_values is None else {"recycled": f"rank {len(self.recycled_values)}"}),
        }

    def quantities(self) -> dict[str, Quantity]:
        if not len(self.residuals):
            return {}
        found = {"residual": float(self.residuals.max()), "steps": float(self.steps.max())}
        if self.energy is not None and len(self.energy) == 1:
            found |= {"energy": float(self.energy), "norm": float(self.x.norm())}
        return {name: Quantity(value) for name, value in found.items()}

    __repr__ = Result.__str__


class Systems:
    """Right-hand sides as rows, and for each what has been found. Subclasses take the steps.

    `active` are the indices of those that go on; what a method keeps of each (`kept`) has a row for every one of them.
    Residuals are relative to those of x = 0.
    """

    kept: tuple[str, ...] = ()
    beyond_rounding: str  # what to do about residuals that rounding keeps from falling

    def __init__(self, measurement: Measurement, b: Tensor, rtol: float, max_steps: int) -> None:
        A = measurement.operator
        self.measurement, self.rtol, self.max_steps = measurement, rtol, max_steps
        self.space: Space = A.domain
        self.shape = b.shape
        rows = (b.unsqueeze(0) if b.ndim == 1 else b.T).detach().to(A.device, A.dtype)
        self.unit = _binades(rows)
        self.b = (rows / self.unit).contiguous()
        count, device = len(rows), rows.device
        self.x = torch.zeros(count, self.space.size, dtype=A.dtype, device=device)  # in units of b
        self.lengths = torch.ones(count, dtype=torch.float64, device=device)  # of the residuals of x = 0
        self.residuals = self.b.any(1).double()  # of x, recomputed where `known`, else by recurrence
        self.known = torch.ones(count, dtype=torch.bool, device=device)
        self.steps = torch.zeros(count, dtype=torch.long, device=device)
        self.curvature = torch.full((count,), float("inf"), dtype=torch.float64, device=device)
        self.recomputed = torch.full((count,), float("inf"), dtype=torch.float64, device=device)  # the last time
        self.active = self.b.any(1).nonzero().flatten()

    def solved(self) -> Solution:
        """What there is when no system goes on; NotConverged where a tolerance was not met."""
        try:
            self.iterate()
            solution = self.solution(complete=True)
        except KeyboardInterrupt as stop:
            raise Interrupted(self.solution(complete=False)) from stop
        left = ~solution.converged
        if self.rtol and bool(left.any()):
            which = f"{int(left.sum())} of {len(left)} systems" if len(left) > 1 else "The system"
            cause, fix = self.excuse(left.to(self.x.device)) or self._unfinished(solution, left)
            raise NotConverged(f"{which} {cause}", fix, solution=solution)
        return solution

    def iterate(self) -> None:
        """Take steps until all systems are solved, or have to stop."""
        if not len(self.active):
            return
        first = self.completed(self.b[self.active])
        lengths = self.norms(first)
        self.lengths[self.active], self.residuals[self.active] = lengths.where(lengths > 0, 1.0), (lengths > 0).double()
        self._drop(self.start(first))
        for step in range(1, self.max_steps + 1):
            if not len(self.active):
                break
            advance, norms, stopped = self.step()
            residuals = norms / self.lengths[self.active]
            self.x[self.active] += advance
            self.residuals[self.active], self.known[self.active] = residuals, False
            self.steps[self.active] += 1
            note = f"residual {float(residuals.max()):.1e}, {len(self.active)} to go"
            self.measurement.report(step, self.max_steps, note)
            self._retire(stopped, (residuals <= self.rtol) & ~stopped)
            if step % LOOK == 0 and len(self.active):
                self._look()
        self._recompute((~self.known).nonzero().flatten())
        self.finish()

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        """The matrix of the systems times each row."""
        raise NotImplementedError

    def completed(self, left: Float[Tensor, "k m"]) -> Float[Tensor, "k l"]:
        """What is left of the right-hand sides, with the residuals for its last n columns."""
        raise NotImplementedError

    def start(self, left: Float[Tensor, "a l"]) -> Bool[Tensor, " a"]:
        """Begin, or begin again, with the active systems from what is left of them; returns which cannot."""
        raise NotImplementedError

    def step(self) -> tuple[Float[Tensor, "a n"], Float[Tensor, " a"], Bool[Tensor, " a"]]:
        """What to add to x of the active systems, the norms of the residuals then, and which cannot go on."""
        raise NotImplementedError

    def finish(self) -> None:
        """Look over what there is in the end."""

    def energy(self) -> Float[Tensor, " k"] | None:
        """b . x of each, in units of b, where the system is that of b."""
        return None

    def recycled(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Eigenvalues and eigenvectors of what the directions tell of A, where they were kept."""
        return None, None

    def excuse(self, left: Bool[Tensor, " k"]) -> tuple[str, str] | None:
        """What this method alone knows of why these were not solved, and what to do."""

    def solution(self, *, complete: bool) -> Solution:
        """What there is."""
        x, energy = self.x * self.unit, self.energy()
        values, vectors = self.recycled()
        return Solution(
            x=x[0] if len(self.shape) == 1 else x.T,
            residuals=self.residuals.cpu(),
            converged=(self.known & (self.residuals <= self.rtol)).cpu(),
            steps=self.steps.cpu(),
            curvature=self.curvature.cpu(),
            energy=None if energy is None else (energy * self.unit[:, 0].double().square()).cpu(),
            recycled_values=values,
            recycled_vectors=vectors,
            complete=complete,
            cost=self.measurement.cost,
            origin=self.measurement.origin,
        )

    def _unfinished(self, solution: Solution, left: Bool[Tensor, " k"]) -> tuple[str, str]:
        """That rounding came first, or the end of the steps."""
        residual = f"a relative residual of {float(solution.residuals[left].max()):.1e}"
        if int(solution.steps[left].max()) < self.max_steps:
            return f"came to {residual}, as far as {solution.x.dtype} goes.", self.beyond_rounding
        fix = "Raise max_steps, rtol or the damping, or give a preconditioner; this error holds the `solution` so far."
        return f"had {residual} after {self.max_steps} steps.", fix

    def norms(self, left: Float[Tensor, "k l"]) -> Float[Tensor, " k"]:
        """How long the residuals are."""
        return self.space.norms(left[:, -self.space.size :])

    def _recompute(self, which: Tensor) -> Float[Tensor, "w l"]:
        """What is left of those systems, with fresh products."""
        if not len(which):
            return self.b[:0]
        left = self.completed(self.b[which] - self.apply(self.x[which]))
        self.residuals[which], self.known[which] = self.norms(left) / self.lengths[which], True
        return left

    def _drop(self, gone: Bool[Tensor, " a"]) -> None:
        if bool(gone.any()):
            self.active = self.active[~gone]
            for name in self.kept:
                setattr(self, name, getattr(self, name)[~gone])

    def _retire(self, stopped: Bool[Tensor, " a"], solved: Bool[Tensor, " a"]) -> None:
        """Drop what cannot go on, and what is solved when looked at; what only seemed so begins again from there."""
        seemed = self.active[solved]
        left = self._recompute(seemed)
        true = self.residuals[seemed]
        over = (true <= self.rtol) | (true > STALLED * self.recomputed[seemed])  # no better: the rest is rounding
        self.recomputed[seemed] = true
        gone = stopped.clone()
        gone[solved] = over
        self._drop(gone)
        if not bool(over.all()):
            self._restart(torch.isin(self.active, seemed[~over]), left[~over])

    def _look(self) -> None:
        """Begin again where the recurrence has lost the residual."""
        thought = self.residuals[self.active]
        left = self._recompute(self.active)
        lost = self.residuals[self.active] > DRIFTED * thought
        if bool(lost.any()):
            self._restart(lost, left[lost])

    def _restart(self, which: Bool[Tensor, " a"], left: Float[Tensor, "r l"]) -> None:
        """Begin again with some of the active systems, from their x."""
        active, others = self.active, {name: getattr(self, name) for name in self.kept}
        self.active, gone = active[which], torch.zeros_like(which)
        gone[which] = self.start(left)
        for name, values in others.items():
            values[which] = getattr(self, name)
            setattr(self, name, values)
        self.active = active
        self._drop(gone)


def check(A: LinearOperator, b: Tensor, damping: float, rtol: float, max_steps: int) -> None:
    """Refuse what makes no systems of A x = b, or no end of them."""
    m = A.shape[0]
    if not isinstance(b, Tensor) or b.ndim not in (1, 2) or len(b) != m or not b.is_floating_point():
        shown = f"{tuple(b.shape)} of {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b is one right-hand side ({m},) or many ({m}, k) of real numbers, but got {shown}.")
    if not torch.isfinite(b.to(A.dtype)).all():
        raise NonFinite(f"The right-hand side has entries that are not finite in {A.dtype}.", "Look where it was made.")
    if not 0 <= rtol < 1 or not isinstance(max_steps, Integral) or max_steps < 1 or not math.isfinite(damping):
        raise ValueError(
            "Expected 0 <= rtol < 1, max_steps >= 1, a whole number, and a finite damping, "
            f"but got {rtol}, {max_steps} and {damping}."
        )


def _binades(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k 1"]:
    """The power of two at or below the largest entry of each row, or 1: divided by it, and that rounds nothing, rows
    are of lengths whose squares are neither too large nor too small."""
    largest = rows.abs().amax(1, keepdim=True).double()
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest > 0, largest / (2 * mantissa), 1.0).to(rows.dtype)


def column(values: Float[Tensor, " a"], like: Tensor) -> Float[Tensor, "a 1"]:
    """A factor for each row of what it is `like`."""
    return values.to(like.dtype).unsqueeze(1)
