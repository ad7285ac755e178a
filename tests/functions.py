"""Objectives that are nothing but a function of their parameters: what landscapes of known shape are tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import curvature as cv


class Point(nn.Module):
    """Nothing but parameters."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.theta


def made(function: Callable[[Tensor], Tensor], theta: Tensor) -> cv.Objective:
    """The objective that is this function of its parameters, at theta."""
    return cv.Objective.from_loss(Point(theta), lambda m, x: function(m(x)), torch.ones(1, 1, dtype=theta.dtype))
