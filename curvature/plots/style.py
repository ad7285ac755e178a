"""What all pictures share: their size, where they are drawn, and colours that survive print and colour-blindness."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError('Pictures need matplotlib: pip install "curvature-toolkit[plot]".')

# Okabe & Ito 2008: told apart with every kind of colour blindness, and in grey
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY, BLACK, WHITE = "#8c8c8c", "#222222", "#ffffff"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY, BLACK)  # of curves that are compared

SIZE = (7.0, 4.2)  # inches


def new_axes(projection: str | None = None) -> Axes:
    """Axes on a new figure of pyplot, so that notebooks show it and `plt.show()` finds it."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=SIZE, layout="constrained", subplot_kw={"projection": projection})[1]
