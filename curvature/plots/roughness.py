"""Roughness as the profiles it was made of, and persistence as a diagram of births and deaths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from curvature.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, WHITE
from curvature.probes.persistence import Persistence
from curvature.probes.roughness import Roughness
from curvature.result import with_error

SINGLE = 5  # profiles that are drawn by themselves
KINDS = (("o", BLUE, "basins"), ("^", ORANGE, "loops"), ("s", GREEN, "shells"))


def draw_roughness(result: Roughness, ax: Axes, *, color: str = BLUE, **style: Any) -> Axes:
    """The rise of the loss along all directions: the median, bands that hold half and nine tenths of them, and a few by
    themselves."""
    s = result.coordinates.numpy()
    rises = result.profiles - result.profiles[:, [len(s) // 2]]
    finite = rises[rises.isfinite().all(1)]
    if len(finite):
        shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=rises.dtype)
        lowest, low, median, high, highest = finite.quantile(shares, dim=0).numpy()
        ax.fill_between(s, lowest, highest, color=color, alpha=0.2, lw=0, label="9 in 10 directions")
        ax.fill_between(s, low, high, color=color, alpha=0.35, lw=0, label="half of them")
        ax.plot(s, finite[:SINGLE].T.numpy(), color=BLACK, lw=0.5, alpha=0.6)
        ax.plot(s, median, **{"color": color, "lw": 1.8, "label": "median", **style})
        ax.legend(fontsize="small", loc="upper center", framealpha=0.8, edgecolor="none", borderpad=0.2)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    # below, where the legend is not in panels of any size
    told = with_error(float(result.value), float(result.stderr), result.dof)
    ax.text(0.5, 0.04, f"roughness {told}", transform=ax.transAxes,
            fontsize="small", color=BLACK, ha="center", bbox={"color": WHITE, "alpha": 0.8, "pad": 2})  # fmt: skip
    ax.set_xlabel("distance along a direction, in its lengths")
    ax.set_ylabel("loss - loss at the centre")
    return ax


def draw_persistence(result: Persistence, ax: Axes, **style: Any) -> Axes:
    """Each feature at its birth and death: the further above the diagonal, the deeper. On the dashed line are those
    that never die."""
    births, deaths, dimensions = (values.numpy() for values in (result.births, result.deaths, result.dimensions))
    levels = np.concatenate([births, deaths])
    levels = levels[np.isfinite(levels)]
    low, high = (levels.min(), levels.max()) if len(levels) else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.08 * max(abs(low), 1e-12)
    never = high + margin
    ax.plot([low - margin, never], [low - margin, never], color=GREY, lw=0.8)
    ax.axhline(never, color=GREY, lw=0.8, ls="--")
    ax.annotate("never", (1, never), (-4, 3), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                fontsize="small", color=GREY, ha="right")  # fmt: skip
    for dimension, (marker, color, name) in enumerate(KINDS):
        mine = dimensions == dimension
        if mine.any():
            drawn = {"color": color, "label": name, "ms": 5, "alpha": 0.8, **style}
            ax.plot(np.maximum(births[mine], low - margin), np.minimum(deaths[mine], never), marker, **drawn)
    ax.set_xlim(low - margin, never)
    ax.set_ylim(low - margin, never + margin)
    ax.set_xlabel("loss at birth")
    ax.set_ylabel("loss at death")
    if len(births):
        ax.legend(fontsize="small", frameon=False, loc="lower right")
    return ax
