"""Methods for symmetric systems: conjugate gradients, minimal residuals, Neumann's series, Newton's inverse."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.krylov import Krylov
from curvature.linalg.lowrank import recycled
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.linalg.structured import Dense, LowRank
from curvature.linalg.systems import DRIFTED, NOISY, Systems, column

LANCZOS = 10  # steps to the largest eigenvalue
DIVERGED = 5  # steps in a row in which a residual grows
JUMP = 4.0  # times the last x that was looked at: one that long is looked at


class Symmetric(Systems):
    """Systems (A + damping I) x = b with symmetric A, and what their methods share."""

    beyond_rounding = "Raise rtol or the damping, or measure in float64; a singular A reaches only a b in its range."

    def __init__(
        self,
        measurement: Measurement,
        b: Tensor,
        rtol: float,
        max_steps: int,
        damping: float,
        preconditioner: LinearOperator | None,
        recycle: int,
    ) -> None:
        super().__init__(measurement, b, rtol, max_steps)
        self.damping, self.preconditioner, self.recycle = damping, preconditioner, recycle
        self.directions = self.images = self.space.empty  # to recycle: their images are A times each
        self.scale = torch.zeros_like(self.lengths)  # the longest product of a unit vector: a lower bound of a norm
        self.flat = torch.zeros_like(self.known)  # which came to a direction without positive curvature
        self.metric = torch.zeros_like(self.lengths)  # the least r . M r, where one is negative

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """(A + damping I) times each row."""
        return self.measurement.apply(rows) + self.damping * rows

    def completed(self, left: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        return left

    def energy(self) -> Float[Tensor, " k"]:
        return self.space.diagonal(self.x, self.b)

    def precondition(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        if self.preconditioner is None:
            return rows
        product = self.preconditioner.apply(rows)
        if not bool(torch.isfinite(product).all()):
            raise NonFinite(f"A product with the preconditioner {self.preconditioner!r} is not finite.", "Look there.")
        return product

    def weigh(self, r: Float[Tensor, "a n"], z: Float[Tensor, "a n"]) -> Float[Tensor, " a"]:
        """r . M r for z = M r, which is positive unless M is no preconditioner; 0, and noted, where it is negative."""
        values = self.space.diagonal(r, z)
        self.metric[self.active] = torch.minimum(self.metric[self.active], values)
        return values.clamp(min=0)

    def curve(self, p: Float[Tensor, "a n"], q: Float[Tensor, "a n"]) -> tuple[Float[Tensor, " a"], Bool[Tensor, " a"]]:
        """p.q for products q of the directions p, and which are zero or negative but for rounding; the smallest
        curvature is kept."""
        lengths, images, bend = self.space.norms(p), self.space.norms(q), self.space.diagonal(p, q)
        some = lengths > 0
        size = torch.where(some, lengths, 1.0)
        self.scale[self.active] = torch.maximum(self.scale[self.active], images / size)
        bent = torch.where(some, bend / size.square(), float("inf"))
        self.curvature[self.active] = torch.minimum(self.curvature[self.active], bent)
        return bend, bend <= self.space.eps * lengths * images

    def noisy(
        self, length: Float[Tensor, " a"], d: Float[Tensor, "a n"], residuals: Float[Tensor, " a"]
    ) -> Bool[Tensor, " a"]:
        """Which steps are so long, along what rounding has left of a direction, that theirs is in the way of residuals
        of these norms."""
        step = length.abs() * self.space.norms(d)
        return self.space.eps * self.scale[self.active] * step > NOISY * residuals

    def unfit(self, left: Bool[Tensor, " k"]) -> tuple[str, str] | None:
        """That the preconditioner is none, where one of these has met that."""
        least = float(self.metric[left].min())
        if least >= 0:
            return None
        cause = f"stopped, because the preconditioner is not positive definite: r . M r is {least:.3g}."
        return cause, "Give it more damping, or float64."


class ConjugateGradients(Symmetric):
    """Conjugate gradients: in every step the best x in the A-norm on the Krylov space of the residual."""

    kept = ("r", "p", "rho")
    r: Tensor  # residuals
    p: Tensor  # directions
    rho: Tensor  # r . M r

    def start(self, left: Float[Tensor, "a n"]) -> Bool[Tensor, " a"]:
        self.r = left
        self.p = self.precondition(left).clone()
        self.rho = self.weigh(self.r, self.p)
        return self.rho == 0

    def step(self) -> tuple[Float[Tensor, "a n"], Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space, p = self.space, self.p
        image = self.measurement.apply(p)
        self._keep(p, image)
        q = image + self.damping * p
        bend, flat = self.curve(p, q)
        ratio = torch.where(flat, 0.0, self.rho / torch.where(flat, 1.0, bend))
        flat |= self.noisy(ratio, p, space.norms(self.r))
        self.flat[self.active] = flat
        length = column(torch.where(flat, 0.0, ratio), q)
        self.r = self.r - length * q
        z = self.precondition(self.r)
        rho = self.weigh(self.r, z)
        self.p = z + column(rho / self.rho, z) * p
        self.rho = rho
        return length * p, space.norms(self.r), flat | (rho == 0)

    def excuse(self, left: Bool[Tensor, " k"]) -> tuple[str, str] | None:
        if (unfit := self.unfit(left)) or not bool(self.flat[left].any()):
            return unfit
        A, least, largest = self.measurement.operator, float(self.curvature[left].min()), float(self.scale.max())
        cause = f"came to a direction of curvature {least:.3g}: {A!r} plus damping is not positive definite"
        if least < -A.domain.eps * largest:
            fix = "Raise the damping by more than that, take method='minres', or the GGN in place of the Hessian."
            return f"{cause}.", fix
        enough = 1e3 * A.domain.eps * largest
        return f"{cause} but for rounding.", f"Raise the damping to some {enough:.1g}, or measure in float64."

    def recycled(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if not len(self.directions):
            return None, None
        known = self.preconditioner if isinstance(self.preconditioner, LowRank) else None
        return recycled(self.space, self.directions, self.images, known, self.recycle)

    def _keep(self, p: Float[Tensor, "a n"], images: Float[Tensor, "a n"]) -> None:
        """Put directions and their products by, as many as there is room for."""
        room = self.recycle - len(self.directions)
        if room > 0:
            p, images = p[:room], images[:room]
            size = column(self.space.norms(p), p)
            self.directions = torch.cat([self.directions, p / size])
            self.images = torch.cat([self.images, images / size])


class Minres(Symmetric):
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

    def start(self, left: Float[Tensor, "a n"]) -> Bool[Tensor, " a"]:
        self.r = self.v = left
        self.y = self.precondition(left)
        self.before, self.d, self.last_d = (torch.zeros_like(left) for _ in range(3))
        self.beta = self.phi = self.weigh(self.v, self.y).sqrt()
        self.last_beta = torch.zeros_like(self.beta)
        self.turn = self.last_turn = torch.stack([torch.ones_like(self.beta), self.last_beta], dim=1)
        self.largest = torch.zeros_like(self.beta)
        self.vouched = self.space.norms(self.x[self.active])
        return self.beta == 0

    def step(self) -> tuple[Float[Tensor, "a n"], Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space, tiny = self.space, 1e-300
        unit = self.y / column(self.beta, self.y)
        fresh = self.apply(unit)
        self.curve(unit, fresh)
        coupling = torch.where(self.last_beta > 0, self.beta, 0.0)
        fresh = fresh - column(coupling / self.last_beta.clamp(min=tiny), fresh) * self.before
        alpha = space.diagonal(unit, fresh)
        fresh = fresh - column(alpha / self.beta, fresh) * self.v
        y = self.precondition(fresh)
        beta = self.weigh(fresh, y).sqrt()
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
        d = unit - column(second, unit) * self.d - column(first, unit) * self.last_d
        d = d / column(size, d)
        length = self.phi * cos
        # a singular matrix leaves the part of b that is outside its range
        thought = space.norms(self.r)
        stuck = ended | ((left <= root * self.largest) & (cos.abs() <= root)) | self.noisy(length, d, thought)
        self.phi = -sin * self.phi
        onward = torch.where(beta > space.eps**2 * self.largest, self.phi * cos / beta.clamp(min=tiny), 0.0)
        self.r = column(sin.square(), fresh) * self.r + column(onward, fresh) * fresh
        norms = space.norms(self.r)
        stuck |= self._astray(length, d, torch.maximum(norms, thought))
        advance = column(torch.where(stuck, 0.0, length), d) * d
        self.last_d, self.d, self.before, self.v, self.y = self.d, d, self.v, fresh, y
        self.last_turn, self.turn = self.turn, torch.stack([cos, sin], dim=1)
        self.last_beta, self.beta = self.beta, beta
        return advance, norms, stuck | (beta <= space.eps * self.largest)

    def excuse(self, left: Bool[Tensor, " k"]) -> tuple[str, str] | None:
        return self.unfit(left)

    def _astray(
        self, length: Float[Tensor, " a"], d: Float[Tensor, "a n"], thought: Float[Tensor, " a"]
    ) -> Bool[Tensor, " a"]:
        """Which steps lead to an x much longer than any that was looked at, and to a residual larger than is thought,
        as a product tells: once x is as good as it gets, rounding leads on."""
        space, there = self.space, self.x[self.active] + column(length, d) * d
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
        worse = self.residuals > 1
        if self.preconditioner is None:  # else they may be, in this norm, on the way
            self.x[worse], self.residuals[worse] = 0.0, 1.0


class Neumann(Symmetric):
    """The Neumann series: the residual times I - (A + damping I) / largest eigenvalue, again and again."""

    kept = ("r", "risen")
    r: Tensor
    risen: Tensor  # for how many steps in a row it has grown

    def start(self, left: Float[Tensor, "a n"]) -> Bool[Tensor, " a"]:
        self.r, self.risen = left, torch.zeros(len(left), dtype=torch.long, device=left.device)
        return self.risen > 0

    def step(self) -> tuple[Float[Tensor, "a n"], Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space, before = self.space, self.space.norms(self.r)
        q = self.apply(self.r)
        self.curve(self.r, q)
        advance = self.length * self.r
        self.r = self.r - self.length * q
        norms = space.norms(self.r)
        self.risen = torch.where(norms > before, self.risen + 1, 0)
        return advance, norms, (self.risen >= DIVERGED) | (norms == 0)

    def excuse(self, left: Bool[Tensor, " k"]) -> tuple[str, str] | None:
        if not bool((self.residuals[left] > 1).any()):
            return None
        cause = f"diverged: {self.measurement.operator!r} plus damping has negative eigenvalues."
        return cause, "Raise the damping, or take method='minres'."

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


class NewtonSchulz(Symmetric):
    """Newton's iteration for the whole inverse X, and with each a step x + X r for the residual r of every system."""

    kept = ("r",)
    r: Tensor
    X: Tensor  # (n, n), one for all systems
    bound: float  # of the norm of A + damping I

    def start(self, left: Float[Tensor, "a n"]) -> Bool[Tensor, " a"]:
        self.r, A = left, self.measurement.operator
        assert isinstance(A, Dense)
        if not bool(self.steps.any()):  # X is not begun again
            matrix = A.matrix.detach() + self.damping * torch.eye(len(A.matrix), dtype=A.dtype, device=A.device)
            self.bound = float(matrix.abs().sum(1, dtype=torch.float64).max())  # norm1 = norminf
            self.X = matrix / (self.bound or 1.0) / (self.bound or 1.0)
        return torch.full((len(left),), self.bound == 0, device=left.device)

    def step(self) -> tuple[Float[Tensor, "a n"], Float[Tensor, " a"], Bool[Tensor, " a"]]:
        space, rounding = self.space, self.space.rounding(1.0)
        self.X = 2 * self.X - space.combine(self.apply(self.X), self.X)
        d = space.combine(self.r, self.X)
        q = self.apply(d)
        self.curve(d, q)
        singular = space.eps * float(space.norms(self.X).max()) * self.bound > 1
        astray = singular | (space.norms(q) <= rounding * self.scale[self.active] * space.norms(d))  # in the kernel
        go = column(torch.where(astray, 0.0, 1.0), d)
        self.r = self.r - go * q
        norms = space.norms(self.r)
        # the square of an eigenvalue over the bound doubles in every step: now of one that is but rounding, too
        spent = self.steps[self.active] > 2 * math.log2(1 / space.eps)
        return go * d, norms, astray | spent | (norms <= rounding * self.lengths[self.active])
