"""Landscapes that can be turned and asked for their values, with plotly: the only importer of it.

Needs the extra `interactive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curvature.plots.landscape import Scale
from curvature.plots.style import BLUE
from curvature.probes.landscape import Landscape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHELLS = 6  # surfaces of equal loss in a volume


def turnable(result: Landscape) -> Figure:
    """A line as a curve, a plane as a surface, a volume as nested surfaces; ImportError without plotly."""
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise ImportError('Interactive pictures need plotly: pip install "curvature-toolkit[interactive]".') from error
    loss, t = result.loss.numpy(), result.coordinates.numpy()
    names = list(result.names or ("first direction", "second direction", "third direction"))
    if loss.ndim == 1:
        curve = graph_objects.Scatter(x=t, y=loss, mode="lines", line={"color": BLUE})
        return graph_objects.Figure(curve, {"xaxis": {"title": names[0]}, "yaxis": {"title": "loss"}})
    scale = Scale.of([loss])
    heights = scale.heights(loss)
    bar = {"title": "loss", "tickvals": scale.ticks, "ticktext": [scale.name(tick) for tick in scale.ticks]}
    colours: dict[str, Any] = {"colorscale": "Cividis", "cmin": -scale.decades, "cmax": 0.0, "colorbar": bar}
    titles = dict(zip(("xaxis", "yaxis", "zaxis"), ({"title": name} for name in (*names[:2], "loss")), strict=True))
    if loss.ndim == 2:
        shown = np.where(np.isfinite(loss), loss, np.nan)
        drawn = graph_objects.Surface(
            x=t, y=t, z=shown.T, surfacecolor=heights.T, customdata=shown.T, hovertemplate="%{z:.4g}", **colours
        )
        return graph_objects.Figure(drawn, {"scene": titles})
    places = np.meshgrid(t, t, t, indexing="ij")
    drawn = graph_objects.Isosurface(
        **dict(zip("xyz", (place.ravel() for place in places), strict=True)),
        value=heights.ravel(),
        isomin=float(np.nanmin(heights)),
        isomax=0.0,
        surface_count=SHELLS,
        opacity=0.3,
        caps={"x_show": False, "y_show": False, "z_show": False},
        text=[f"{value:.4g}" for value in loss.ravel()],
        **colours,
    )
    return graph_objects.Figure(drawn, {"scene": titles | {"zaxis": {"title": names[2]}}})
