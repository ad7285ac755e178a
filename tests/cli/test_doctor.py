"""curv doctor: the table, JSON, exit codes, and the forecast of another command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from curvature_cli.forecast import plan_of

import curvature as cv
from curvature.linalg import memory

OBJECTIVE = ("--objective", "./task.py:make")
ORDER = [
    "file", "environment", "model", "mode", "parameters", "data", "loss", "examples", "gradient", "graph", "products",
    "difference", "symmetry", "randomness", "terms", "rewrites", "engine retained", "engine batched", "engine forward", "cost",
]  # fmt: skip


def told(path: str, body: str) -> str:
    """A file of code with an objective of the task's data and this body for a model's forward."""
    Path(path).write_text(f"""
import torch
from torch import nn
import curvature as cv
from task import data

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        {body}

def make():
    return cv.Objective.of(Net(), "cross-entropy", data())
""")
    return f"./{path}:make"


def rows(out: str) -> dict[str, tuple[str, str]]:
    """Name -> (status, seen) of a table."""
    found = re.findall(
        r"^(ok|warning|failed|skipped) +([a-z]+(?: (?:retained|batched|forward))?)  +(.*?) *$", out, re.M
    )
    return {name: (status, seen) for status, name, seen in found}


def test_a_healthy_model_is_told_in_a_table(curv, folder):
    said = curv("doctor", *OBJECTIVE)
    assert (said.code, said.err) == (0, "This can be analysed.\n")
    assert list(rows(said.out)) == ORDER
    assert {status for status, _ in rows(said.out).values()} == {"ok"}
    assert rows(said.out)["file"][1] == "code that you named: ./task.py:make"
    assert "26 numbers in 4 tensors, float32, on cpu" in rows(said.out)["parameters"][1]
    assert "\x1b" not in said.out


def test_json_has_every_finding(curv):
    said = curv("doctor", *OBJECTIVE, "--format", "json")
    written = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert written["kind"] == "Diagnosis" and [f["name"] for f in written["findings"]] == ORDER
    assert all(set(f) == {"kind", "name", "status", "seen", "fix", "error"} for f in written["findings"])
    assert written["cost"]["products"] == 9 and written["product_seconds"] > 0 and written["forecast_seconds"] is None
    assert curv("doctor", *OBJECTIVE, "--format", "quiet") == (0, "", "")


@pytest.mark.parametrize(
    "body, code, name, words",
    [
        (
            "return self.last(self.first(x).sigmoid_().add_(1))",
            5,
            "gradient",
            r"inplace operation, in the model \(Net\)",
        ),
        ("return self.last((1e4 * self.first(x).abs() + 100).exp())", 6, "loss", r"begins in last \(Linear\)"),
        ("return self.last(x)", 5, "loss", r"shapes cannot be multiplied.*in last \(Linear\)"),
    ],
)
def test_a_failure_is_in_the_table_and_at_the_end(curv, folder, body, code, name, words):
    said = curv("doctor", told("net.py", body))
    assert said.code == code
    assert rows(said.out)[name][0] == "failed" and re.search(words, rows(said.out)[name][1])
    assert rows(said.out)["cost"] == ("skipped", f"not tried, since {name} failed")
    cause, fix = said.err.splitlines()
    assert cause.startswith("curv: ") and re.search(words, cause) and f"-> {fix}" in said.out


def test_what_cannot_be_made_into_an_objective_is_a_finding(curv, folder, task):
    torch.save(task.stock().state_dict(), "weights.pt")
    parts = ("--arch", "./task.py:stock", "--loss", "cross-entropy", "--data", "train.npz")
    said = curv("doctor", "weights.pt", *parts)
    assert said.code == 0 and "weights.pt is a torch.save file of tensors, read as data" in rows(said.out)["file"][1]
    said = curv("doctor", "weights.pt", *parts, "--params", "decoder.*")
    assert said.code == 5 and "No trainable parameter matches" in rows(said.out)["objective"][1]
    assert "The names are 0.weight" in said.err.splitlines()[1]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_files_end_as_for_every_command(curv, folder):
    for name, content, code in (("no.pt", None, 3), ("text.pt", b"hello", 3)):
        if content is not None:
            Path(name).write_bytes(content)
        said = curv("doctor", name, "--loss", "mse", "--data", "train.npz")
        assert said.code == code and said.out == "" and len(said.err.splitlines()) == 2
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3)), "script.pt")
    said = curv("doctor", "script.pt", "--loss", "cross-entropy", "--data", "train.npz")
    assert said.code == 4 and "--trust" in said.err
    said = curv("doctor", "script.pt", "--loss", "cross-entropy", "--data", "train.npz", "--trust")
    assert said.code == 0 and "read with --trust, which runs its code" in rows(said.out)["file"][1]


def test_warnings_are_counted_and_end_well(curv, folder):
    made = told("net.py", "return self.last(torch.tanh(self.first(x).detach()))")
    said = curv("doctor", made)
    assert said.code == 0 and said.err == "This can be analysed; 1 warning is above.\n"
    assert rows(said.out)["gradient"][0] == "warning" and "first.weight, first.bias" in said.out


@pytest.mark.parametrize(
    "command, plan",
    [
        ("spectrum", {"products": 640, "passes": 80, "vectors": 648}),
        ("spectrum --probes 4 --steps 10 --keep nowhere", {"products": 40, "passes": 10, "vectors": 12}),
        ("eig", {"products": 52, "passes": 13, "vectors": 44}),
        ("eig --max-steps 5", {"products": 20, "passes": 5, "vectors": 44}),
        ("eig --which both", {"products": 800, "passes": 200, "vectors": 44}),
        ("eig -k 5 --method krylov", {"products": 70, "passes": 10, "vectors": 210}),
        ("eig -k 5 --method krylov --max-steps 6", {"products": 42, "passes": 6, "vectors": 42}),
        ("trace --products 50", {"products": 50, "passes": 50, "vectors": 50}),
        ("diag", {"products": 32, "passes": 32, "vectors": 32}),
        ("ihvp --max-steps 7", {"products": 7, "passes": 7, "vectors": 5}),
        ("landscape", {"losses": 51**2}),
        ("landscape --axes 1 --points 9", {"losses": 9}),
        ("landscape --directions hessian", {"products": 800, "passes": 200, "losses": 51**2, "vectors": 44}),
        ("roughness --directions 6 --steps 4", {"losses": 30, "vectors": 6}),
        ("path a.pt b.pt --points 7", {"losses": 7}),
        ("spectrum --by layer", {"products": 0, "layer_products": 640, "passes": 80, "vectors": 648}),
        ("trace --by parameter", {"products": 0, "parameter_products": 32, "passes": 32, "vectors": 32}),
        ("sharpness --measure trace --products 9", {"products": 9, "passes": 9, "vectors": 0}),
        ("sharpness --measure trace --products 9 --invariance", {"products": 27, "passes": 27, "vectors": 0}),
        ("sharpness --measure average --measure sam", {"losses": 29, "vectors": 0}),
        ("compare a.pt b.pt --measure trace", {"products": 128, "passes": 128, "vectors": 0}),
        ("influence --self", {"losses": 15}),
        (
            "influence --test t.npz --operator ggn --max-steps 5",
            {"products": 5, "passes": 5, "losses": 6, "vectors": 5},
        ),
        (
            "report --question eigenvalues --question landscape --points 3",
            {"products": 160, "passes": 100, "losses": 9, "vectors": 50},
        ),
        (
            "report --question layers --question traces",
            {"products": 0, "layer_products": 43, "passes": 43, "vectors": 29},
        ),
        ("report --question gradient -k 5", {"products": 60, "passes": 15, "losses": 6, "vectors": 44}),
        (
            "report --question eigenvalues --question gradient -k 5",
            {"products": 60, "passes": 15, "losses": 6, "vectors": 44},
        ),
    ],
)
def test_the_plan_of_a_command_is_that_of_its_options(command, plan):
    assert plan_of(command) == plan


@pytest.mark.parametrize("command", ["sharpness", "report", "compare a b"])
def test_work_of_many_parts_is_forecast(curv, folder, command):
    forecast = json.loads(curv("doctor", *OBJECTIVE, "--command", command, "--format", "json").out)
    assert forecast["forecast_seconds"] > 10 * forecast["product_seconds"] and forecast["forecast_bytes"] > 0


def test_products_with_every_layer_are_counted_by_layers(task):
    plans = ({"products": 6}, {"layer_products": 3}, {"parameter_products": 3})  # 2 layers, 4 parameters
    seen = [cv.check(task.make(), **plan).findings[-1].seen for plan in plans]
    assert "for 6 products on" in seen[0] and "for 6 products on" in seen[1] and "for 12 products on" in seen[2]


def test_the_diagnosis_is_written_and_gated(curv, folder):
    made = told("net.py", "return self.last(torch.tanh(self.first(x).detach()))")
    said = curv("doctor", made, "--out", "run", "--threads", 1, "--fail-on", "warnings > 0", "--format", "quiet")
    assert said.code == 10 and "--fail-on warnings > 0: warnings is 1." in said.err
    found = cv.Result.load("run")
    assert isinstance(found, cv.Diagnosis) and [f.name for f in found.findings] == ORDER
    gates = ("asymmetry > 0", "difference > 0.01", "product_seconds > 60")
    said = curv("doctor", *OBJECTIVE, *(word for gate in gates for word in ("--fail-on", gate)))
    assert (said.code, said.err) == (0, "This can be analysed.\n")
    said = curv("doctor", *OBJECTIVE, "--fail-on", "forecast_seconds > 60")
    assert said.code == 2 and "There is no 'forecast_seconds' to --fail-on, but warnings, asymmetry" in said.err
    said = curv("doctor", *OBJECTIVE, "--command", "trace", "--fail-on", "forecast_seconds > 0", "--format", "quiet")
    assert said.code == 10
    said = curv("doctor", *OBJECTIVE, "--out", "run")
    assert said.code == 2 and "run already holds result.json" in said.err
    said = curv("doctor", told("bad.py", "return self.last(x)"), "--out", "bad", "--format", "quiet")
    assert said.code == 5 and not cv.Result.load("bad").healthy


def test_the_forecast_is_the_last_line(curv, folder, monkeypatch):
    said = curv("doctor", *OBJECTIVE, "--command", "spectrum --probes 3 --steps 5")
    assert list(rows(said.out)) == [*ORDER, "forecast"]
    assert "15 products, 18 vectors on 10 examples in 1 batch" in rows(said.out)["forecast"][1]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    said = curv("doctor", *OBJECTIVE, "--command", "spectrum")
    assert said.code == 7 and "are free" in said.err


def test_a_wrong_command_is_a_usage_error(curv):
    for wrong in (
        "spectru",
        "",
        "spectrum --stepz 3",
        "spectrum --steps none",
        "sharpness --measure x",
        "report --question x",
        "influence --self --operator ggn",
        "optim",
    ):
        said = curv("doctor", *OBJECTIVE, "--command", wrong)
        assert (said.code, said.out) == (2, "") and len(said.err.splitlines()) <= 3
