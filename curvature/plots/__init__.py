"""Pictures of results, with matplotlib: the only importer of it. A plot draws what a result holds and computes nothing.

Needs the extra `plot`; importing this module without matplotlib raises an error that says so.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvature.comparison import Comparison
from curvature.diagnostics.stability import StableRates
from curvature.diagnostics.subspace import GradientShare
from curvature.io.files import write_atomically
from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.spectrum import SpectralDensity
from curvature.operators.by_layer import ByLayer
from curvature.optim.benchmark import Benchmark
from curvature.plots.style import SIZE, new_axes
from curvature.probes.landscape import Landscape
from curvature.probes.path import Path as PathResult
from curvature.probes.persistence import Persistence
from curvature.probes.roughness import Roughness
from curvature.probes.sharpness import Sharpness
from curvature.probes.trajectory import Trajectory
from curvature.result import Estimate, Result
from curvature.uses.influence import Influence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure


def save_picture(result: Result, path: Path, *, surface: bool = False, **style: Any) -> None:
    """Draw `result` into a file, on a figure that no window and no global state knows of."""
    from matplotlib.figure import Figure

    if isinstance(result, Comparison) and (both := _landscapes(result)):
        figure = compare(both, figure=Figure(layout="constrained"), **style)
    else:
        figure = Figure(figsize=SIZE, layout="constrained")
        plot(result, figure.add_subplot(projection="3d" if surface else None), **style)
    kind = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=150, bbox_inches="tight"))


def _landscapes(result: Comparison) -> dict[str, Landscape]:
    """Those that are compared, by name, where they are of one kind and can be drawn on one scale."""
    found = {name: r for name, r in zip(result.labels, result.results, strict=True) if isinstance(r, Landscape)}
    kinds = {landscape.loss.ndim for landscape in found.values()}
    return found if len(found) == 2 and kinds in ({1}, {2}) else {}


def svg(result: Result) -> str:
    """The picture of `result` as an SVG element for a page: the same numbers give the same text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure, written = Figure(figsize=SIZE, layout="constrained"), io.StringIO()
    plot(result, figure.add_subplot())
    with rc_context({"svg.hashsalt": "curvature"}):
        figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    drawn = written.getvalue()
    return drawn[drawn.index("<svg") :]


@singledispatch
def plot(result: Result, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw `result` on `ax`, or on new axes, and return the axes; TypeError for a kind that has no picture."""
    raise TypeError(f"{type(result).__name__} has no picture. Draw its fields: {', '.join(result.arrays())}.")


def drawable(result: Result) -> bool:
    """Whether `plot` knows how to draw results of this kind."""
    return plot.dispatch(type(result)) is not plot.dispatch(Result)


@plot.register(SpectralDensity)
def _(result: SpectralDensity, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.spectrum import draw_density

    return draw_density(result, new_axes() if ax is None else ax, **style)


@plot.register(Eigenpairs)
def _(result: Eigenpairs, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.spectrum import draw_eigenvalues

    return draw_eigenvalues(result, new_axes() if ax is None else ax, **style)


@plot.register(ByLayer)
def _(result: ByLayer, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.layers import draw_by_layer

    return draw_by_layer(result, new_axes() if ax is None else ax, **style)


@plot.register(Landscape)
def _(result: Landscape, ax: Axes | None = None, *, surface: bool = False, **style: Any) -> Axes:
    from curvature.plots.landscape import draw_landscape

    return draw_landscape(result, new_axes("3d" if surface else None) if ax is None else ax, **style)


@plot.register(PathResult)
def _(result: PathResult, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.path import draw_path

    return draw_path(result, new_axes() if ax is None else ax, **style)


@plot.register(Roughness)
def _(result: Roughness, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.roughness import draw_roughness

    return draw_roughness(result, new_axes() if ax is None else ax, **style)


@plot.register(Sharpness)
def _(result: Sharpness, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.sharpness import draw_sharpness

    return draw_sharpness(result, new_axes() if ax is None else ax, **style)


@plot.register(Persistence)
def _(result: Persistence, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.roughness import draw_persistence

    return draw_persistence(result, new_axes() if ax is None else ax, **style)


@plot.register(Trajectory)
def _(result: Trajectory, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.landscape import draw_trajectory

    return draw_trajectory(result, new_axes() if ax is None else ax, **style)


@plot.register(Influence)
def _(result: Influence, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.influence import draw_influence

    return draw_influence(result, new_axes() if ax is None else ax, **style)


@plot.register(Comparison)
def _(result: Comparison, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.comparison import draw_comparison

    return draw_comparison(result, new_axes() if ax is None else ax, **style)


@plot.register(StableRates)
def _(result: StableRates, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.training import draw_rates

    return draw_rates(result, new_axes() if ax is None else ax, **style)


@plot.register(GradientShare)
def _(result: GradientShare, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.training import draw_share

    return draw_share(result, new_axes() if ax is None else ax, **style)


@plot.register(Benchmark)
def _(result: Benchmark, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.benchmark import draw_benchmark

    return draw_benchmark(result, new_axes() if ax is None else ax, **style)


def interactive(result: Landscape) -> PlotlyFigure:
    """A plotly figure of a landscape: a curve, a surface that can be turned, or the nested surfaces of a volume."""
    from curvature.plots.browser import turnable

    return turnable(result)


def compare(results: Mapping[str, Landscape], *, figure: Figure | None = None, **style: Any) -> Figure:
    """A figure of landscapes by name, a new one unless it is given: lines on common axes, planes beside each other on
    one scale of colours."""
    from curvature.plots.landscape import compare_landscapes

    return compare_landscapes(results, figure, **style)


@plot.register(Estimate)
def _(result: Estimate, ax: Axes | None = None, **style: Any) -> Axes:
    from curvature.plots.spectrum import draw_estimate

    return draw_estimate(result, new_axes() if ax is None else ax, **style)
