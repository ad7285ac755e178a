"""Real signals to a real process: what was measured is kept, the exit code says why it stopped, nothing is left half."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import curvature_cli.output
import pytest

import curvature as cv

RUN = "import sys, curvature_cli.output as o, curvature_cli.main as m; o.PATIENCE = 0.0; m.main(sys.argv[1:])"
SIGNALS = pytest.mark.parametrize(
    "sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
PATIENCE = 10.0  # seconds until it must have ended, on a busy machine; alone it takes under two
HAMLET = "demo:hamlet"  # of which a product takes a third of a second
LONG = {  # all that a measurement can be long in
    "spectrum": (),
    "eig": ("-k", 3),
    "trace": ("--products", 3000),
    "diag": ("--products", 3000),
    "landscape": (),
    "roughness": (),
    "sharpness": (),
    "path": (HAMLET, "--points", 501),
    "ihvp": (),
    "influence": ("--self",),
    "compare": (HAMLET,),
    "optim": (),
    "report": (),
}


def _listen() -> None:
    """Undo what a shell does to its background jobs, and they hand on: ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(sent: signal.Signals, mark: str, *tokens: object) -> tuple[int, str, str]:
    """Starts a command that reports every step, signals it after `mark` appeared on stderr: code, stdout, stderr."""
    command = [sys.executable, "-c", RUN, *map(str, tokens)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_listen
    ) as process:
        try:
            told = ""
            while mark not in told:
                line = process.stderr.readline()
                assert line, told
                told += line
            process.send_signal(sent)
            start = time.monotonic()
            out, err = process.communicate(timeout=60)
            seconds = time.monotonic() - start
            sys.stdout.write(f"{tokens[0]}: {seconds:.2f} s from the signal to the exit\n")
            assert seconds < PATIENCE
            return process.returncode, out, told + err
        finally:
            process.kill()


@SIGNALS
def test_a_spectrum_keeps_the_steps_that_are_done(folder, sent, code):
    done, out, err = interrupted(sent, "2/80 steps", "spectrum", "demo:hamlet", "--probes", 2, "--out", "run")
    assert done == code
    assert "Traceback" not in err and err.endswith("curv: interrupted: this is what was measured until then.\n")
    result = cv.SpectralDensity.load("run")
    assert not result.complete
    assert 2 <= result.steps < 80 and result.cost.passes >= result.steps
    assert f"2 x {result.steps} (interrupted)" in out
    assert {path.name for path in Path("run").iterdir()} == {"result.json", "arrays.safetensors", "spectrum.png"}


@pytest.mark.parametrize(
    "tokens, mark",
    [
        (["eig", "-k", 3, "--rtol", 1e-30, "--max-steps", 5000, "--params", "*.weight"], "4/5000 steps"),
        (["trace", "--products", 3000, "--method", "hutchinson"], "32/3000 products"),
    ],
    ids=["eig", "trace"],
)
def test_other_questions_keep_what_they_have(folder, tokens, mark):
    command, *options = tokens
    done, out, err = interrupted(
        signal.SIGINT, mark, command, "demo:digits", *options, "--out", "run", "--format", "json"
    )
    assert done == 130
    assert "Traceback" not in err
    assert '"complete": false' in out
    assert not cv.Result.load("run").complete


@SIGNALS
def test_before_there_is_anything_to_keep(folder, sent, code):
    Path("slow.py").write_text("import sys, time\nprint('loading', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    done, out, err = interrupted(sent, "loading", "spectrum", "--objective", "./slow.py:make", "--out", "run")
    assert (done, out) == (code, "")
    assert err == "loading\ncurv: interrupted before there was anything to keep.\n"
    assert not Path("run").exists()


def test_inside_the_model(folder):
    """Also where user code runs: the model's forward, in the middle of the data."""
    Path("slow.py").write_text(
        "import sys, time, torch, task\n"
        "class Slow(task.Net):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Slow.calls += 1\n"
        "        if Slow.calls > 60:\n"
        "            print('forward', file=sys.stderr, flush=True)\n"
        "            time.sleep(60)\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    return task.cv.Objective.of(Slow(hidden=40), 'cross-entropy', task.data(), batch_size=2)\n"
    )
    tokens = ("spectrum", "--objective", "./slow.py:make", "--steps", 20, "--probes", 2, "--out", "run")
    tokens = (*tokens, "--engine", "recomputed")  # which calls the model for every product
    done, _, err = interrupted(signal.SIGINT, "forward", *tokens)
    assert done == 130 and "Traceback" not in err
    result = cv.SpectralDensity.load("run")
    assert not result.complete and 0 < result.steps < 20


@pytest.mark.slow
@pytest.mark.parametrize("command", LONG)
def test_every_long_command_ends_soon(folder, command):
    tokens = (command, HAMLET, *LONG[command], "--out", "run", "--format", "quiet", "--progress", "log")
    done, out, err = interrupted(signal.SIGINT, ", at most ", *tokens)
    assert (done, out) == (130, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("curv: interrupted")
    if Path("run/result.json").exists():
        assert not cv.Result.load("run").complete


def test_a_result_that_was_being_written_is_told_and_kept(curv, monkeypatch):
    def slow(*arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(curvature_cli.output, "_view", slow)
    said = curv("trace", "--objective", "./task.py:make", "--out", "run", "--format", "json")
    assert said.code == 130 and json.loads(said.out)["complete"] and cv.Result.load("run").complete
    assert said.err == "curv: interrupted while writing to run, where something may be missing.\n"
