"""Paths: the loss from one end to the other, and what it rises above the straight line between them."""

from __future__ import annotations

import math
from typing import Any, Literal

from matplotlib.axes import Axes

from curvature.plots.landscape import draw_accuracy
from curvature.plots.style import BLACK, BLUE
from curvature.probes.path import Path

LABELS = {"t": "position on the path, t", "arc": "length along the path"}


def draw_path(
    result: Path, ax: Axes, *, over: Literal["t", "arc"] = "t", color: str = BLUE, label: str = "loss", **style: Any
) -> Axes:
    """The loss over t or the length of the path, its chord dashed and its barrier marked, with accuracy and other data
    where there are such."""
    if over not in LABELS:
        raise ValueError(f"over is 't' or 'arc', but got {over!r}.")
    x = result.t if over == "t" else result.arc
    inside, chord = x[result.between], result.chord(result.loss)
    ax.plot(inside.numpy(), chord.numpy(), color=color, ls=":", lw=1)
    ax.plot(x.numpy(), result.loss.numpy(), color=color, label=label, **style)
    ax.plot(inside[[0, -1]].numpy(), chord[[0, -1]].numpy(), "o", color=BLACK, ms=4)
    if result.held_out_loss is not None:
        ax.plot(x.numpy(), result.held_out_loss.numpy(), color=color, ls="--", label=f"held-out {label}")
    if 0 < result.barrier < math.inf:
        peak = result.heights(result.loss).argmax()
        at, low, high = (float(values[peak]) for values in (inside, chord, result.loss[result.between]))
        ax.plot([at, at], [low, high], color=BLACK, lw=0.8, marker="_")
        # at its foot, where a hump leaves most room beside it, and towards the middle
        left = at < float(inside.mean())
        text = {"xytext": (5, 4) if left else (-5, -8), "ha": "left" if left else "right"}
        text |= {"textcoords": "offset points", "fontsize": "small"}
        ax.annotate(f"barrier {result.barrier:.3g}", (at, low), **text)
    ax.set(xlabel=LABELS[over], ylabel="loss")
    draw_accuracy(ax, x.numpy(), result.accuracy, result.held_out_accuracy)
    return ax
