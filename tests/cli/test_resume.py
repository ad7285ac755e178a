"""Every long command, stopped by Ctrl-C in the middle: started again it ends with the bits of one that ran through."""

from __future__ import annotations

import json
from pathlib import Path

import curvature_cli.output
import numpy as np
import pytest
import torch

OBJECTIVE = ("--objective", "./task.py:make")
LONG = {  # the report of progress at which it is stopped
    "spectrum": (("--probes", 2, "--steps", 6), 3),
    "spectrum --by layer": (("--probes", 2, "--steps", 6), 3),
    "eig": (("-k", 2, "--rtol", 1e-7), 2),
    "trace": (("--products", 24, "--method", "hutchinson"), 2),
    "diag": (("--products", 24, "--method", "hutchinson"), 2),
    "landscape": (("--points", 31), 2),
    "landscape --directions hessian": (("--points", 5, "--axes", 1), 2),
    "roughness": (("--directions", 40, "--steps", 10), 2),
    "sharpness": ((), 5),
    "path": (("a.pt", "b.pt", "--points", 401), 2),
    "path --kind bezier": (("a.pt", "b.pt", "--points", 5, "--steps", 300), 2),
    "ihvp": (("--damping", 0.01, "--rtol", 1e-6), 3),
    "influence": (("--self", "--max-examples", 10), 1),
    "influence --operator ggn": (("--test", "test.npz", "--damping", 0.1, "--rtol", 1e-6), 1),
    "compare": (("a.pt", "b.pt", "--measure", "trace", "--measure", "average"), 2),
    "compare --measure lambda_max": (("a.pt", "b.pt", "--measure", "trace"), 17),
    "report": (("--question", "spectrum", "--question", "rates", "--question", "landscape", "--points", 5), 8),
    "optim": (("--optimizer", "sgd", "--lr", "0.1,1", "--steps", 20, "--repeats", 2), 2),
}


@pytest.fixture
def points(folder, task):
    """Weights to go between, and other data."""
    for name, seed in (("a.pt", 0), ("b.pt", 1)):
        torch.manual_seed(seed)
        torch.save(task.Net().state_dict(), folder / name)
    np.savez("test.npz", x=np.ones((2, 3), dtype=np.float32), y=np.arange(2))


@pytest.mark.parametrize("command", LONG)
def test_a_command_that_was_stopped_goes_on(curv, folder, points, monkeypatch, command):
    options, moment = LONG[command]
    line = (*command.split(), *options, *OBJECTIVE, "--format", "json")
    whole = json.loads(curv(*line, *(("--out", "whole") if command == "report" else ())).out)
    calls = []

    def stop(log, progress):
        calls.append(progress)
        if len(calls) == moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curvature_cli.output._Log, "__call__", stop)
        said = curv(*line, "--out", "run", "--resume")
    assert said.code == 130 and list(Path("run").glob("checkpoint*")), said
    if said.out:
        left = json.loads(said.out)
        assert left["kind"] == whole["kind"] and left["complete"] is False
    last = json.loads(curv(*line, "--out", "run", "--resume").out)
    assert last["complete"] and not list(Path("run").glob("checkpoint*"))
    assert without_time(last) == without_time(whole)


def without_time(told):
    """The same but for what it took, and with which engines: products of the first vectors are checked one by one."""
    if isinstance(told, dict):
        clocks = ("cost", "seconds", "step_seconds", "engines")
        return {name: without_time(value) for name, value in told.items() if name not in clocks}
    return [without_time(item) for item in told] if isinstance(told, list) else told
