"""Comparisons: two spectra on one axis, or the relative difference of every number with its interval."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvature.comparison import Comparison
from curvature.linalg.spectrum import SpectralDensity
from curvature.plots.spectrum import draw_densities
from curvature.plots.style import BLACK, BLUE, GREY, ORANGE


def draw_comparison(result: Comparison, ax: Axes, **style: Any) -> Axes:
    """What both are, where they are spectra; else a row for each number: its difference, relative to the first."""
    both = {name: r for name, r in zip(result.labels, result.results, strict=True) if isinstance(r, SpectralDensity)}
    if len(both) == 2:
        return draw_densities(both, ax)
    rows = [row for row in result.rows if row.first and np.isfinite(row.quantity.value)]
    for place, row in enumerate(rows):
        scale, quantity = 100 / abs(row.first), row.quantity
        low, high = (scale * abs(edge - quantity.value) for edge in quantity.interval(result.level))
        color = GREY if row.p is None else ORANGE if row.different else BLUE
        ax.errorbar(scale * quantity.value, -place, xerr=[[low], [high]],
                    **{"fmt": "o", "ms": 5, "color": color, "capsize": 3, **style})  # fmt: skip
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set_yticks([-place for place in range(len(rows))], [row.name for row in rows])
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    ax.grid(axis="y", lw=0.3)
    first, second = result.labels
    ax.set_xlabel(f"{second} - {first}, % of {first}, each with its {100 * result.level:g} % interval")
    ax.set_title("orange: different; blue: not; grey: no error is known", fontsize="small")
    return ax
