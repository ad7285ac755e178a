"""What all pictures share: axes of their own without global state, and colours that survive print and colour-blindness."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008: told apart with every kind of colour blindness, and in grey
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#8c8c8c", "#222222"


def new_axes(width: float = 7.0, height: float = 4.2) -> Axes:
    """Axes on a figure of their own, which no pyplot state knows of and no window opens for."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "curvature-toolkit[plot]".') from error
    return Figure(figsize=(width, height), layout="constrained").add_subplot()
