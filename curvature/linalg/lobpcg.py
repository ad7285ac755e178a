"""LOBPCG: vectors that are improved in place, by their residuals and by the directions they came from.

Each step takes the best of the span of X (the vectors), W (their residuals, preconditioned) and P (where the last step
led), three blocks where a Krylov space would need hundreds of vectors. Knyazev 2001 (SIAM J. Sci. Comput. 23), with the
safeguards of Hetmaniuk & Lehoucq 2006 and Duersch, Shao, Yang & Gu 2018 (arXiv:1704.07458): W and P are orthonormal and
orthogonal to X, and the projected problem counts with the inner products that rounding has left between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.deflation import beyond
from curvature.linalg.eigenpairs import Ritz, Which, tolerance, wanted
from curvature.linalg.krylov import check_symmetry
from curvature.linalg.measurement import Measurement
from curvature.linalg.memory import need_basis
from curvature.linalg.operator import LinearOperator
from curvature.linalg.space import CHUNK, Space

PATIENCE = 6  # steps without progress before P is dropped: among many copies of an eigenvalue, P may be but rounding


class Lobpcg:
    """Rows [X, P], orthonormal to rounding, their products with A, and the Ritz values and residuals of X.

    The products of X and P are combined like the vectors themselves, so that a step multiplies nothing but W.
    """

    def __init__(
        self, measurement: Measurement, width: int, which: Which, preconditioner: LinearOperator | None = None
    ) -> None:
        self.measurement, self.preconditioner = measurement, preconditioner
        self.which: Which = which
        self.space: Space = measurement.operator.domain
        self.width = width  # rows of X
        room = min(3 * width, self.space.size)
        need_basis(2 * room + 4 * width, self.space)  # with the residuals and what is made of them
        self._rows = torch.empty(room, self.space.size, dtype=self.space.dtype, device=self.space.device)
        self._products = torch.empty_like(self._rows)
        self.size = 0  # rows of X and P
        self.multiplied = 0  # rows of X whose values and residuals are known
        self.values = self.residuals = torch.zeros(0, dtype=torch.float64, device=self.space.device)
        self.noise = self.scale = 0.0  # the largest |u.Av - v.Au|, and product, seen: as in Krylov

    @property
    def rounding(self) -> float:
        """Norms up to this are rounding."""
        return self.space.rounding(self.scale)

    def iterate(self, draws: Iterator[Tensor], k: int, rtol: float, max_steps: int, least: int) -> None:
        """Step until the first k pairs have converged, which fresh products confirm, or the steps are used up.

        At least `least` steps are taken, in which the rows beyond k look for eigenvalues that a start has not seen.
        """
        active = torch.ones(self.width, dtype=torch.bool, device=self.space.device)
        best, stalled = torch.inf, 0
        for step in range(1, max_steps + 1):
            fresh = self._directions(active) if self.size else self._first(draws)
            if not len(fresh):  # a residual of zero shows no way on
                fresh = beyond(self.space, torch.stack(list(islice(draws, self.width))), self._rows[: self.size])
            self._improve(fresh[: self.space.size - self.size], active)
            bound = tolerance(self, self.values, rtol)
            active = self.residuals > bound / 2
            settled = k - int(active[:k].sum())
            self.measurement.report(step, max_steps, f"{settled} of {k} converged, first {float(self.values[0]):.5g}")
            left = float((self.residuals / bound)[:k].clamp(min=0.5).log().sum())
            best, stalled = (left, 0) if left < best else (best, stalled + 1)
            if stalled == PATIENCE:
                self.size, stalled = self.width, 0
            last = step == max_steps or self.size == self.space.size
            if last or (settled == k and step >= least):
                X = self._rows[:k]
                X /= self.space.norms(X).to(X.dtype).unsqueeze(1)
                self._products[:k] = self.measurement.apply(X)
                self._look()
                active = self.residuals > bound
                if last or not active[:k].any():
                    return

    def ritz(self, k: int) -> Ritz:
        """The pairs of X, with the first k vectors and their products: fresh ones after `iterate`."""
        return Ritz(self.values, self.residuals, self._rows[:k].clone(), self._products[:k].clone())

    def _first(self, draws: Iterator[Tensor]) -> Float[Tensor, "m n"]:
        """The first rows of `draws` that are linearly independent: of those given some may not be."""
        rows = self.space.orthonormal(torch.stack(list(islice(draws, self.width))))
        while len(rows) < self.width:
            more = torch.stack(list(islice(draws, self.width - len(rows))))
            rows = torch.cat([rows, beyond(self.space, more, rows)])
        return rows

    def _directions(self, active: Bool[Tensor, " m"]) -> Float[Tensor, "w n"]:
        """W: the residuals of what has not converged, preconditioned, beyond X and P."""
        X, AX = self._rows[: self.width][active], self._products[: self.width][active]
        rows = AX - self.values[active].to(X.dtype).unsqueeze(1) * X
        if self.preconditioner is not None:
            rows = self.preconditioner.apply(rows.to(self.preconditioner.dtype)).to(X.dtype)
            if not torch.isfinite(rows).all():
                raise NonFinite(
                    f"A product with the preconditioner {self.preconditioner!r} has entries that are not finite.",
                    "Give one that is positive definite, for example by more damping.",
                )
        return beyond(self.space, rows, self._rows[: self.size])

    def _improve(self, fresh: Float[Tensor, "w n"], active: Bool[Tensor, " m"]) -> None:
        """The best X, and the P that led there, in the span of X, P and the `fresh` rows W."""
        products = self.measurement.apply(fresh)
        total = self.size + len(fresh)
        self._rows[self.size : total], self._products[self.size : total] = fresh, products
        self.scale = max(self.scale, float(self.space.norms(products).max()))
        S, AS = self._rows[:total], self._products[:total]
        T = self.space.inner(S, AS)
        self.noise = max(self.noise, float((T - T.T).abs().max()))
        check_symmetry(self.noise, self.scale, self.space)
        L = torch.linalg.cholesky(self.space.inner(S, S))  # close to the identity
        half = torch.linalg.solve_triangular(L, (T + T.T) / 2, upper=False)
        values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False))
        chosen = wanted(values, self.which)[: self.width]
        C = vectors[:, chosen].T  # X in terms of L^-1 S, whose rows are orthonormal
        led = torch.linalg.solve_triangular(L, C[active], upper=False, left=False)  # in terms of S
        led[:, : self.width] = 0  # without what was in X before
        coefficients = torch.cat([C, beyond(Space(total, torch.float64, C.device), led @ L, C)[: total - len(C)]])
        coefficients = torch.linalg.solve_triangular(L, coefficients, upper=False, left=False)
        self.multiplied = 0  # whoever is interrupted below finds nothing, rather than half of two blocks
        for start in range(0, self.space.size, CHUNK):  # in place, as in a restart of Krylov
            columns = slice(start, start + CHUNK)
            S[: len(coefficients), columns] = self.space.combine(coefficients, S[:, columns])
            AS[: len(coefficients), columns] = self.space.combine(coefficients, AS[:, columns])
        self.size, self.values = len(coefficients), values[chosen]
        self._look()

    def _look(self) -> None:
        """The residuals of X, from the products as they are known."""
        X, AX = self._rows[: self.width], self._products[: self.width]
        self.residuals = self.space.norms(AX - self.values.to(X.dtype).unsqueeze(1) * X)
        self.multiplied = self.width
