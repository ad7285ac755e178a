"""The last gradients of a run, and the empirical Fisher matrix that they make: M-FAC."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.memory import need_basis
from curvature.linalg.space import Space
from curvature.linalg.structured import Outer


class GradientWindow:
    """The last m gradients g of those that were added, as rows of `space`, in whatever order.

    `fisher` is F = (1/m) sum g g^T of what is there: `inverse(window.fisher, damping=1e-5)` is its inverse, exact, with
    entries, diagonal, log-determinant and products at the cost of reading the window once or twice. Adding a gradient
    reads it once; nothing else is computed anew but m x m matrices. Matrices made before see the rows they were made of
    change: make them anew. Frantar, Kurtic & Alistarh 2021 (arXiv:2107.03356); in place of their recurrences the
    Cholesky-sized system that they solve.

    >>> window = GradientWindow(2, Space(3))
    >>> window.add(torch.tensor([[2.0, 0.0, 0.0]]))
    >>> window.fisher.dense().diagonal()
    tensor([4., 0., 0.])
    """

    def __init__(self, size: int, space: Space) -> None:
        if size < 1:
            raise ValueError(f"A window holds one gradient at least, but got a size of {size}.")
        need_basis(size, space)
        self.space, self.seen = space, 0
        self._rows = torch.zeros(size, space.size, dtype=space.dtype, device=space.device)
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=space.device)

    def __len__(self) -> int:
        return min(self.seen, len(self._rows))

    def add(self, gradients: Float[Tensor, "k n"]) -> None:
        """Take over these gradients, (n,) or (k, n), in the place of the oldest."""
        if gradients.ndim not in (1, 2) or gradients.shape[-1] != self.space.size:
            n, got = self.space.size, tuple(gradients.shape)
            raise ValueError(f"Expected gradients ({n},) or (k, {n}), but got {got}.")
        rows = gradients.detach().reshape(-1, self.space.size).to(self.space.device, self.space.dtype)
        if not torch.isfinite(rows).all():
            raise NonFinite(
                "A gradient has entries that are not finite.", "Leave out that step; the window is as it was."
            )
        fresh = rows[-len(self._rows) :]
        skipped = len(rows) - len(fresh)
        places = (self.seen + skipped + torch.arange(len(fresh), device=rows.device)) % len(self._rows)
        self._rows[places] = fresh
        products = self.space.inner(fresh, self._rows)
        self._gram[places], self._gram[:, places] = products, products.T
        self.seen += len(rows)

    @property
    def gradients(self) -> Float[Tensor, "m n"]:
        """Those that are there."""
        return self._rows[: len(self)]

    @property
    def fisher(self) -> Outer:
        """The mean of their outer products."""
        count = len(self)
        if count == 0:
            raise ValueError("The window is empty. Add gradients first.")
        core = torch.eye(count, dtype=torch.float64, device=self.space.device) / count
        source = {"operator": "gradient window", "gradients": count, "seen": self.seen}
        gram = self._gram[:count, :count]
        return Outer(self.gradients, core, gram=gram.clone(), space=self.space, psd=True, source=source)
