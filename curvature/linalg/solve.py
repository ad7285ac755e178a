"""Linear systems (A + damping I) x = b with a matrix that is known by its products.

All right-hand sides advance in lockstep, so a step is one product with a block of vectors (one pass over the data);
what has converged is multiplied no more. Residuals are recomputed with fresh products before anything is called solved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import Interrupted, NonFinite, NotConverged
from curvature.linalg.krylov import Krylov
from curvature.linalg.measurement import Measurement, describe
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.linalg.space import Space
from curvature.progress import Run
from curvature.result import Result

SolveMethod = Literal["auto", "cg", "minres", "neumann"]

LANCZOS = 10  # steps to the largest eigenvalue
DIVERGED = 5  # steps in a row in which a residual grows
LOOK = 50  # steps after which residuals are recomputed
DRIFTED = 2.0  # times as large as thought they have to be made anew
JUMP = 4.0  # times the last x that was looked at: one that long is looked at
NOISY = 0.1  # of a residual: what the rounding of a step may be
STALLED = 0.5  # a residual that is recomputed again and is not below this share of the last one will not fall further


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Result):
    """x of (A + damping I) x = b, in the shape of b: (n,), or (n, k) for as many right-hand sides.

    `residuals` (k,) are the norms |b - (A + damping I) x| / |b|, recomputed with fresh products (after an interrupt, as
    the recurrence had them before); `converged`: which are below the tolerance; `steps` (k,) those that were done for
    each. `curvature` (k,) is the smallest p.(A + damping I)p / p.p of the directions p that were multiplied: where it
    is not positive the matrix is not positive definite, and conjugate gradients stopped there with what they had. It is
    no smaller than the smallest eigenvalue.
    """

    x: Tensor
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    steps: Tensor
    curvature: Float[Tensor, " k"]

    def summary(self) -> dict[str, str]:
        count = len(self.residuals)
        done = int(self.converged.sum())
        met = int((self.curvature <= 0).sum())
        return {
            "solved": f"{done} of {count} right-hand sides" if count > 1 else "yes" if done else "no",
            "residual": f"{float(self.residuals.max()) if count else 0.0:.1e} of the right-hand side",
            "steps": str(int(self.steps.max()) if count else 0),
            **({"negative curvature": f"met {met} times, down to {float(self.curvature.min()):.3g}"} if met else {}),
        }

    __repr__ = Result.__str__


def solve(
    A: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    method: SolveMethod = "auto",
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    max_steps: int = 500,
    run: Run | None = None,
) -> Solution:
    """x with (A + damping I) x = b, for symmetric A and one right-hand side (n,) or many (n, k).

    Until every residual is below `rtol` times its right-hand side; raises NotConverged, which holds the Solution, where
    `max_steps` or rounding come first. `rtol=0` does `max_steps` steps, or as many as rounding allows, and raises
    nothing: a truncated solve inverts the large eigenvalues only, and its number of steps is a regulariser of its own.

    - "cg", conjugate gradients (the "auto" where A is psd), takes the fewest products. It is for positive definite
      matrices: where it meets a direction of negative curvature that system ends, and says so.
    - "minres" (the "auto" for others) is for indefinite ones too. Where A is that, x is no direction of descent.
    - "neumann" is the truncated series: steps of gradient descent on the quadratic from 0, of the length that one over
      the largest eigenvalue gives, which is found first. It is what differentiating through as many training steps
      gives; as a solver it is slow, and diverges where an eigenvalue is negative.

    `preconditioner`, positive definite, is about the inverse of A + damping I: `inverse(kfac(objective), damping=mu)`,
    `inverse(nystrom(A, damping=mu), damping=mu)`. It changes the number of steps, and what they aim for until the end.

    Hestenes & Stiefel 1952; Paige & Saunders 1975 (SIAM J. Numer. Anal. 12); Lorraine, Vicol & Duvenaud 2020
    (arXiv:1911.02590).

    >>> from curvature.linalg.structured import Diagonal
    >>> solve(Diagonal(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 2.0]), damping=1.0).x
    tensor([1.0000, 0.5000])
    """
    A = as_operator(A)
    preconditioner = None if preconditioner is None else as_operator(preconditioner)
    _check(A, b, damping, method, preconditioner, rtol, max_steps)
    if method == "auto":
        method = "cg" if A.psd and damping >= 0 else "minres"
    options = {"damping": damping, "method": method, "rtol": rtol, "max_steps": max_steps}
    options |= {"preconditioner": None if preconditioner is None else describe(preconditioner)}
    rows = (b.unsqueeze(0) if b.ndim == 1 else b.T).detach().to(A.device, A.dtype, copy=True).contiguous()
    measurement = Measurement(A, "solve", options=options, run=run)
    systems = METHODS[method](measurement, rows, damping, preconditioner, rtol, max_steps)
    try:
        systems.iterate()
        solution = systems.solution(complete=True, shape=b.shape)
    except KeyboardInterrupt as stop:
        raise Interrupted(systems.solution(complete=False, shape=b.shape)) from stop
    if rtol and not solution.converged.all():
        raise _unsolved(solution, systems, A)
    return solution


class Systems:
    """Right-hand sides as rows, and for each what has been found. Subclasses take the steps.

    `active` are the indices of those that go on; what a method keeps of each (`kept`) has a row for every one of them.
    """

    kept: tuple[str, ...] = ()

    def __init__(
        self,
        measurement: Measurement,
        rows: Float[Tensor, "k n"],
        damping: float,
        preconditioner: LinearOperator | None,
        rtol: float,
        max_steps: int,
    ) -> None:
        self.measurement, self.damping, self.preconditioner = measurement, damping, preconditioner
        self.rtol, self.max_steps = rtol, max_steps
        self.space: Space = measurement.operator.domain
        self.b, self.x = rows, torch.zeros_like(rows)
        count, device = len(rows), rows.device
        self.lengths = self.space.norms(rows)
        self.residuals = self.lengths.clone()  # of x, recomputed where `known`, else by recurrence
        self.known = torch.ones(count, dtype=torch.bool, device=device)  # x = 0 leaves b
        self.steps = torch.zeros(count, dtype=torch.long, device=device)
        self.curvature = torch.full((count,), float("inf"), dtype=torch.float64, device=device)
        self.recomputed = torch.full((count,), float("inf"), dtype=torch.float64, device=device)  # the last time
        self.active = (self.lengths > 0).nonzero().flatten()
        self.scale = torch.zeros_like(self.lengths)  # the longest product of a unit vector: a lower bound of a norm
        self.flat = torch.zeros_like(self.known)  # which came to a direction without positive curvature

    def iterate(self) -> None:
        """Take steps until all systems are solved, or have to stop."""
        if not len(self.active):
            return
        self.start(self.b[self.active])
        for step in range(1, self.max_steps + 1):
            norms, stopped = self.step()
            self.steps[self.active] += 1
            self.residuals[self.active], self.known[self.active] = norms, False
            worst = float((self.residuals / self.lengths)[self.active].max())
            self.measurement.report(step, self.max_steps, f"residual {worst:.1e}, {len(self.active)} to go")
            solved = norms <= self.rtol * self.lengths[self.active]
            self._retire(stopped, solved & ~stopped)
            if not len(self.active):
                break
            if step % LOOK == 0:
                self._look()
        self._recompute((~self.known).nonzero().flatten())
        self.finish()

    def finish(self) -> None:
        """Look over what there is in the end."""

    def start(self, residuals: Float[Tensor, "a n"]) -> None:
        """Begin, or begin again, with the active systems from their x."""
        raise NotImplementedError

    def step(self) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
        """Improve x of the active systems; returns the norms of their residuals, and which cannot go on."""
        raise NotImplementedError

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """(A + damping I) times each row."""
        return self.measurement.apply(rows) + self.damping * rows

    def precondition(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        if self.preconditioner is None:
            return rows
        product = self.preconditioner.apply(rows)
        if not bool(torch.isfinite(product).all()):
            raise NonFinite(f"A product with the preconditioner {self.preconditioner!r} is not finite.", "Look there.")
        return product

    def curve(self, p: Float[Tensor, "a n"], q: Float[Tensor, "a n"]) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
        """p.q for products q of the directions p, and which are zero or negative but for rounding; the smallest
        curvature is kept."""
        lengths, images, bend = self.space.norms(p), self.space.norms(q), self.space.diagonal(p, q)
        self.scale[self.active] = torch.maximum(self.scale[self.active], images / lengths)
        self.curvature[self.active] = torch.minimum(self.curvature[self.active], bend / lengths.square())
        return bend, bend <= self.space.eps * lengths * images

    def noisy(
        self, length: Float[Tensor, " a"], d: Float[Tensor, "a n"], residuals: Float[Tensor, " a"]
    ) -> Bool[Tensor, " a"]:
        """Which steps are so long, along what rounding has left of a direction, that theirs is in the way of residuals
        of these norms."""
        step = length.abs() * self.space.norms(d)
        return self.space.eps * self.scale[self.active] * step > NOISY * residuals

    def solution(self, *, complete: bool, shape: torch.Size) -> Solution:
        """What there is."""
        residuals = torch.where(self.lengths > 0, self.residuals / self.lengths.clamp(min=1e-300), 0.0)
        return Solution(
            x=self.x[0] if len(shape) == 1 else self.x.T,
            residuals=residuals.cpu(),
            converged=(self.known & (residuals <= self.rtol)).cpu(),
            steps=self.steps.cpu(),
            curvature=self.curvature.cpu(),
            complete=complete,
            cost=self.measurement.cost,
            origin=self.measurement.origin,
        )

    def _recompute(self, which: Tensor) -> Float[Tensor, "w n"]:
        """The residuals of those systems, with fresh products."""
        if not len(which):
            return self.b[:0]
        fresh = self.b[which] - self.apply(self.x[which])
        self.residuals[which], self.known[which] = self.space.norms(fresh), True
        return fresh

    def _retire(self, stopped: Bool[Tensor, " a"], solved: Bool[Tensor, " a"]) -> None:
        """Drop what cannot go on, and what is solved when looked at; what only seemed so begins again from there."""
        seemed = self.active[solved]
        fresh = self._recompute(seemed)
        true = self.residuals[seemed]
        over = true <= self.rtol * self.lengths[seemed]
        over |= true > STALLED * self.recomputed[seemed]  # no better than the last time: the rest is rounding
        self.recomputed[seemed] = true
        gone = stopped.clone()
        gone[solved] = over
        if bool(gone.any()):
            self.active = self.active[~gone]
            for name in self.kept:
                setattr(self, name, getattr(self, name)[~gone])
        if not bool(over.all()):
            self._restart(torch.isin(self.active, seemed[~over]), fresh[~over])

    def _look(self) -> None:
        """Begin again where the recurrence has lost the residual."""
        thought = self.residuals[self.active]
        fresh = self._recompute(self.active)
        lost = self.residuals[self.active] > DRIFTED * thought
        if bool(lost.any()):
            self._restart(lost, fresh[lost])

    def _restart(self, which: Bool[Tensor, " a"], residuals: Float[Tensor, "r n"]) -> None:
        """Begin again with some of the active systems, from their x."""
        active, others = self.active, {name: getattr(self, name) for name in self.kept}
        self.active = active[which]
        self.start(residuals)
        for name, values in others.items():
            values[which] = getattr(self, name)
            setattr(self, name, values)
        self.active = active


class ConjugateGradients(Systems):
    """Conjugate gradients: in every step the best x in the A-norm on the Krylov space of the residual."""

    kept = ("r", "p", "rho")
    r: Tensor  # residuals
    p: Tensor  # directions
    rho: Tensor  # r . M r

    def start(self, residuals: Float[Tensor, "a n"]) -> None:
        self.r = residuals
        self.p = self.precondition(residuals).clone()
        self.rho = _positive(self.space.diagonal(self.r, self.p))

    def step(self) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space = self.space
        q = self.apply(self.p)
        bend, flat = self.curve(self.p, q)
        ratio = torch.where(flat, 0.0, self.rho / torch.where(flat, 1.0, bend))
        flat |= self.noisy(ratio, self.p, space.norms(self.r))
        self.flat[self.active] = flat
        length = _column(torch.where(flat, 0.0, ratio), q)
        self.x[self.active] += length * self.p
        self.r = self.r - length * q
        z = self.precondition(self.r)
        rho = _positive(space.diagonal(self.r, z))
        self.p = z + _column(rho / self.rho, z) * self.p
        self.rho = rho
        return space.norms(self.r), flat | (rho == 0)


class Minres(Systems):
    """Minimal residuals: Lanczos, and a QR factorisation of its tridiagonal matrix, updated by a column a step."""

    kept = ("r", "v", "before", "y", "beta", "last_beta", "phi", "d", "last_d")
    kept += ("turn", "last_turn", "largest", "vouched")
    r: Tensor  # residuals of x
    v: Tensor  # the Lanczos vector, beta long in the metric of the preconditioner M
    before: Tensor  # the one before it
    y: Tensor  # M v
    beta: Tensor
    last_beta: Tensor  # 0 at the start
    phi: Tensor  # how long r is in that metric, with a sign
    d: Tensor  # the last two directions of x
    last_d: Tensor
    turn: Tensor  # (a, 2) cosine and sine of the last two rotations
    last_turn: Tensor
    largest: Tensor  # entry of the tridiagonal matrix
    vouched: Tensor  # the length of the last x whose residual was looked at

    def start(self, residuals: Float[Tensor, "a n"]) -> None:
        self.r = self.v = residuals
        self.y = self.precondition(residuals)
        self.before, self.d, self.last_d = (torch.zeros_like(residuals) for _ in range(3))
        self.beta = self.phi = _positive(self.space.diagonal(self.v, self.y)).sqrt()
        self.last_beta = torch.zeros_like(self.beta)
        self.turn = self.last_turn = torch.stack([torch.ones_like(self.beta), self.last_beta], dim=1)
        self.largest = torch.zeros_like(self.beta)
        self.vouched = self.space.norms(self.x[self.active])

    def step(self) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space, tiny = self.space, 1e-300
        unit = self.y / _column(self.beta, self.y)
        fresh = self.apply(unit)
        self.curve(unit, fresh)
        coupling = torch.where(self.last_beta > 0, self.beta, 0.0)
        fresh = fresh - _column(coupling / self.last_beta.clamp(min=tiny), fresh) * self.before
        alpha = space.diagonal(unit, fresh)
        fresh = fresh - _column(alpha / self.beta, fresh) * self.v
        y = self.precondition(fresh)
        beta = _positive(space.diagonal(fresh, y)).sqrt()
        self.largest = torch.stack([self.largest, alpha.abs(), beta, coupling]).amax(0)
        # the new column (coupling, alpha, beta) of the tridiagonal matrix, turned twice, and then so that beta vanishes
        (far_cos, far_sin), (cos, sin) = self.last_turn.T, self.turn.T
        first, second = far_sin * coupling, cos * far_cos * coupling + sin * alpha
        third = cos * alpha - sin * far_cos * coupling
        left, root = torch.hypot(third, cos * beta), space.eps**0.5  # left: |A r| / |r| before this step
        size = torch.hypot(third, beta)
        ended = size <= space.eps**2 * self.largest  # nothing is left to go on with
        size = torch.where(ended, 1.0, size)
        cos, sin = torch.where(ended, 0.0, third / size), torch.where(ended, 1.0, beta / size)
        d = unit - _column(second, unit) * self.d - _column(first, unit) * self.last_d
        d = d / _column(size, d)
        length = self.phi * cos
        # a singular matrix leaves the part of b that is outside its range
        thought = space.norms(self.r)
        stuck = ended | ((left <= root * self.largest) & (cos.abs() <= root)) | self.noisy(length, d, thought)
        self.phi = -sin * self.phi
        onward = torch.where(beta > space.eps**2 * self.largest, self.phi * cos / beta.clamp(min=tiny), 0.0)
        self.r = _column(sin.square(), fresh) * self.r + _column(onward, fresh) * fresh
        norms = space.norms(self.r)
        stuck |= self._astray(length, d, torch.maximum(norms, thought))
        self.x[self.active] += _column(torch.where(stuck, 0.0, length), d) * d
        self.last_d, self.d, self.before, self.v, self.y = self.d, d, self.v, fresh, y
        self.last_turn, self.turn = self.turn, torch.stack([cos, sin], dim=1)
        self.last_beta, self.beta = self.beta, beta
        return norms, stuck | (beta <= space.eps * self.largest)

    def _astray(
        self, length: Float[Tensor, " a"], d: Float[Tensor, "a n"], thought: Float[Tensor, " a"]
    ) -> Bool[Tensor, " a"]:
        """Which steps lead to an x much longer than any that was looked at, and to a residual larger than is thought,
        as a product tells: once x is as good as it gets, rounding leads on."""
        space, there = self.space, self.x[self.active] + _column(length, d) * d
        lengths = space.norms(there)
        far = ~(lengths <= JUMP * self.vouched) & (self.vouched > 0)
        astray = torch.zeros_like(far)
        if bool(far.any()):
            left = space.norms(self.b[self.active[far]] - self.apply(there[far]))
            astray[far] = ~(left <= DRIFTED * thought[far])
        self.vouched = torch.where(far | (self.vouched == 0), lengths, self.vouched)
        return astray

    def finish(self) -> None:
        """Where rounding has made a residual longer than the right-hand side, x = 0 is nearer."""
        worse = self.residuals > self.lengths
        if self.preconditioner is None:  # else they may be, in this norm, on the way
            self.x[worse], self.residuals[worse] = 0.0, self.lengths[worse]


class Neumann(Systems):
    """The Neumann series: the residual times I - (A + damping I) / largest eigenvalue, again and again."""

    kept = ("r", "risen")
    r: Tensor
    risen: Tensor  # for how many steps in a row it has grown

    def start(self, residuals: Float[Tensor, "a n"]) -> None:
        self.r, self.risen = residuals, torch.zeros(len(residuals), dtype=torch.long, device=residuals.device)

    def step(self) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space, before = self.space, self.space.norms(self.r)
        q = self.apply(self.r)
        self.curve(self.r, q)
        self.x[self.active] += self.length * self.r
        self.r = self.r - self.length * q
        norms = space.norms(self.r)
        self.risen = torch.where(norms > before, self.risen + 1, 0)
        return norms, (self.risen >= DIVERGED) | (norms == 0)

    @cached_property
    def length(self) -> float:
        """Of a step: one over an upper bound of the largest eigenvalue, as a rule, of a Ritz value and its residual."""
        krylov = Krylov(self.measurement, min(LANCZOS, self.space.size))
        krylov.start(self.space.draw(1, seed=0, kind="sphere"))
        while krylov.step() and krylov.size < krylov.capacity and krylov.extend():
            pass
        values, vectors = torch.linalg.eigh(krylov.projected)
        largest = float(values[-1] + krylov.residuals(vectors[:, -1:])[0]) + self.damping
        if largest <= 0:
            raise ValueError(f"The largest eigenvalue is {largest:.3g}, and a Neumann series needs a positive one.")
        return 1 / largest


METHODS: dict[str, type[Systems]] = {"cg": ConjugateGradients, "minres": Minres, "neumann": Neumann}


def _check(
    A: LinearOperator,
    b: Tensor,
    damping: float,
    method: SolveMethod,
    preconditioner: LinearOperator | None,
    rtol: float,
    max_steps: int,
) -> None:
    n = A.shape[0]
    if not isinstance(b, Tensor) or b.ndim not in (1, 2) or len(b) != n or not b.is_floating_point():
        shown = f"{tuple(b.shape)} of {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b is one right-hand side ({n},) or many ({n}, k) of real numbers, but got {shown}.")
    if not torch.isfinite(b.to(A.dtype)).all():
        raise NonFinite(f"The right-hand side has entries that are not finite in {A.dtype}.", "Look where it was made.")
    if not A.symmetric:
        raise ValueError(f"solve is for symmetric matrices, but {A!r} is none. Solve A^T A x = A^T b, damped.")
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method is 'auto', {', '.join(map(repr, METHODS))}, but got {method!r}.")
    if preconditioner is not None and (preconditioner.shape != A.shape or method == "neumann"):
        what = "neumann takes none" if method == "neumann" else f"A is {A.shape}"
        raise ValueError(f"The preconditioner is {preconditioner.shape}, but {what}.")
    if preconditioner is not None and (preconditioner.domain.dtype, preconditioner.symmetric) != (A.dtype, True):
        raise ValueError(f"A preconditioner is symmetric and of {A.dtype} as A is, but got {preconditioner!r}.")
    if not 0 <= rtol < 1 or max_steps < 1 or not math.isfinite(damping):
        raise ValueError(
            f"Expected 0 <= rtol < 1, max_steps >= 1 and a finite damping, but got {rtol}, {max_steps} and {damping}."
        )


def _unsolved(solution: Solution, systems: Systems, A: LinearOperator) -> NotConverged:
    """What to say, and what to do."""
    left = ~solution.converged
    count, worst = int(left.sum()), float(solution.residuals[left].max())
    of = f"{count} of {len(left)} systems" if len(left) > 1 else "The system"
    if bool(systems.flat.cpu()[left].any()):
        least = float(solution.curvature[left].min())
        cause = f"{of} came to a direction of curvature {least:.3g}: {A!r} plus damping is not positive definite"
        if least < -A.domain.eps * float(systems.scale.max()):
            cause += "."
            fix = "Raise the damping by more than that, take method='minres', or the GGN in place of the Hessian."
        else:
            cause += " but for rounding."
            enough = 1e3 * A.domain.eps * float(systems.scale.max())
            fix = f"Raise the damping to some {enough:.1g}, or measure in float64."
    elif isinstance(systems, Neumann) and bool((systems.residuals > systems.lengths).any()):
        cause = f"{of} diverged: {A!r} plus damping has negative eigenvalues."
        fix = "Raise the damping, or take method='minres'."
    elif int(solution.steps[left].max()) < systems.max_steps:
        cause = f"{of} came to a relative residual of {worst:.1e}, as far as {A.dtype} goes."
        fix = "Raise rtol or the damping, or measure in float64; a singular A reaches only a b in its range."
    else:
        cause = f"{of} had a relative residual of {worst:.1e} after {systems.max_steps} steps."
        fix = "Raise max_steps, rtol or the damping, or give a preconditioner; this error holds the `solution` so far."
    return NotConverged(cause, fix, solution=solution)


def _column(values: Float[Tensor, " a"], like: Tensor) -> Float[Tensor, "a 1"]:
    return values.to(like.dtype).unsqueeze(1)


def _positive(values: Float[Tensor, " a"]) -> Float[Tensor, " a"]:
    """r . M r, which is positive unless M is no preconditioner."""
    if bool((values < 0).any()):
        raise ValueError(
            f"The preconditioner is not positive definite: r . M r is {float(values.min()):.3g}. Give it more damping, "
            "or float64."
        )
    return values
