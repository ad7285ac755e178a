"""What the commands that use inverses say, against the library asked the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import curvature as cv
from curvature.io.tables import read_table

OBJECTIVE = ("--objective", "./task.py:make")
DATA = "./task.py:data"
EXACT = ("kfac", "ekfac", "egn", "ggn-diagonal", "gradient-window")


def ask(curv, *options) -> dict:
    said = curv(*options, *OBJECTIVE, "--format", "json")
    assert said.code == 0 and not said.err, said
    return json.loads(said.out)


def matrix(objective: cv.Objective, name: str, window: int = 8) -> cv.LinearOperator:
    if name == "gradient-window":
        return cv.gradient_window(objective, window).fisher
    return getattr(cv, name.replace("-", "_"))(objective)


@pytest.mark.parametrize("operator", ["hessian", "ggn", "empirical-fisher"])
def test_a_solution_is_that_of_the_library(curv, task, folder, operator):
    found = ask(curv, "ihvp", "--operator", operator, "--damping", 0.3, "--rtol", 1e-4, "--out", "run")
    objective = task.make()
    expected = cv.solve(matrix(objective, operator), objective.gradient(), damping=0.3, rtol=1e-4)
    assert found["x"] == expected.x.tolist() == cv.Result.load("run").x.tolist()
    assert found["residuals"] == expected.residuals.tolist() and found["steps"] == expected.steps.tolist()
    A = matrix(objective, operator).dense() + 0.3 * torch.eye(len(expected.x))
    g = objective.gradient()
    assert found["energy"][0] == pytest.approx(float(g @ torch.linalg.solve(A, g)), rel=1e-3)
    assert {path.name for path in (folder / "run").iterdir()} == {"result.json", "arrays.safetensors"}


@pytest.mark.parametrize("operator", EXACT)
def test_what_has_an_exact_inverse_takes_one_step(curv, task, operator):
    found = ask(curv, "ihvp", "--operator", operator, "--window", 8, "--damping", 0.1)
    objective = task.make()
    expected = cv.inverse(matrix(objective, operator), damping=0.1) @ objective.gradient()
    torch.testing.assert_close(torch.tensor(found["x"]), expected, rtol=1e-4, atol=1e-6)
    assert found["steps"] == [1] and found["converged"] == [True]


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac", "ggn-diagonal", "nystrom"])
def test_a_preconditioner_changes_no_solution(curv, preconditioner):
    options = ("--operator", "ggn", "--damping", 0.01, "--rtol", 1e-5, "--dtype", "float64")
    plain = ask(curv, "ihvp", *options)
    found = ask(curv, "ihvp", *options, "--preconditioner", preconditioner)
    assert found["origin"]["options"]["preconditioner"]["damping"] == 0.01
    x = torch.tensor(plain["x"])
    assert float((torch.tensor(found["x"]) - x).norm() / x.norm()) < 1e-3


def test_the_gradient_may_be_that_of_other_data(curv, task):
    x, y = task.data()
    torch.save((x[:4], y[:4]), "some.pt")
    found = ask(curv, "ihvp", "--test", "some.pt", "--damping", 0.5, "--l2", 0.2)
    objective = replace(task.make(), l2=0.2)
    g = task.make().on((x[:4], y[:4])).gradient()  # the test loss has no regulariser
    assert found["x"] == cv.solve(cv.hessian(objective), g, damping=0.5, rtol=1e-3).x.tolist()


def test_a_solution_that_did_not_converge_is_kept_and_said(curv, folder):
    said = curv("ihvp", *OBJECTIVE, "--damping", 0, "--rtol", 1e-9, "--max-steps", 2, "--out", "run")
    assert said.code == 6 and "after 2 steps" in said.err and "solved" in said.out
    assert cv.Result.load("run").steps.tolist() == [2]
    said = curv("ihvp", *OBJECTIVE, "--operator", "kfac", "--preconditioner", "kfac")
    assert (said.code, said.err) == (2, "curv: kfac has an exact inverse.\nLeave --preconditioner out.\n")


@pytest.mark.parametrize("operator", [*EXACT, "ggn"])
def test_self_influence_is_that_of_the_library(curv, task, folder, operator):
    options = ("--operator", operator, "--window", 8, "--damping", 0.1, "--top", 4, "--out", "run")
    found = ask(curv, "influence", "--self", *options)
    train = task.make()
    inverse = cv.inverse(matrix(train, operator), damping=0.1, rtol=1e-3)
    expected = cv.self_influence(train, inverse, top=4)
    assert found["scores"] == expected.scores.tolist()
    assert found["ranked"] == expected.scores.topk(4).indices.tolist()
    assert (folder / "run" / "influence.png").stat().st_size > 1000
    columns = read_table(folder / "run" / "influence.csv")
    assert columns["example"] == list(map(str, range(10))) and list(map(float, columns["score"])) == found["scores"]


def test_influence_is_on_a_mean_or_on_each(curv, task, folder):
    train = task.make()
    inverse = cv.inverse(cv.ekfac(train), damping=1e-2)
    x, y = task.data()
    torch.save((x[:3], y[:3]), "some.pt")
    test = train.on((x[:3], y[:3]))
    each = ask(curv, "influence", "--test", "some.pt", "--each", "--top", 2, "--out", "each")
    assert each["scores"] == cv.influence(train, test, inverse).scores.tolist()
    columns = read_table(folder / "each" / "influence.csv")
    assert list(columns) == ["example", "test 0", "test 1", "test 2"]
    assert list(map(float, columns["test 1"])) == [row[1] for row in each["scores"]]
    mean = ask(curv, "influence", "--test", "some.pt", "--top", 2, "--out", "mean")
    expected = cv.influence(train, test.gradient(), inverse, top=2)
    assert mean["scores"] == expected.scores.tolist()
    assert mean["ranked"] == expected.scores.argsort(descending=True)[[0, 1, -2, -1]].tolist()
    table = curv("influence", *OBJECTIVE, "--test", "some.pt", "--top", 2).out.splitlines()
    assert table[0] == "ekfac of Net, CrossEntropy()"
    assert [line.split()[1] for line in table[2:6]] == [str(i) for i in mean["ranked"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "The influence is that on a test loss, or on the example's own."),
        (("--self", "--test", DATA), "The influence is that on a test loss, or on the example's own."),
        (("--self", "--each"), "--each is for test examples."),
        (("--self", "--top", 0), "Must be >= 1"),
        (("--self", "--damping", -1), "Must be >= 0"),
    ],
)
def test_questions_without_a_meaning_are_refused(curv, options, words):
    said = curv("influence", *OBJECTIVE, *options)
    assert said.code == 2 and words in said.err and not said.out


def test_solves_that_do_not_converge_leave_no_scores(curv, folder):
    options = ("--self", "--operator", "hessian", "--damping", 0, "--rtol", 1e-9, "--max-steps", 1, "--out", "run")
    said = curv("influence", *OBJECTIVE, *options)
    assert said.code == 6 and not said.out and not (folder / "run").exists()
