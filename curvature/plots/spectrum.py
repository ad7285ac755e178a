"""Spectra: the density of the bulk with its error band, outliers as labelled sticks, the noise floor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.spectrum import Axis, SpectralDensity, percent
from curvature.plots.style import BLACK, BLUE, COLOURS, GREY, ORANGE
from curvature.result import Estimate, student_quantile

POINTS = 800
LABELS = 6  # outliers that get their value written beside them
ROOM = 0.02  # of the axis, that the label of a stick takes


def draw_density(
    result: SpectralDensity,
    ax: Axes,
    *,
    axis: Axis = "log",
    color: str = BLUE,
    label: str = "bulk",
    **style: Any,
) -> Axes:
    """Mass per unit of a signed logarithmic axis, or the linear one, on a logarithmic scale, down to half an
    eigenvalue."""
    lowest = 0.5 / result.size
    t = _points(result, ax, axis)
    density = result.density(torch.from_numpy(t), axis=axis)
    if axis == "linear":  # mass per unit of it may be any number: the share within a 50th of the axis says more
        scale = (t[-1] - t[0]) / 50
        density = replace(density, value=density.value * scale, stderr=density.stderr * scale)
    mean, stderr = density.value.numpy(), density.stderr.numpy()
    half = stderr * student_quantile(0.95, density.dof)
    ax.set_yscale("log")
    ax.fill_between(t, np.maximum(mean - half, lowest / 10), mean + half + lowest / 10, color=color, alpha=0.3, lw=0,
                    label="95 % band")  # fmt: skip
    ax.plot(t, np.maximum(mean, lowest / 10), color=color, lw=1.5, label=label, **style)
    _draw_sticks(result, ax, lowest, axis)
    ax.axvspan(-result.floor, result.floor, color=GREY, alpha=0.5, lw=1, zorder=0,
               label=f"noise floor ±{result.floor:.0e}")  # fmt: skip
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_ylim(lowest, 3 * max(mean.max(), 1 / result.size))
    ax.set_xlabel("eigenvalue (signed logarithmic axis)" if axis == "log" else "eigenvalue")
    ax.set_ylabel("share of eigenvalues per " + ("decade" if axis == "log" else "50th of the axis"))
    ax.set_title(_title(result), fontsize="medium")
    ax.legend(fontsize="small", frameon=False, loc="upper right")
    return ax


def draw_densities(results: Mapping[str, SpectralDensity], ax: Axes) -> Axes:
    """Several on one signed logarithmic axis: the bulk with its band, and outliers as points, one eigenvalue high."""
    unit = min(result.unit for result in results.values())
    ends = [float(result.nodes[place]) for result in results.values() for place in (0, -1)]
    signed_log_axis(ax, unit, min(ends), max(ends))
    low, high = (_forward(np.array(edge), unit) for edge in ax.get_xlim())
    t = _backward(np.linspace(low, high, POINTS), unit)
    lowest = min(0.5 / result.size for result in results.values())
    top = lowest
    for color, (name, result) in zip(COLOURS, results.items(), strict=False):
        density = result.density(torch.from_numpy(t))
        scale = (unit + np.abs(t)) / (result.unit + np.abs(t))  # of its own axis to this one
        mean = scale * density.value.numpy()
        half = scale * density.stderr.numpy() * student_quantile(0.95, density.dof)
        ax.fill_between(
            t, np.maximum(mean - half, lowest / 10), mean + half + lowest / 10, color=color, alpha=0.2, lw=0
        )
        ax.plot(t, np.maximum(mean, lowest / 10), color=color, lw=1.5, label=f"{name}, 95 % band")
        ax.plot(
            result.outliers.numpy(), np.full(len(result.outliers), 1 / result.size), "o", color=color, ms=4, alpha=0.7
        )
        top = max(top, mean.max(), 1 / result.size)
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set(yscale="log", ylim=(lowest, 3 * top))
    ax.set_xlabel("eigenvalue (signed logarithmic axis); points are outliers, one eigenvalue each")
    ax.set_ylabel("share of eigenvalues per decade")
    ax.legend(fontsize="small", frameon=False, loc="upper right")
    return ax


def draw_eigenvalues(result: Eigenpairs, ax: Axes, *, color: str = BLUE, **style: Any) -> Axes:
    """Each eigenvalue with its residual as the error bar, in the order asked for."""
    index = np.arange(1, len(result.values) + 1)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.errorbar(index, result.values.cpu().numpy(), yerr=result.residuals.cpu().numpy(), fmt="o", color=color,
                capsize=3, **style)  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator(index.tolist()))
    ax.set_xlabel("order")
    ax.set_ylabel("eigenvalue ± residual")
    return ax


def draw_estimate(result: Estimate, ax: Axes, *, color: str = BLUE, level: float = 0.95, **style: Any) -> Axes:
    """Each value with its confidence interval."""
    value = result.value.reshape(-1).numpy()
    low, high = (bound.reshape(-1).numpy() for bound in result.interval(level))
    index = np.arange(len(value))
    ax.errorbar(index, value, yerr=[value - low, high - value], fmt="o", color=color, capsize=3, **style)
    if result.names:
        ax.set_xticks(index, result.names, rotation=45, ha="right")
    elif len(index) < 30:
        ax.xaxis.set_major_locator(FixedLocator(index.tolist()))
    ax.set_ylabel(f"{result.origin.question}, {level:.0%} interval")
    return ax


def _points(result: SpectralDensity, ax: Axes, axis: Axis) -> np.ndarray:
    """Scale the axis, and return evenly spaced points on it."""
    low, high = result.nodes[0].item(), result.nodes[-1].item()
    if axis == "linear":
        margin = 0.06 * (high - low) or 1.0
        ax.set_xlim(low - margin, high + margin)
        return np.linspace(low - margin, high + margin, 5 * POINTS)  # the bulk may be a small part of it
    signed_log_axis(ax, result.unit, low, high)
    low, high = (_forward(np.array(edge), result.unit) for edge in ax.get_xlim())
    return _backward(np.linspace(low, high, POINTS), result.unit)


def _draw_sticks(result: SpectralDensity, ax: Axes, lowest: float, axis: Axis) -> None:
    """Outliers stand one eigenvalue high; the largest in magnitude carry their value, where there is room."""
    outliers = result.outliers.numpy()
    if not len(outliers):
        return
    ax.vlines(outliers, lowest, 1 / result.size, color=ORANGE, lw=1.2,
              label=f"{len(outliers)} outliers, one eigenvalue each")  # fmt: skip
    ax.plot(outliers, np.full(len(outliers), 1 / result.size), "o", color=ORANGE, ms=3)
    low, high = (_placed(float(node), result.unit, axis) for node in result.nodes[[0, -1]])
    placed: list[float] = []
    for value in outliers[np.argsort(-np.abs(outliers))]:
        place = _placed(value, result.unit, axis)
        if len(placed) == LABELS or any(abs(place - other) < ROOM * (high - low) for other in placed):
            continue
        placed.append(place)
        ax.annotate(f"{value:.3g}", (value, 1 / result.size), (0, 5), textcoords="offset points", rotation=90,
                    fontsize="x-small", color=BLACK, ha="center", va="bottom")  # fmt: skip


def _placed(t: float, unit: float, axis: Axis) -> float:
    return float(_forward(np.array(t), unit)) if axis == "log" else t


def _title(result: SpectralDensity) -> str:
    operator = result.origin.operator
    parts = [str(operator.get("operator", "operator")), f"{result.size:,} eigenvalues"]
    parts += [f"{percent(result.negative)} negative"]
    how = [f"{len(result.weights)} probes x {result.steps} steps", str(operator.get("dtype", ""))]
    how += [] if result.complete else ["interrupted"]
    return ", ".join(parts) + "\n" + ", ".join(how)


def signed_log_axis(ax: Axes, unit: float, low: float, high: float) -> None:
    """A scale that is linear within `unit` of zero and logarithmic beyond, with a tick at every other decade."""
    ax.set_xscale("function", functions=(lambda t: _forward(t, unit), lambda s: _backward(s, unit)))
    edges = [float(_forward(np.array(t), unit)) for t in (min(low, 0.0), max(high, 0.0))]
    margin = 0.06 * (edges[1] - edges[0]) + 0.1
    ax.set_xlim(*(float(_backward(np.array(s), unit)) for s in (edges[0] - margin, edges[1] + margin)))
    top = math.floor(math.log10(max(abs(low), abs(high), unit)))
    decades = [10.0**k for k in range(math.ceil(math.log10(unit)), top + 1)]
    ticks = [-t for t in decades if -t >= low * 1.5] + [0.0] + [t for t in decades if t <= high * 1.5]
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda t, _: "0" if t == 0 else f"{t:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )


def _forward(t: np.ndarray, unit: float) -> np.ndarray:
    return np.sign(t) * np.log10(1 + np.abs(t) / unit)


def _backward(s: np.ndarray, unit: float) -> np.ndarray:
    return np.sign(s) * unit * (10 ** np.abs(s) - 1)
