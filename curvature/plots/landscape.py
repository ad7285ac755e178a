"""Landscapes: profiles along a line, and filled contours or the surface over a plane, with levels that are evenly
spaced in the logarithm above the lowest loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from curvature.plots.style import BLACK, BLUE, COLOURS, GREY, ORANGE, WHITE
from curvature.probes.landscape import Landscape
from curvature.probes.trajectory import Trajectory

LEVELS = 24
DECADES = 5.0  # of the height above the lowest loss that are told apart, at most
NEAR = 0.005  # share of the points, the lowest ones, that need not be
TICKS = 6
PANEL = (4.6, 4.0)  # inches, of each of several planes


class Scale(NamedTuple):
    """Losses as heights above the lowest one: logarithms of shares of the whole, from -`decades` to 0."""

    low: float
    span: float
    decades: float

    @classmethod
    def of(cls, losses: list[np.ndarray], lowest: float | None = None, highest: float | None = None) -> Self:
        """That of all of them, or between bounds."""
        finite = np.concatenate([loss[np.isfinite(loss)] for loss in losses])
        low = float(finite.min()) if lowest is None else lowest
        high = float(finite.max()) if highest is None else highest
        span = max(high - low, 1e-12 * max(abs(low), 1.0))
        near = max(float(np.quantile((finite - low) / span, NEAR)), 10**-DECADES)
        return cls(low, span, max(1.0, -float(np.log10(near))))

    def heights(self, loss: np.ndarray) -> np.ndarray:
        """NaN where the loss is not finite."""
        shares = (np.where(np.isfinite(loss), loss, np.nan) - self.low) / self.span
        return np.log10(np.clip(shares, 10**-self.decades, 1.0))

    @property
    def ticks(self) -> np.ndarray:
        return np.linspace(-self.decades, 0, TICKS)

    def name(self, height: float) -> str:
        """The loss at a height; that at the bottom is the lowest."""
        return f"{self.low + (self.span * 10**height if height > -self.decades else 0.0):.3g}"


def draw_landscape(result: Landscape, ax: Axes, **style: Any) -> Axes:
    """A line with its accuracy and other data where there are such; a plane as contours, or as a surface on axes with
    three dimensions. TypeError for a volume."""
    if result.loss.ndim == 1:
        return _draw_line(result, ax, **style)
    if result.loss.ndim == 2:
        return _draw_surface(result, ax, **style) if ax.name == "3d" else _draw_plane(result, ax, **style)
    raise TypeError(
        "A volume has no flat picture. Draw `curvature.plots.interactive(result)`, or planes through it: "
        "`result.loss[i]` over `result.coordinates`."
    )


def compare_landscapes(results: Mapping[str, Landscape], figure: Figure | None = None, **style: Any) -> Figure:
    """Lines on common axes, planes beside each other on one scale of colours."""
    from matplotlib import pyplot

    if len({result.loss.ndim for result in results.values()}) != 1:
        raise ValueError("Expected landscapes of one kind, all lines or all planes.")
    figure = pyplot.figure(layout="constrained") if figure is None else figure
    if next(iter(results.values())).loss.ndim == 1:
        ax = figure.subplots()
        for color, (name, result) in zip(COLOURS, results.items(), strict=False):
            _draw_line(result, ax, **{"color": color, "label": name, "alone": False, **style})
        ax.legend(frameon=False, fontsize="small")
        return figure
    scale = Scale.of([result.loss.numpy() for result in results.values()])
    figure.set_size_inches(PANEL[0] * len(results), PANEL[1])
    axes = figure.subplots(1, len(results), squeeze=False)
    for ax, (name, result) in zip(axes[0], results.items(), strict=True):
        _draw_plane(result, ax, scale=scale, bar=ax is axes[0, -1], **style)
        ax.set_title(name, fontsize="medium")
    return figure


def draw_trajectory(result: Trajectory, ax: Axes, *, color: str = BLUE, **style: Any) -> Axes:
    """The first two components of the checkpoints, with what they and those of a random walk explain."""
    if result.coordinates.shape[1] < 2:
        raise TypeError("A trajectory of one component has no picture. Draw its `coordinates` over the steps.")
    _draw_run(result.coordinates, ax, color=color, **style)
    for place, name in enumerate(("x", "y")):
        own, walk = (float(shares[place]) for shares in (result.explained, result.walk))
        ax.set(**{f"{name}label": f"component {place + 1}: {own:.0%} of the variance (a random walk: {walk:.0%})"})
    return ax


def _draw_line(
    result: Landscape, ax: Axes, *, color: str = BLUE, label: str = "loss", alone: bool = True, **style: Any
) -> Axes:
    t = result.coordinates.numpy()
    ax.plot(t, result.loss.numpy(), color=color, label=label, **style)
    if result.held_out_loss is not None:
        ax.plot(t, result.held_out_loss.numpy(), color=color, ls="--", label=f"held-out {label}" if alone else None)
    ax.plot(0, result.centre, "o", color=BLACK, ms=4)
    ax.set_xlabel(_axis(result, 0) if result.names else "distance along the direction, in its lengths")
    ax.set_ylabel("loss")
    if alone:
        draw_accuracy(ax, t, result.accuracy, result.held_out_accuracy)
    return ax


def draw_accuracy(ax: Axes, t: np.ndarray, accuracy: Tensor | None, held_out: Tensor | None) -> None:
    """The shares of right answers on an axis of their own, and a legend of all curves where there are several."""
    handles, labels = ax.get_legend_handles_labels()
    place: dict[str, Any] = {}
    if accuracy is not None:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 4}  # curves on two axes leave no room inside
        twin = ax.twinx()
        handles += twin.plot(t, accuracy.numpy(), color=ORANGE)
        labels.append("accuracy")
        if held_out is not None:
            handles += twin.plot(t, held_out.numpy(), color=ORANGE, ls="--")
            labels.append("held-out accuracy")
        twin.set_ylabel("accuracy", color=ORANGE)
        twin.set_ylim(-0.02, 1.02)
    if len(handles) > 1:
        ax.legend(handles, labels, fontsize="small", frameon=False, **place)


def _draw_plane(
    result: Landscape,
    ax: Axes,
    *,
    lowest: float | None = None,
    highest: float | None = None,
    trajectory: Float[Tensor, "k n"] | None = None,
    scale: Scale | None = None,
    bar: bool = True,
    **style: Any,
) -> Axes:
    """`lowest` and `highest` fix the scale, so that planes can be compared; `trajectory` are the parameters of a run,
    as `positions` returns them."""
    loss, t = result.loss.numpy(), result.coordinates.numpy()
    scale = scale or Scale.of([loss], lowest, highest)
    levels = np.linspace(-scale.decades, 0, LEVELS)
    heights = scale.heights(loss).T
    filled = ax.contourf(t, t, heights, levels=levels, **{"cmap": "cividis", "extend": "max", **style})
    ax.contour(t, t, heights, levels=levels[::3], colors=BLACK, linewidths=0.3)
    ax.set_facecolor(GREY)  # where the loss is not finite
    if trajectory is not None:
        _draw_run(result.coordinates_of(trajectory), ax, color=ORANGE)
    ax.plot(0, 0, "o", color=BLACK, mec=WHITE, mew=0.5, ms=5)
    ax.set_aspect("equal")
    ax.locator_params(nbins=5)  # so that numbers with signs do not touch
    ax.set(xlim=(t[0], t[-1]), ylim=(t[0], t[-1]), xlabel=_axis(result, 0), ylabel=_axis(result, 1))
    if bar:
        drawn = ax.figure.colorbar(filled, ax=ax, ticks=scale.ticks)
        drawn.ax.yaxis.set_major_formatter(FuncFormatter(lambda height, _: scale.name(height)))
        drawn.set_label("loss")
    return ax


def _draw_surface(
    result: Landscape, ax: Any, *, lowest: float | None = None, highest: float | None = None, **style: Any
) -> Axes:
    """The height is the loss, cut at `highest`; the colour is that of the contours."""
    loss, t = result.loss.numpy(), result.coordinates.numpy()
    scale = Scale.of([loss], lowest, highest)
    shown = np.where(np.isfinite(loss), np.minimum(loss, scale.low + scale.span), np.nan)
    shades = colormaps[style.pop("cmap", "cividis")](1 + scale.heights(loss) / scale.decades)
    first, second = np.meshgrid(t, t, indexing="ij")
    options = {"rcount": len(t), "ccount": len(t), "linewidth": 0, "antialiased": True, "shade": False}
    ax.plot_surface(first, second, shown, facecolors=shades, **{**options, **style})
    ax.set(xlabel=_axis(result, 0), ylabel=_axis(result, 1), zlabel="loss")
    ax.locator_params(nbins=5)
    ax.set_box_aspect(None, zoom=0.85)  # labels of axes in three dimensions are left out of the layout
    return ax


def _draw_run(places: Float[Tensor, "k 2"], ax: Axes, *, color: str, **style: Any) -> None:
    """A line through places in order, with a ring at the first and a disc at the last."""
    x, y = places[:, 0].numpy(), places[:, 1].numpy()
    ax.plot(x, y, **{"color": color, "lw": 1.2, "marker": ".", "ms": 3, **style})
    ax.plot(x[0], y[0], "o", mfc=WHITE, mec=color, ms=6)
    ax.plot(x[-1], y[-1], "o", color=color, ms=6)


def _axis(result: Landscape, place: int) -> str:
    ordinal = ("first", "second")[place]
    return f"along the {result.names[place]}" if result.names else f"along the {ordinal} direction, in its lengths"
