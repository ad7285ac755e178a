"""kill -9 at random moments: what is on the disk can be read, and the same command goes on to the same bits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# One process imports everything and computes nothing; it forks for every run, so that a run costs no import.
SERVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import scipy.special, safetensors.torch
import curvature as cv, curvature.plots, curvature.io.journal
import curvature_cli.main as main

def start(line):
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os._exit(main.run(line.split()))

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def told(folder):
    written = json.loads((Path(folder) / "result.json").read_text())
    return [written[name] for name in sorted(written) if name != "cost"]

line, moments, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begun = time.monotonic()
assert ended(start(f"{line} --out whole")) == 0, Path("errors").read_text()
length = time.monotonic() - begun
draws, seen = random.Random(seed), []
for number in range(moments):
    going = f"{line} --out run{number} --resume"
    kills = 0
    for _ in range(3):  # killed again and again
        pid = start(going)
        time.sleep(draws.uniform(0.1, 1.0) * length)
        os.kill(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
    left = sorted(path.name.split("-")[0] for path in Path(f"run{number}").glob("*"))
    code = ended(start(going))
    if code == 2:  # it had been done, before it was killed
        code = 0 if cv.Result.load(f"run{number}").complete else 2
    after = sorted(path.name for path in Path(f"run{number}").iterdir())
    same = code == 0 and told("whole") == told(f"run{number}")
    arrays = [(Path(place) / "arrays.safetensors").read_bytes() for place in ("whole", f"run{number}") if code == 0]
    seen.append({"code": code, "kills": kills, "left": left, "after": after, "same": same and arrays[0] == arrays[1]})
print(json.dumps({"seen": seen, "errors": Path("errors").read_text()}))
"""
MODEL = "--objective ./task.py:make"
LINES = {
    "spectrum": f"spectrum {MODEL} --probes 2 --steps 10 --engine recomputed",
    "eig": f"eig {MODEL} -k 3 --which both --rtol 1e-12 --engine recomputed",
    "landscape": f"landscape {MODEL} --directions hessian --points 21",
}


def check(folder, line: str, moments: int, seed: int) -> int:
    """Kill it at so many times three random moments; how many kills hit."""
    ran = subprocess.run(
        [sys.executable, "-c", SERVER, line, str(moments), str(seed)], capture_output=True, text=True, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    for seen in told["seen"]:
        assert seen["code"] == 0 and seen["same"], told
        assert not any(name.startswith((".tmp", "checkpoint")) for name in seen["after"]), seen
        assert {"result.json", "arrays.safetensors"} <= set(seen["after"])
    assert "Traceback" not in told["errors"] and "damaged" not in told["errors"]
    return sum(seen["kills"] for seen in told["seen"])


@pytest.mark.parametrize("command", LINES)
def test_a_killed_run_goes_on_to_the_same_bits(folder, command):
    assert check(folder, LINES[command], moments=1, seed=len(command)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("command", LINES)
def test_thirty_random_moments(folder, command):
    assert check(folder, LINES[command], moments=10, seed=7) >= 10
