"""A command line in an empty folder, with the code and the data of a tiny task beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import curvature_cli.main
import numpy as np
import pytest
import torch

TASK = """
import torch
from torch import nn

import curvature as cv


class Net(nn.Module):
    def __init__(self, hidden=4, activation="tanh"):
        super().__init__()
        self.first, self.last = nn.Linear(3, hidden), nn.Linear(hidden, 2)
        self.activation = activation

    def forward(self, x):
        return self.last(getattr(torch, self.activation)(self.first(x)))


def stock():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(10, 3, generator=generator), torch.arange(10) % 2


def make():
    torch.manual_seed(1)
    return cv.Objective.of(Net(), "cross-entropy", data())


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


class Said(NamedTuple):
    """What a command line did: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder but for task.py and train.npz; what commands import is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    (tmp_path / "task.py").write_text(TASK)
    generator = torch.Generator().manual_seed(0)
    np.savez("train.npz", x=torch.randn(10, 3, generator=generator).numpy(), y=np.arange(10) % 2)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name == "task" or name.startswith("curv_"):
            del sys.modules[name]


@pytest.fixture
def curv(folder, capsys) -> Callable[..., Said]:
    """Runs one command line in this process."""

    def run(*tokens: object) -> Said:
        capsys.readouterr()
        code = curvature_cli.main.run([str(token) for token in tokens])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def task(folder):
    """The module task.py, imported under that name."""
    sys.path.insert(0, str(folder))
    import task

    return task
