"""The shape of a landscape by its persistent homology: which minima are deep, and which are ripples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvature.linalg.work import Work
from curvature.probes.landscape import Landscape
from curvature.result import Quantity, Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Persistence(Result):
    """The persistence diagram of the sets where the loss is at most c, as c rises: each feature with the level of its
    birth and of its death, (k,), the longest-lived first, by its dimension: 0 for basins, 1 for rings around hills
    (loops), 2 for shells.

    A basin is born at a minimum of the grid, those on its edge included, and dies where it meets one that is deeper.
    The deepest never dies: infinity. `outside` counts points where the loss is infinity or NaN, which are in no such
    set: basins that only they separate from the rest do not die either.
    """

    births: Float[Tensor, " k"]
    deaths: Float[Tensor, " k"]
    dimensions: Int[Tensor, " k"]
    outside: int

    @property
    def lifetimes(self) -> Float[Tensor, " k"]:
        """Death less birth: how high one has to climb out of each basin."""
        return self.deaths - self.births

    def minima(self, threshold: float = 0.0) -> int:
        """How many minima have a higher barrier than `threshold` around them."""
        return int(((self.dimensions == 0) & (self.lifetimes > threshold)).sum())

    def total(self, dimension: int = 0) -> float:
        """The total persistence: the sum of the finite lifetimes of a dimension, 0 for one basin without ripples."""
        mine = self.lifetimes[self.dimensions == dimension]
        return float(mine[mine.isfinite()].sum())

    def summary(self) -> dict[str, str]:
        barriers = self.lifetimes[(self.dimensions == 0) & self.lifetimes.isfinite()]
        shown = {"minima": str(self.minima())}
        if len(barriers):
            highest = ", ".join(f"{float(barrier):.3g}" for barrier in barriers[:3])
            shown["highest barriers"] = f"{highest}; {self.total():.4g} in all"
        if len(self.dimensions) > self.minima():
            shown["loops and shells"] = str(len(self.dimensions) - self.minima())
        return shown | ({"not finite": f"at {self.outside:,} points"} if self.outside else {})

    def quantities(self) -> dict[str, Quantity]:
        return {"minima": Quantity(self.minima()), "total_persistence": Quantity(self.total())}

    __repr__ = Result.__str__


def persistence(landscape: Landscape) -> Persistence:
    """The persistence diagram of the sublevel sets of a landscape's loss, on its grid of any dimension.

    Points are neighbours along the axes, and a cell belongs to a set when all its corners do. What is finer than the
    grid is not seen; the lifetimes of what is seen are wrong by at most twice the error of the values. Needs the extra
    `topology` (gudhi).

    Edelsbrunner, Letscher & Zomorodian 2002 (Discrete Comput. Geom. 28); of losses Horoi et al. 2022
    (arXiv:2102.00485).
    """
    if not isinstance(landscape, Landscape):
        raise TypeError(
            f"persistence takes a Landscape, but got a {type(landscape).__name__}. Ask line or plane first."
        )
    complex_of = _cubical()
    work = Work(
        "persistence",
        options={"of": landscape.origin.question, **landscape.origin.options},
        seed=landscape.origin.seed,
        run=None,
        described=lambda: landscape.origin.operator,
        meters=lambda: [],
        device=landscape.loss.device,
    )
    loss = landscape.loss.numpy()
    outside = ~(loss < np.inf)  # NaN is not at most any level, and so in no set
    cells = complex_of(vertices=np.where(outside, np.inf, loss))
    cells.compute_persistence()
    found = [cells.persistence_intervals_in_dimension(dimension).reshape(-1, 2) for dimension in range(loss.ndim)]
    births, deaths = torch.from_numpy(np.concatenate(found)).unbind(1)
    dimensions = torch.repeat_interleave(torch.tensor([len(pairs) for pairs in found]))
    born = births < torch.inf
    births, deaths, dimensions = births[born], deaths[born], dimensions[born]
    order = (deaths - births).argsort(descending=True, stable=True)
    return Persistence(
        births=births[order],
        deaths=deaths[order],
        dimensions=dimensions[order],
        outside=int(outside.sum()),
        complete=landscape.complete,
        cost=work.cost,
        origin=work.origin,
    )


def _cubical() -> Any:
    try:
        from gudhi.cubical_complex import CubicalComplex
    except ImportError as error:
        raise ImportError('Persistent homology needs gudhi: pip install "curvature-toolkit[topology]".') from error
    return CubicalComplex
