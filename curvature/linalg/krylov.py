"""Block Lanczos: an orthonormal basis that grows by one block a step, and the matrix projected on it.

The one Lanczos of the package. All start vectors advance in lockstep, so a step is one product with a block of
vectors (one pass over the data, however many there are); every block is orthogonal to all before it, so no ghost
copies of converged eigenvalues appear. Golub & Underwood 1977; Saad 2011, Numerical Methods for Large Eigenvalue
Problems, chapter 6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.linalg.measurement import Measurement
from curvature.linalg.memory import need_basis
from curvature.linalg.space import CHUNK, Space

SPARED = 100.0  # times rounding: what overlaps may reach before they are removed
BLOWN_UP = 10.0  # times rounding: what orthogonality to the basis may lose when a block is made orthonormal
ROUNDED = 1e-6  # of the norm: as asymmetric as float64 products of models that compute parts in float32 may be


class Krylov:
    """Rows V, orthonormal, and T = V A V^T in float64, grown by `step`; on `device`, or where A is.

    Every block is cleaned of all before it; a `sparing` one, which cannot restart, only when it must (`Overlaps`).

    The last `width` rows of V are the frontier: `step` multiplies them by A and leaves in `remainder` what the products
    have outside the span of V; `extend` makes it the next frontier. On the rows whose products are known,
    A V^T = V^T T + remainder^T edge, from which the residuals of all Ritz pairs follow.
    """

    def __init__(
        self, measurement: Measurement, capacity: int, *, device: torch.device | None = None, sparing: bool = False
    ) -> None:
        self.measurement = measurement
        A = measurement.operator.domain
        self.space = A if device is None else Space(A.size, A.dtype, device)
        need_basis(capacity, self.space)
        self._basis = torch.empty(capacity, self.space.size, dtype=self.space.dtype, device=self.space.device)
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64, device=self.space.device)
        self.overlaps = Overlaps(capacity, self.space) if sparing else None
        self.size = 0  # rows of the basis
        self.width = 0  # of which so many form the frontier
        self.multiplied = 0  # rows whose product with A is known: T is complete on them
        self.remainder: Tensor = self._basis[:0]
        self.edge: Tensor = self._projected[:0, :0]  # (rows of the remainder, multiplied)
        self.noise = 0.0  # the largest |u.Av - v.Au| seen: what rounding does to the entries of T
        self.scale = 0.0  # the largest product seen: a lower bound of the norm of A, what "small" is relative to

    @property
    def capacity(self) -> int:
        """The most rows the basis can have."""
        return len(self._basis)

    @property
    def basis(self) -> Float[Tensor, "d n"]:
        """The rows whose products are known."""
        return self._basis[: self.multiplied]

    @property
    def frontier(self) -> Float[Tensor, "b n"]:
        """The rows that the next step multiplies."""
        return self._basis[self.size - self.width : self.size]

    @property
    def projected(self) -> Float[Tensor, "d d"]:
        """T = V A V^T on those rows, symmetric to the last bit."""
        T = self._projected[: self.multiplied, : self.multiplied]
        return (T + T.T) / 2

    @property
    def reaching(self) -> Float[Tensor, "s s"]:
        """The same on all rows: zero on the frontier, of which only what couples it to those before is known."""
        T = self._projected[: self.size, : self.size]
        return (T + T.T) / 2

    def start(self, rows: Float[Tensor, "k n"]) -> slice:
        """Take what `rows` span beyond the basis as the frontier: the first, or a new one of an invariant basis.

        Returns where it lies.
        """
        rows = rows / self.space.norms(rows).to(rows.dtype).unsqueeze(1)
        self._project_out(rows)
        return self._append(rows, small=0.0)[0]

    def step(self) -> bool:
        """Multiply the frontier by A and extend T; False when the basis spans an invariant subspace."""
        frontier = slice(self.size - self.width, self.size)
        rows = self.measurement.apply(self._basis[frontier].to(self.measurement.operator.device)).to(self.space.device)
        self.scale = max(self.scale, float(self.space.norms(rows).max()))
        near = slice(_first(self._projected[frontier, : self.size], frontier.start), self.size)
        components = self._near(rows, frontier, near)
        if self._must_clean(rows, components, slice(0, near.start)):
            found = self._project_out(rows)
            self._asymmetry(found)
            components += found
        self._couple(frontier, slice(0, self.size), components)
        self.multiplied, self.remainder = self.size, rows
        self.edge = torch.eye(self.size, dtype=torch.float64, device=rows.device)[frontier]
        return bool(self.space.norms(rows).max() > self.rounding)

    def extend(self) -> bool:
        """Make the remainder the next frontier; False when nothing of it is left."""
        block = slice(self.size - self.width, self.size)
        fresh, coupling = self._append(self.remainder, small=self.rounding, clean=True)
        self._couple(fresh, block, coupling)
        return self.width > 0

    def restart(
        self, values: Float[Tensor, " k"], vectors: Float[Tensor, "d k"], fresh: Float[Tensor, "b n"] | None = None
    ) -> None:
        """Keep only the given Ritz pairs, and as the frontier the remainder (Wu & Simon 2000, thick restart), with the
        `fresh` rows beside it."""
        kept, basis = len(values), self.basis
        self.multiplied = 0  # whoever is interrupted below finds nothing, rather than half of two bases
        for start in range(0, self.space.size, CHUNK):  # in place, so that a restart needs no second basis
            columns = slice(start, start + CHUNK)
            self._basis[:kept, columns] = self.space.combine(vectors.T, basis[:, columns])
        self.edge = self.edge @ vectors
        self._projected.zero_()
        self._projected[:kept, :kept] = torch.diag(values)
        self.size = self.multiplied = kept
        frontier, _ = self._append(self.remainder, small=self.rounding)
        if fresh is not None:
            frontier = slice(frontier.start, self.start(fresh).stop)
            self.width = frontier.stop - frontier.start
        self._couple(frontier, slice(0, kept), self.space.inner(self._basis[frontier], self.remainder) @ self.edge)

    def enlarge(self, rows: int) -> None:
        """Make room for so many more rows, as far as the space has them."""
        rows = min(rows, self.space.size - self.capacity)
        need_basis(self.capacity + rows, self.space)  # beside the old one, for a moment
        self._basis = torch.cat([self._basis, self._basis.new_empty(rows, self.space.size)])
        projected = self._projected.new_zeros(self.capacity, self.capacity)
        projected[: len(self._projected), : len(self._projected)] = self._projected
        self._projected = projected

    @property
    def state(self) -> dict[str, Tensor]:
        """All there is to go on from after a restart."""
        scalars = (self.capacity, self.width, self.multiplied, self.noise, self.scale)
        basis, projected = self._basis[: self.size], self._projected[: self.size, : self.size]
        return {"basis": basis, "projected": projected, "scalars": torch.tensor(scalars, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        capacity, width, multiplied, self.noise, self.scale = state["scalars"].tolist()
        self.enlarge(int(capacity) - self.capacity)
        self.size, self.width, self.multiplied = len(state["basis"]), int(width), int(multiplied)
        self._basis[: self.size] = state["basis"]
        self._projected[: self.size, : self.size] = state["projected"]

    def residuals(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
        """Norms of A y - theta y for the Ritz vectors y = vectors^T V: what A y has outside the basis."""
        outside = self.edge @ vectors
        gram = self.space.inner(self.remainder, self.remainder)
        return (outside * (gram @ outside)).sum(0).clamp(min=0).sqrt()

    @property
    def rounding(self) -> float:
        """Norms up to this are rounding."""
        return self.space.rounding(self.scale)

    def _append(self, rows: Tensor, *, small: float, clean: bool = False) -> tuple[slice, Tensor]:
        """Append what `rows` span, beyond `small`, as the frontier; returns where it lies, and its products with them.

        `rows` have been cleaned of the basis once; the second time ("twice is enough", Giraud et al. 2005) comes after
        they were normalised, so that it also removes what cancellation has blown up. Where they are `clean` to rounding
        that is nothing unless they are nearly dependent.
        """
        fresh = self.space.orthonormal(rows, small=small)
        coupling = self.space.inner(fresh, rows)
        clean = clean and len(fresh) == len(rows) and _condition(coupling) <= BLOWN_UP
        if not clean:
            self._project_out(fresh)
            fresh = self.space.orthonormal(fresh)
            coupling = self.space.inner(fresh, rows)
        place = slice(self.size, min(self.size + len(fresh), self.capacity))
        self.width = place.stop - place.start
        self._basis[place] = fresh[: self.width]
        if self.overlaps is not None:
            self.overlaps.append(place, coupling if clean else None)
        self.size = place.stop
        return place, coupling[: self.width]

    def _near(self, rows: Tensor, frontier: slice, near: slice) -> Float[Tensor, "k d"]:
        """Remove from the products with the frontier, in place, what they have of it and of the rows T couples it to,
        together `near`; returns that.

        T is symmetric, so it says the latter from earlier steps: what is found beside it is noise.
        """
        components = self._projected[frontier, : self.size].clone()
        basis, count = self._basis[near], len(rows)
        self.space.subtract(rows, components[:, near], basis)
        found = self.space.inner(rows, basis)
        self.space.subtract(rows, found, basis)
        square = found[:, -count:]
        self.noise = max(self.noise, self._asymmetry(found[:, :-count]), self._asymmetry(square - square.T))
        rest = self.space.roughly(rows, basis)  # a second time, of what may be rounding of all that was removed
        self.space.subtract(rows, rest, basis)
        components[:, near] += found + rest
        return components

    def _must_clean(self, rows: Tensor, components: Tensor, far: slice) -> bool:
        """Whether too much of the rows `far` may have come back in the remainder."""
        if self.overlaps is None:
            return True
        added = max(self.noise, self.space.eps * self.scale / self.space.size**0.5)
        T = self._projected[: self.size, : self.size]
        return self.overlaps.excessive(components, T, far, added, self.space.norms(rows))

    def _asymmetry(self, differences: Tensor) -> float:
        """The largest of these |u.Av - v.Au|; refuses what is no rounding."""
        largest = float(differences.abs().amax()) if differences.numel() else 0.0
        check_symmetry(largest, self.scale, self.space)
        return largest

    def _project_out(self, rows: Tensor) -> Float[Tensor, "k d"]:
        """Remove from `rows`, in place, their components in the basis; returns the components.

        A second time where the first leaves less than half of them, which may then be rounding of what was removed.
        """
        basis = self._basis[: self.size]
        total = torch.zeros(len(rows), self.size, dtype=torch.float64, device=rows.device)
        for _ in range(2):
            lengths = self.space.norms(rows)
            components = self.space.roughly(rows, basis)
            self.space.subtract(rows, components, basis)
            total += components
            if bool((self.space.norms(rows) >= lengths / 2).all()):
                break
        return total

    def _couple(self, rows: slice, columns: slice, coupling: Tensor) -> None:
        self._projected[rows, columns] = coupling
        self._projected[columns, rows] = coupling.T


class Overlaps:
    """What the rows of a basis have of each other, about: whether a remainder must be cleaned of them.

    Of rows far back it has what its two blocks have of the products of those with A, which T says, and what rounding
    adds. T is exact, as the matrix on an orthonormal basis of the same space, as long as the overlaps stay below the
    root of rounding. Simon 1984 (Math. Comp. 42); Grimes, Lewis & Simon 1994 (SIAM J. Matrix Anal. Appl. 15).
    """

    def __init__(self, capacity: int, space: Space) -> None:
        self.rounding = space.eps
        self.limit = min(SPARED * space.eps, space.eps**0.5)
        self.gram = torch.eye(capacity, dtype=torch.float64, device=space.device)
        self.remainder = self.gram[:0]
        self.again = False  # two in a row are cleaned, as the one after comes of both

    def excessive(self, components: Tensor, T: Tensor, far: slice, added: float, lengths: Tensor) -> bool:
        """Whether the remainder that has these lengths must be cleaned; it is taken to have been then."""
        count, size = components.shape
        gram = self.gram[:size, :size]
        back = gram[-count:] @ T[:, far] - components @ gram[:, far]
        back += torch.copysign(back.new_tensor(added), back)
        first = not self.again and bool((back.abs() > self.limit * lengths.unsqueeze(1)).any())
        clean, self.again = first or self.again, first
        self.remainder = gram.new_zeros(count, size)
        self.remainder[:, far] = self.rounding * lengths.unsqueeze(1) if clean else back
        return clean

    def append(self, place: slice, coupling: Tensor | None) -> None:
        """Take over new rows: the remainder is `coupling`^T times those, or they were cleaned on their own."""
        count, before = place.stop - place.start, slice(0, place.start)
        if coupling is None:
            rows = self.gram.new_full((count, place.start), self.rounding)
        else:
            rows = torch.linalg.solve(coupling.T, self.remainder)[:count]
        self.gram[place, before], self.gram[before, place] = rows, rows.T


def _first(components: Tensor, default: int) -> int:
    """The first column that is not zero."""
    columns = components.any(0).nonzero()
    return int(columns[0]) if len(columns) else default


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[-1]) if len(values) else 1.0


class Recurrence:
    """T of the same process, with two blocks of rows kept: each is orthogonal to the one before.

    To those further back it is only but for rounding, which brings eigenvalues that have converged in again, as copies
    that share their weight: the distribution stays right, and nothing can be counted. Paige 1976 (J. Inst. Maths
    Applics 18).
    """

    def __init__(self, measurement: Measurement, width: int) -> None:
        self.measurement = measurement
        self.space: Space = measurement.operator.domain
        need_basis(4 * width, self.space)
        self.before = self.frontier = self.remainder = self.space.empty
        self.blocks: list[Tensor] = []  # on the diagonal of T, which is block tridiagonal
        self.couplings: list[Tensor] = []  # of each to the one before
        self.noise = self.scale = 0.0  # as in Krylov

    def start(self, rows: Float[Tensor, "k n"]) -> None:
        """Take what `rows` span as the frontier."""
        self.frontier = self.space.orthonormal(rows)

    def step(self) -> bool:
        """Multiply the frontier by A and extend T; False when nothing is left to go on with."""
        rows, space = self.measurement.apply(self.frontier), self.space
        self.scale = max(self.scale, float(space.norms(rows).max()))
        block = space.inner(rows, self.frontier)
        asymmetry = float((block - block.T).abs().max())
        self.noise = max(self.noise, asymmetry)
        check_symmetry(asymmetry, self.scale, space)
        self.blocks.append((block + block.T) / 2)
        for near in (self.before, self.frontier, self.before, self.frontier):
            rows = rows - space.combine(space.inner(rows, near), near)
        self.remainder = rows
        return bool(space.norms(rows).max() > self.rounding)

    def extend(self) -> bool:
        """Make what the products have beyond the two blocks the next one; False when nothing of it is left."""
        fresh = self.space.orthonormal(self.remainder, small=self.rounding)
        self.couplings.append(self.space.inner(fresh, self.remainder))
        self.before, self.frontier = self.frontier, fresh
        return len(fresh) > 0

    @property
    def multiplied(self) -> int:
        """Rows whose product with A is known."""
        return sum(map(len, self.blocks))

    @property
    def projected(self) -> Float[Tensor, "d d"]:
        """T on those rows."""
        T = torch.block_diag(*self.blocks)
        place = 0
        for block, coupling in zip(self.blocks, self.couplings[: len(self.blocks) - 1], strict=False):
            rows = slice(place + len(block), place + len(block) + len(coupling))
            T[rows, place : place + len(block)] = coupling
            T[place : place + len(block), rows] = coupling.T
            place += len(block)
        return T

    @property
    def rounding(self) -> float:
        """Norms up to this are rounding."""
        return self.space.rounding(self.scale)

    def residuals(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
        """What A y has beyond the last block, for the Ritz vectors y, as if all rows were orthogonal."""
        outside = vectors[-len(self.blocks[-1]) :]
        gram = self.space.inner(self.remainder, self.remainder)
        return (outside * (gram @ outside)).sum(0).clamp(min=0).sqrt()


def check_symmetry(asymmetry: float, scale: float, space: Space) -> None:
    """Refuse an operator whose projection is not symmetric: its Ritz values would be numbers without meaning."""
    if asymmetry > max(space.eps**0.5, ROUNDED) * scale + torch.finfo(space.dtype).tiny:
        raise ValueError(
            f"The operator is not symmetric: |u.Av - v.Au| reached {asymmetry:.2g}, with |A| about "
            f"{scale:.2g}. If it comes from a model, objective.check() looks for the cause."
        )
