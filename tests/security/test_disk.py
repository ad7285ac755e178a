"""A full disk: exit code 7, a line that says so, and what was there before as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import curvature as cv

OBJECTIVE = ("--objective", "./task.py:make")
LIMIT = 4096  # bytes that a file may have
LINES = """
import resource, sys, curvature_cli.main as main, curvature.plots
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
print([main.run(line.split()) for line in sys.argv[2:]], file=sys.stderr)
"""


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def saved(curv, folder) -> dict[str, bytes]:
    """A result in run, and its files."""
    assert curv("trace", *OBJECTIVE, "--out", "run", "--format", "quiet").code == 0
    return kept(folder / "run")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_result_that_does_not_fit_leaves_the_old_one_and_is_printed(curv, folder, saved, monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        said = curv("trace", *OBJECTIVE, "--seed", 1, "--out", "run", "--overwrite", "--format", "json")
    assert said.code == 7 and json.loads(said.out)["origin"]["seed"] == 1  # the numbers are not lost
    assert said.err.startswith("curv: No space is left on the disk to write run/") and len(said.err.splitlines()) == 2
    assert kept(folder / "run") == saved and cv.Result.load("run").origin.seed == 0


def test_a_picture_that_does_not_fit_leaves_the_result_and_the_old_picture(curv, folder, saved, monkeypatch):
    fsync, calls = os.fsync, []

    def third_time(descriptor: int) -> None:
        calls.append(descriptor)
        fsync(descriptor) if len(calls) < 3 else full()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", third_time)
        said = curv("trace", *OBJECTIVE, "--seed", 1, "--out", "run", "--overwrite", "--format", "quiet")
    assert said.code == 7 and "to write run/trace.png" in said.err
    assert kept(folder / "run")["trace.png"] == saved["trace.png"] and cv.Result.load("run").origin.seed == 1
    assert {path.name for path in Path("run").iterdir()} == set(saved)


def test_a_checkpoint_that_does_not_fit_keeps_what_does(curv, folder, monkeypatch):
    command = ("spectrum", *OBJECTIVE, "--probes", 2, "--steps", 8, "--format", "json")
    whole = json.loads(curv(*command).out)
    write, calls = os.write, []

    def tenth_time(descriptor: int, data: bytes) -> int:
        calls.append(descriptor)
        return write(descriptor, data) if len(calls) < 10 else full()

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", tenth_time)
        said = curv(*command, "--out", "run", "--resume")
    assert said.code == 7 and "No space is left on the disk to write" in said.err and "checkpoint" in said.err
    assert (folder / "run" / "checkpoint").stat().st_size > 0
    last = json.loads(curv(*command, "--out", "run", "--resume").out)
    assert last["nodes"] == whole["nodes"] and last["weights"] == whole["weights"]


def test_an_objective_that_does_not_fit_leaves_the_old_one(task, folder, monkeypatch):
    objective = cv.Objective.of(task.stock(), "cross-entropy", task.data())
    objective.save("model.pt")
    before = Path("model.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(cv.TooLarge, match=r"No space is left .* to write model\.pt"):
        patch.setattr(os, "fsync", full)
        objective.first(3).save("model.pt")
    assert Path("model.pt").read_bytes() == before and {p.name for p in folder.iterdir()} >= {"model.pt"}
    assert not list(folder.glob(".tmp-*"))


def test_a_limit_on_the_size_of_files_is_a_full_disk(folder):
    """Of every output: the arrays, the picture, and the checkpoint of a real process."""
    small = "diag demo:digits --params 4.* --products 4 --format quiet --out"
    large = "diag demo:digits --products 4 --format quiet --out"
    ran = subprocess.run(
        [sys.executable, "-c", LINES, str(resource.RLIM_INFINITY), f"{small} run"], capture_output=True, text=True
    )
    assert ran.stderr.splitlines()[-1] == "[0]", ran.stderr
    before = kept(folder / "run")
    lines = [f"{large} run --overwrite", f"{large} other", "spectrum demo:digits --out steps --resume --format quiet"]
    ran = subprocess.run([sys.executable, "-c", LINES, str(LIMIT), *lines], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == "[7, 7, 7]", ran.stderr
    assert ran.stderr.count("No space is left on the disk") == 3 and "Traceback" not in ran.stderr
    assert kept(folder / "run") == before
    assert not list((folder / "other").iterdir())
    assert all(path.stat().st_size <= LIMIT for path in folder.rglob("*") if "steps" in path.parts)
