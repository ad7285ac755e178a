"""Least squares min |A x - b|^2 + damping |x|^2 with a matrix of any shape that is known by its products and those of
its transpose.

The damping is rows sqrt(damping) I below A, with zeros below b: then there is nothing but least squares, and they can
begin again from any x.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.linalg.systems import NOISY, Solution, Systems, check, column
from curvature.progress import Run


def lstsq(
    A: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    rtol: float = 1e-5,
    max_steps: int = 500,
    run: Run | None = None,
) -> Solution:
    """x that minimises |A x - b|^2 + damping |x|^2, for A (m, n) and one right-hand side (m,) or many (m, k).

    A is any operator with an adjoint: a Jacobian, or what is symmetric but singular. Where there is more than one such
    x, it is the shortest. Until |A^T (b - A x) - damping x| is below `rtol` times |A^T b|, recomputed with fresh
    products; raises NotConverged, which holds the Solution, where `max_steps` or rounding come first. `rtol=0` does
    `max_steps` steps, or as many as rounding allows, and raises nothing.

    A step is a product with A and one with A^T. In exact arithmetic x is that of MINRES on the system of A^T A +
    damping I, whose condition number is the square of that of A. The residual leaves an error in x open of up to its
    own length over s^2 + damping along each singular vector with value s: where s is below the root of the dtype's
    rounding times the largest, nothing that is said of the residual is said of x there. Damp those.

    Fong & Saunders 2011 (arXiv:1006.0758).

    >>> from curvature.linalg.structured import Dense
    >>> lstsq(Dense(torch.tensor([[1.0], [1.0]])), torch.tensor([1.0, 3.0])).x
    tensor([2.])
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"lstsq takes an operator, which knows its transpose, but got {type(A).__name__}. Give Dense(matrix), or "
            "MatrixFree with an `adjoint=`."
        )
    check(A, b, damping, rtol, max_steps)
    if damping < 0:
        raise ValueError(f"The damping of least squares is 0 or more, but got {damping}.")
    options = {"damping": damping, "rtol": rtol, "max_steps": max_steps}
    return LSMR(Measurement(A, "lstsq", options=options, run=run, square=False), b, rtol, max_steps, damping).solved()


class LSMR(Systems):
    """Golub and Kahan's bidiagonalisation, from which every step takes the x whose A^T r is shortest, of all in the
    Krylov space of A^T A. Letters are those of the paper, where a bar is `_bar`."""

    beyond_rounding = "Raise rtol or the damping, or measure in float64."
    kept = ("u", "v", "h", "h_bar", "alpha", "alpha_bar", "zeta_bar", "rho", "rho_bar", "c_bar", "s_bar")
    u: Tensor  # (a, m) or, damped, (a, m + n), of length 1, as are the v
    v: Tensor
    h: Tensor
    h_bar: Tensor  # the direction in which x was moved last
    alpha: Tensor
    alpha_bar: Tensor
    zeta_bar: Tensor  # |A^T r|, with a sign
    rho: Tensor
    rho_bar: Tensor
    c_bar: Tensor
    s_bar: Tensor

    def __init__(self, measurement: Measurement, b: Tensor, rtol: float, max_steps: int, damping: float) -> None:
        super().__init__(measurement, b, rtol, max_steps)
        self.root = damping**0.5
        self.largest = torch.zeros_like(self.lengths)  # curvature: a lower bound of the norm of A^T A + damping I
        self.b = self._stacked(self.b, torch.zeros_like(self.x))

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        return self._stacked(self.measurement.apply(rows), self.root * rows)

    def apply_transposed(self, rows: Float[Tensor, "k m"]) -> Float[Tensor, "k n"]:
        m = self.measurement.operator.shape[0]
        product = self.measurement.apply_transposed(rows[:, :m].contiguous())
        return product + self.root * rows[:, m:] if self.root else product

    def completed(self, left: Float[Tensor, "k m"]) -> Float[Tensor, "k l"]:
        return torch.cat([left, self.apply_transposed(left)], dim=1)

    def start(self, left: Float[Tensor, "a l"]) -> Bool[Tensor, " a"]:
        u, v = left[:, : -self.space.size], left[:, -self.space.size :]
        beta, self.u = self._unit(u)
        self.alpha, self.v = self._unit(v / column(beta, v))
        self.h, self.h_bar = self.v, torch.zeros_like(self.v)
        self.alpha_bar, self.zeta_bar = self.alpha, self.alpha * beta
        self.rho, self.rho_bar, self.c_bar = (torch.ones_like(beta) for _ in range(3))
        self.s_bar = torch.zeros_like(beta)
        return self.alpha == 0

    def step(self) -> tuple[Float[Tensor, "a n"], Float[Tensor, " a"], Bool[Tensor, " a"]]:
        image = self.apply(self.v)
        bend = self.space.norms(image).square()  # v.(A^T A + damping I)v
        self.curvature[self.active] = torch.minimum(self.curvature[self.active], bend)
        self.largest[self.active] = torch.maximum(self.largest[self.active], bend)
        beta, self.u = self._unit(image - column(self.alpha, image) * self.u)
        alpha, v = self._unit(self.apply_transposed(self.u) - column(beta, self.v) * self.v)
        rho = torch.hypot(self.alpha_bar, beta)
        c, s = self.alpha_bar / rho, beta / rho
        theta, alpha_bar = s * alpha, c * alpha
        theta_bar = self.s_bar * rho
        rho_bar = torch.hypot(self.c_bar * rho, theta)
        c_bar, s_bar = self.c_bar * rho / rho_bar, theta / rho_bar
        zeta, zeta_bar = c_bar * self.zeta_bar, -s_bar * self.zeta_bar
        h_bar = self.h - column(theta_bar * rho / (self.rho * self.rho_bar), v) * self.h_bar
        length = zeta / (rho * rho_bar)
        step = length.abs() * self.space.norms(h_bar)
        noisy = self.space.eps * self.largest[self.active] * step > NOISY * self.zeta_bar.abs()
        self.h, self.h_bar = v - column(theta / rho, v) * self.h, h_bar
        self.v, self.alpha, self.alpha_bar, self.zeta_bar = v, alpha, alpha_bar, zeta_bar
        self.rho, self.rho_bar, self.c_bar, self.s_bar = rho, rho_bar, c_bar, s_bar
        rounding = self.space.rounding(1.0)  # what is found after it has no part in the shortest x
        ended = torch.minimum(alpha, beta) <= rounding * self.largest[self.active].sqrt()
        stopped = noisy | ended | (zeta_bar.abs() <= rounding * self.lengths[self.active])
        return column(torch.where(noisy, 0.0, length), v) * h_bar, zeta_bar.abs(), stopped

    def _stacked(self, above: Float[Tensor, "k m"], below: Float[Tensor, "k n"]) -> Float[Tensor, "k l"]:
        return torch.cat([above, below], dim=1) if self.root else above

    def _unit(self, rows: Float[Tensor, "a l"]) -> tuple[Float[Tensor, " a"], Float[Tensor, "a l"]]:
        """How long the rows are, and rows of length 1 in their place, or 0."""
        lengths = self.space.norms(rows)
        return lengths, rows / column(lengths.where(lengths > 0, 1.0), rows)
