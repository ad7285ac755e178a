"""Influence: the examples that helped and hurt most, as bars, or for several tests as points."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvature.plots.style import BLACK, BLUE, ORANGE
from curvature.uses.influence import Influence

LABELLED = 60  # bars that are told apart by the number of their example


def draw_influence(result: Influence, ax: Axes, **style: Any) -> Axes:
    """The ranked scores: bars for one test; for several a column of points each, on a signed logarithmic axis."""
    scores = result.ranked_scores.numpy()
    colors = np.where(scores >= 0, BLUE, ORANGE)
    if scores.ndim == 1:
        places = np.arange(len(scores))
        ax.bar(places, scores, **{"color": colors, **style})
        labelled = len(places) <= LABELLED
        ax.set_xticks(places if labelled else [], [str(i) for i in result.ranked.tolist()] if labelled else [])
        ax.tick_params(axis="x", rotation=90, labelsize="small")
    else:
        tests = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        ax.scatter(tests.ravel(), scores.ravel(), **{"s": 6, "c": colors.ravel(), **style})
        ax.set_yscale("symlog", linthresh=float(np.median(np.abs(scores))) or 1.0)
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set(xlabel="training example" if scores.ndim == 1 else "test example", ylabel="influence, in units of the loss")
    return ax
