"""The table of sharpness: every measure as a point with its error, on one logarithmic axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvature.plots.style import BLUE, ORANGE
from curvature.probes.sharpness import Sharpness


def draw_sharpness(result: Sharpness, ax: Axes, **style: Any) -> Axes:
    """Magnitudes, since the measures have units of their own: those that do not depend on how the function is written
    as weights apart from those that do. What is zero or not finite is left out."""
    values, errors = result.values.abs().numpy(), result.stderrs.nan_to_num().numpy()
    places = -np.arange(len(values))
    shown = np.isfinite(values) & (values > 0)
    for invariant, color, label in ((True, BLUE, "invariant"), (False, ORANGE, "not invariant")):
        some = shown & (np.array(result.invariant) == invariant)
        kind = {"fmt": "o", "ms": 5, "color": color, "label": label}
        ax.errorbar(values[some], places[some], xerr=errors[some], **{**kind, **style})
    ax.set_xscale("log")
    ax.set_yticks(places, result.names)
    ax.grid(axis="y", lw=0.3)
    ax.set_xlabel("magnitude, each in its own units, with its standard error")
    ax.legend(frameon=False, fontsize="small")
    return ax
