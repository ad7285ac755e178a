"""What curvature says of training: stable learning rates, and where the gradient lies."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from curvature.diagnostics.stability import StableRates
from curvature.diagnostics.subspace import GradientShare
from curvature.plots.style import BLUE, GREY, ORANGE


def draw_rates(result: StableRates, ax: Axes, *, color: str = BLUE, **style: Any) -> Axes:
    """A row for each rule on a logarithmic axis, with its 95 % interval; rules without a limit have none drawn."""
    shown, rows = result.value.isfinite().numpy(), -np.arange(len(result.names))
    low, values, high = (t.numpy()[shown] for t in (result.interval()[0], result.value, result.interval()[1]))
    errors = np.stack([values - np.maximum(low, values / 100), high - values])  # none reaches below zero
    ax.errorbar(values, rows[shown], xerr=errors, fmt="o", color=color, capsize=3, **style)
    ax.set_xscale("log")
    names = [name if finite else f"{name}: no limit" for name, finite in zip(result.names, shown, strict=True)]
    ax.set_yticks(rows, names)
    ax.set_ylim(rows[-1] - 0.6, 0.6)
    ax.grid(axis="x", lw=0.3)
    ax.set_xlabel("largest stable learning rate, 95 % interval")
    return ax


def draw_share(result: GradientShare, ax: Axes, *, color: str = BLUE, **style: Any) -> Axes:
    """The shares of the gradient and of those of batches, and what a random direction has, over how many eigenvectors
    there are."""
    first = np.arange(1, len(result.value) + 1)
    ax.plot(first, result.value.numpy(), "o-", color=color, label="gradient", **style)
    ax.errorbar(first, result.batches.numpy(), yerr=result.batches_stderr.nan_to_num().numpy(), fmt="s--", ms=4,
                color=ORANGE, capsize=3, label="gradients of batches, mean ± standard error")  # fmt: skip
    ax.plot(first, first / result.size, ":", color=GREY, label="a random direction")
    ax.set_ylim(-0.03, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("eigenvectors of the largest eigenvalues")
    ax.set_ylabel("share of the gradient's square")
    ax.legend(frameon=False, fontsize="small")
    return ax
