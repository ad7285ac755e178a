"""Trainings: the loss of each optimizer on its way, over steps or seconds."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from curvature.optim.benchmark import Benchmark
from curvature.plots.style import COLOURS


def draw_benchmark(result: Benchmark, ax: Axes, *, over: Literal["steps", "seconds"] = "steps", **style: Any) -> Axes:
    """A curve for each optimizer at its best learning rate, the mean over its trainings, in a band from the least of
    these to the most; held-out losses are dashed."""
    if over not in ("steps", "seconds"):
        raise ValueError(f"over is 'steps' or 'seconds', but got {over!r}.")
    for i, name in enumerate(result.names):
        color = COLOURS[i % len(COLOURS)]
        x = result.steps.numpy() if over == "steps" else result.seconds[i].mean(0).numpy()
        losses = np.where(np.isfinite(result.losses[i].numpy()), result.losses[i].numpy(), np.nan)
        ax.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0)
        label = f"{name}, lr {float(result.best[i]):.3g}"
        ax.plot(x, losses.mean(0), **{"color": color, "label": label, **style})
        if result.held_out is not None:
            ax.plot(x, result.held_out[i].mean(0).numpy(), color=color, ls="--", lw=1)
    ax.set(yscale="log", ylabel="loss" + ("" if result.held_out is None else " (held-out: dashed)"))
    ax.set_xlabel("steps" if over == "steps" else "seconds of gradients and steps")
    ax.legend(frameon=False, fontsize="small")
    return ax
