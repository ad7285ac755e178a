"""The last gradients of a run, and the empirical Fisher matrix that they make: M-FAC."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import NonFinite
from curvature.linalg.memory import need_basis
from curvature.linalg.outer import Outer, OuterBlocks, upcast
from curvature.linalg.rows import DenseRows, Rows
from curvature.linalg.space import Space


class Window(ABC):
    """The last m of the vectors of `space` that were added, in whatever order and as a subclass keeps them.

    `fisher` is F = (1/m) sum g g^T of what is there: `inverse(window.fisher, damping=1e-5)` is its inverse, exact, with
    entries, diagonal, log-determinant and products at the cost of reading the window once or twice. Adding a gradient
    reads it once; nothing else is computed anew but m x m matrices. Matrices made before see the rows they were made of
    change: make them anew.

    `state` are all its tensors by name, and `seen` counts what was added: what to save. A window that is made with
    both goes on where they are from, in the same tensors.
    """

    def __init__(self, size: int, space: Space, row: Space, state: Mapping[str, Tensor] | None, seen: int) -> None:
        if size < 1:
            raise ValueError(f"A window holds one gradient at least, but got a size of {size}.")
        self.size, self.space, self.seen, self.dtype = size, space, seen, row.dtype
        if state is None:
            need_basis(size, row)
            gram = torch.zeros(size, size, dtype=torch.float64, device=space.device)
            state = {**self._empty(row), "gram": gram}
        if len(state["gram"]) != size:
            raise ValueError(f"The tensors are those of a window of {len(state['gram'])}, but a size of {size} came.")
        self.state = state
        self._gram = state["gram"]

    def __len__(self) -> int:
        return min(self.seen, self.size)

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """Those that are there."""

    @abstractmethod
    def _empty(self, row: Space) -> Mapping[str, Tensor]:
        """Zeros for rows of that space, and what else there is of each parameter."""

    @abstractmethod
    def _keep(self, places: list[int], gradients: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """Put a row for each gradient into its place; returns these rows."""

    @property
    def bytes(self) -> int:
        """The memory it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())

    def add(self, gradients: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Take over these gradients, (n,) or (k, n), in the place of the oldest; returns the vectors that are kept.

        Raises NonFinite, and changes nothing, where an entry is not finite.
        """
        if gradients.ndim not in (1, 2) or gradients.shape[-1] != self.space.size or not len(gradients):
            n, got = self.space.size, tuple(gradients.shape)
            raise ValueError(f"Expected gradients ({n},) or (k, {n}), but got {got}.")
        rows = gradients.detach().reshape(-1, self.space.size).to(self.space.device, self.space.dtype)
        ends = torch.stack(rows.aminmax()).to(self.dtype)  # isfinite of all entries takes forty times as long
        if not torch.isfinite(ends).all():
            raise NonFinite(
                f"A gradient has entries that are not finite in {self.dtype}.",
                "Leave out that step, or take a wider dtype; the window is as it was.",
            )
        kept = [self._taken(some) for some in rows.split(self.size)]
        return (kept[0] if len(kept) == 1 else torch.cat(kept)).view(gradients.shape)

    def _taken(self, gradients: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """Keep these, at most m, and their inner products with all rows."""
        places = [(self.seen + i) % self.size for i in range(len(gradients))]
        kept = self._keep(places, gradients)
        self.seen += len(gradients)
        products, count = self.rows.apply(kept), len(self)
        self._gram[places, :count], self._gram[:count, places] = products, products.T
        return kept.to(self.space.dtype)

    @property
    def fisher(self) -> Outer:
        """The mean of the outer products of the rows."""
        core = _mean(self._need_rows(), self.space)
        gram = self._gram[: len(self), : len(self)].clone()
        return Outer(self.rows, core, gram=gram, psd=True, source=self._source())

    def _need_rows(self) -> int:
        if not len(self):
            raise ValueError("The window is empty. Add gradients first.")
        return len(self)

    def _source(self, **more: int) -> Mapping[str, str | int]:
        return {"operator": f"fisher of {type(self).__name__}", "gradients": len(self), "seen": self.seen, **more}


def _mean(count: int, space: Space) -> Float[Tensor, "m m"]:
    return torch.eye(count, dtype=torch.float64, device=space.device) / count


class GradientWindow(Window):
    """The last m gradients as they are, in `dtype`: that of the space unless given.

    Takes m numbers for each parameter. Rows in bfloat16 take half the memory of float32 and, on a CPU, twice the time;
    with vectors in float32 all else is as exact, and F that of the rounded gradients. What the inverse makes of a
    gradient in the window is a small rest of two large terms: its error is about the dtype's rounding times |g|^2 over
    the damping.

    Frantar, Kurtic & Alistarh 2021 (arXiv:2107.03356), with one system of m equations in place of their recurrences.

    >>> window = GradientWindow(2, Space(3))
    >>> kept = window.add(torch.tensor([[2.0, 0.0, 0.0]]))
    >>> window.fisher.dense().diagonal()
    tensor([4., 0., 0.])
    """

    def __init__(
        self,
        size: int,
        space: Space,
        *,
        dtype: torch.dtype | None = None,
        state: Mapping[str, Tensor] | None = None,
        seen: int = 0,
    ) -> None:
        super().__init__(size, space, replace(space, dtype=dtype or space.dtype), state, seen)
        self._rows = self.state["rows"]

    @property
    def gradients(self) -> Float[Tensor, "m n"]:
        """Those that are there."""
        return self._rows[: len(self)]

    @property
    def rows(self) -> DenseRows:
        return DenseRows(self.gradients, self.space)

    def _empty(self, row: Space) -> Mapping[str, Tensor]:
        return {"rows": torch.zeros(self.size, row.size, dtype=row.dtype, device=row.device)}

    def _keep(self, places: list[int], gradients: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        kept = gradients.to(self._rows.dtype, copy=True)
        for place, row in zip(places, kept, strict=True):
            self._rows[place] = row
        return kept

    def blocks(self, size: int) -> OuterBlocks:
        """`fisher` between the parameters of each run of `size` in order, and zero between runs: a block diagonal.

        Each block has a system of its own, of m equations or of `size` where these are fewer; all are solved at once,
        and their cores take min(m, size)^2 / size numbers in float64 for each parameter. M-FAC prunes with 128.
        """
        count, n = self._need_rows(), self.space.size
        if not 1 <= size <= n:
            raise ValueError(f"A block has between 1 and {n} parameters, but got {size}.")
        blocks = -(-n // size)
        rows = self.gradients
        if n % size:
            rows = rows.new_zeros(count, blocks * size)
            rows[:, :n] = self.gradients
        stack = rows.view(count, blocks, size).transpose(0, 1)  # (b, m, B)
        one = torch.eye(min(count, size), dtype=torch.float64, device=rows.device).expand(blocks, -1, -1)
        options = {"space": self.space, "psd": True, "source": self._source(block=size)}
        if count <= size:
            return OuterBlocks(stack, one / count, **options)
        core = torch.cat([some.mT @ some / count for some in upcast(stack)])  # the blocks themselves, which are smaller
        return OuterBlocks(one.to(self.rows.precision), core, gram=one, **options)
