"""One row for each layer: its trace, its eigenvalues, or where its spectrum lies."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from curvature.linalg.eigenpairs import Eigenpairs
from curvature.linalg.spectrum import SpectralDensity
from curvature.operators.by_layer import ByLayer
from curvature.plots.spectrum import signed_log_axis
from curvature.plots.style import BLUE, GREY, ORANGE
from curvature.result import Estimate, Result


def draw_by_layer(result: ByLayer, ax: Axes, *, color: str = BLUE, **style: Any) -> Axes:
    """Layers from top to bottom, on one axis."""
    ax.axvline(0, color=GREY, lw=0.8)
    for row, item in enumerate(result.results):
        _draw_row(item, ax, row, color=color, labelled=row == 0, **style)
    ax.set_yticks(range(len(result)), result.names)
    ax.set_ylabel(str(result.origin.options["by"]) if isinstance(result.origin.options["by"], str) else "group")
    ax.invert_yaxis()
    spectra = [item for item in result.results if isinstance(item, SpectralDensity)]
    if spectra:
        nodes = np.concatenate([item.nodes[[0, -1]].numpy() for item in spectra])
        signed_log_axis(ax, max(item.unit for item in spectra), nodes.min(), nodes.max())
        ax.set_xlabel("eigenvalue (signed logarithmic axis)")
        ax.legend(fontsize="small", frameon=False, loc="best")
    else:
        of = result.origin.options["of"]
        ax.set_xlabel(f"{'eigenvalues' if of == 'eigsh' else of} of each layer")
    return ax


def _draw_row(item: Result, ax: Axes, row: int, *, color: str, labelled: bool, **style: Any) -> None:
    def label(text: str) -> str | None:
        return text if labelled else None

    match item:
        case SpectralDensity():
            low, high = item.nodes[[0, -1]].tolist()
            ax.plot([low, high], [row, row], color=color, lw=1, alpha=0.6, label=label("all"), **style)
            ax.plot([item.quantile(0.05), item.quantile(0.95)], [row, row], color=color, lw=6, alpha=0.6,
                    solid_capstyle="butt", label=label("90 %"))  # fmt: skip
            outliers = item.outliers.numpy()
            ax.plot(outliers, np.full(len(outliers), row), "o", color=ORANGE, ms=3, label=label("outliers"))
        case Eigenpairs():
            ax.errorbar(item.values.cpu().numpy(), np.full(len(item.values), row), xerr=item.residuals.cpu().numpy(),
                        fmt="o", color=color, capsize=3, **style)  # fmt: skip
        case Estimate() if item.value.ndim == 0:
            low, high = (float(bound) for bound in item.interval())
            ax.errorbar(float(item), row, xerr=[[float(item) - low], [high - float(item)]], fmt="o", color=color,
                        capsize=3, **style)  # fmt: skip
        case _:
            raise TypeError(f"A {type(item).__name__} of each layer has no picture. Draw the results one by one.")
