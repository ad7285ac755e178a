"""curv optim, against the library asked the same."""

from __future__ import annotations

import json

import pytest

import curvature as cv

OBJECTIVE = ("--objective", "./task.py:make")
SHORT = ("--steps", 3, "--repeats", 2, "--lr", "0.01,0.1", "--minibatch", 4)


@pytest.mark.parametrize("start", ["fresh", "given"])
def test_a_benchmark_is_that_of_the_library(curv, task, folder, start):
    names = ("--optimizer", "sgd", "--optimizer", "soap")
    options = (*SHORT, *names, "--start", start, "--seed", 3, "--test", "./task.py:data", "--out", "run")
    said = curv("optim", *OBJECTIVE, *options, "--format", "json")
    assert (said.code, said.err) == (0, "")
    objective = cv.optim.restarted(task.make(), seed=3) if start == "fresh" else task.make()
    how = {"lrs": [0.01, 0.1], "steps": 3, "minibatch": 4, "repeats": 2, "held_out": task.data(), "seed": 3}
    expected = cv.optim.benchmark(objective, ["sgd", "soap"], **how)
    found = json.loads(said.out)
    for field in ("tried", "losses", "held_out", "best", "steps"):
        assert found[field] == getattr(expected, field).tolist(), field
    assert (folder / "run" / "optim.png").stat().st_size > 1000
    table = curv("optim", *OBJECTIVE, *SHORT, *names, "--over", "seconds").out
    assert table.startswith("benchmark of Net, CrossEntropy()\nstart") and "ms a step" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--optimizer", "fast"), "optimizers are some of sgd, adamw"),
        (("--lr", "fast"), "--lr takes numbers with commas, but got fast."),
        (("--lr", "-1"), "positive learning rates"),
        (("--budget", "5hvp"), "curv optim takes no products with a matrix."),
    ],
)
def test_what_makes_no_training_is_refused(curv, options, words):
    said = curv("optim", *OBJECTIVE, *options)
    assert said.code == 2 and words in said.err and not said.out
