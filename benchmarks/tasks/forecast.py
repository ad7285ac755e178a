"""fracast, a pretrained network of 85,001 parameters, forecasting 48 steps of two series of nature.

`curv eig WEIGHTS/model.safetensors --objective benchmarks/tasks/forecast.py:objective`: the architecture and the
weights come from the wheel fracast (Apache-2.0), the series, weekly CO2 at Mauna Loa and yearly sunspots, from
statsmodels (public domain).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import curvature as cv

CONTEXT, HORIZON, MEDIAN = 2048, 48, 4  # of the pretrained network; its outputs are the quantiles 0.1 to 0.9


class Forecast(nn.Module):
    """The median forecast (series, 48) of contexts (series, 2048), each scaled to [0, 1], where `seen` is true."""

    def __init__(self, configuration: dict) -> None:
        from fracast._core.model import build_from_cfg

        super().__init__()
        self.core, self.head = build_from_cfg(configuration)

    def forward(self, context: Tensor, seen: Tensor) -> Tensor:
        values, valid = context.unsqueeze(1), seen.unsqueeze(1)
        states = self.core(values, valid, valid.to(values.dtype))
        return self.head.forward_horizon(states, last_obs=values[:, 0, -1:], ctx=context, ctx_mask=seen)[..., MEDIAN]


def objective() -> cv.Objective:
    """The mean squared error of the forecasts, in units of each context's range, over all parameters."""
    return cv.Objective.of(pretrained(), "mse", windows())


def pretrained() -> Forecast:
    """The network with the weights of the wheel."""
    from safetensors.torch import load_file

    model = Forecast(json.loads((folder() / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(str(folder() / "model.safetensors")))
    return model


def folder() -> Path:
    """Where the wheel keeps config.json and model.safetensors."""
    from importlib.resources import files

    return Path(str(files("fracast") / "weights"))


def windows() -> tuple[Tensor, Tensor, Tensor]:
    """(contexts, where they are seen, the 48 values that follow), of two stretches of CO2 and two of sunspots."""
    from statsmodels.datasets import co2, sunspots

    weekly = co2.load_pandas().data["co2"].to_numpy()
    yearly = sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    ends = [(weekly, len(weekly) - back) for back in (0, 104)]
    ends += [(yearly, len(yearly) - back) for back in (0, 48)]
    contexts, seen, targets = zip(*(_window(series, end) for series, end in ends), strict=True)
    return torch.stack(contexts), torch.stack(seen), torch.stack(targets)


def _window(series: np.ndarray, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """One example: the last 48 values before `end` are to be forecast from up to 2048 values before them."""
    past = series[max(0, end - HORIZON - CONTEXT) : end - HORIZON]
    low, span = np.nanmin(past), np.nanmax(past) - np.nanmin(past)
    context = np.zeros(CONTEXT, dtype=np.float32)
    context[CONTEXT - len(past) :] = np.nan_to_num((past - low) / span)
    seen = np.zeros(CONTEXT, dtype=bool)
    seen[CONTEXT - len(past) :] = np.isfinite(past)
    target = ((series[end - HORIZON : end] - low) / span).astype(np.float32)
    return torch.from_numpy(context), torch.from_numpy(seen), torch.from_numpy(target)
