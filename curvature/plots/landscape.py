"""Landscapes: profiles along a line, and filled contours of a plane with levels that are evenly spaced in the logarithm
above the lowest loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from curvature.plots.style import BLACK, BLUE, GREY, ORANGE
from curvature.probes.landscape import Landscape

LEVELS = 24
DECADES = 5.0  # of the height above the lowest loss that are told apart


def draw_landscape(result: Landscape, ax: Axes, **style: Any) -> Axes:
    """A line with its accuracy and other data where there are such; a plane as contours. TypeError for a volume."""
    if result.loss.ndim == 1:
        return _draw_line(result, ax, **style)
    if result.loss.ndim == 2:
        return _draw_plane(result, ax, **style)
    raise TypeError("A volume has no picture. Draw planes through it: `result.loss[i]` over `result.coordinates`.")


def _draw_line(result: Landscape, ax: Axes, *, color: str = BLUE, label: str = "loss", **style: Any) -> Axes:
    t = result.coordinates.numpy()
    ax.plot(t, result.loss.numpy(), color=color, label=label, **style)
    if result.held_out_loss is not None:
        ax.plot(t, result.held_out_loss.numpy(), color=color, ls="--", label="held-out loss")
    ax.plot(0, result.centre, "o", color=BLACK, ms=4)
    ax.set_xlabel("distance along the direction, in its lengths")
    ax.set_ylabel("loss")
    handles, labels = ax.get_legend_handles_labels()
    for values, dashes, name in (
        (result.accuracy, "-", "accuracy"),
        (result.held_out_accuracy, "--", "held-out accuracy"),
    ):
        if values is not None:
            twin = ax.twinx() if dashes == "-" else twin
            handles += twin.plot(t, values.numpy(), color=ORANGE, ls=dashes)
            labels.append(name)
            twin.set_ylabel("accuracy", color=ORANGE)
            twin.set_ylim(-0.02, 1.02)
    if len(handles) > 1:
        ax.legend(handles, labels, fontsize="small", frameon=False)
    return ax


def _draw_plane(
    result: Landscape, ax: Axes, *, lowest: float | None = None, highest: float | None = None, **style: Any
) -> Axes:
    """`lowest` and `highest` fix the scale, so that planes can be compared."""
    loss, t = result.loss.numpy(), result.coordinates.numpy()
    finite = loss[np.isfinite(loss)]
    low = float(finite.min()) if lowest is None else lowest
    high = float(finite.max()) if highest is None else highest
    span = max(high - low, 1e-12 * max(abs(low), 1.0))
    height = np.log10(np.clip((np.where(np.isfinite(loss), loss, np.nan) - low) / span, 10**-DECADES, 1.0))
    levels = np.linspace(-DECADES, 0, LEVELS)
    filled = ax.contourf(t, t, height.T, levels=levels, **{"cmap": "cividis", "extend": "max", **style})
    ax.contour(t, t, height.T, levels=levels[::3], colors=BLACK, linewidths=0.3)
    ax.set_facecolor(GREY)  # where the loss is not finite
    ax.plot(0, 0, "o", color=BLACK, ms=4)
    ax.set_aspect("equal")
    ax.set_xlabel("along the first direction")
    ax.set_ylabel("along the second")
    bar = ax.figure.colorbar(filled, ax=ax, ticks=np.arange(-DECADES, 1))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{low + span * 10**x:.3g}"))
    bar.set_label("loss")
    return ax
