"""curv compare: folders and models, against the library asked the same."""

from __future__ import annotations

import json

import pytest
import torch

import curvature as cv
from curvature.io.tables import read_table

OBJECTIVE = ("--objective", "./task.py:make")


@pytest.fixture
def models(task, folder) -> tuple[cv.Objective, cv.Objective]:
    """Two objectives, which lie in a.pt and b.pt as weights."""
    first = task.make()
    second = first.at(2 * first.position)
    for name, objective in (("a.pt", first), ("b.pt", second)):
        torch.save(dict(objective.params), folder / name)
    return first, second


def test_two_results_are_compared_as_the_library_does(curv, folder):
    for name, seed in (("one", 1), ("two", 2)):
        assert curv("trace", *OBJECTIVE, "--products", 6, "--seed", seed, "--out", name).code == 0
    said = curv("compare", "one", "two", "--format", "json", "--out", "both")
    assert (said.code, said.err) == (0, "")
    expected = cv.compare(cv.Result.load("one"), cv.Result.load("two"), labels=("one", "two"))
    found = json.loads(said.out)
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert [s["name"] for s in found["settings"]] == ["seed"]
    written = {p.name for p in (folder / "both").iterdir()}
    assert written == {"result.json", "arrays.safetensors", "compare.csv", "compare.png"}
    columns = read_table(folder / "both" / "compare.csv")
    assert columns["name"] == [row.name for row in expected.rows]
    assert [float(cell) for cell in columns["p"]] == [row.p for row in expected.rows]


def test_two_models_are_measured_the_same_way(curv, models):
    options = ("--measure", "lambda_max", "--measure", "average", "--samples", 4, "--seed", 5)
    said = curv("compare", "a.pt", "b.pt", *OBJECTIVE, *options, "--format", "json")
    assert (said.code, said.err) == (0, "")
    names = ("lambda_max", "average")
    tables = [cv.sharpness(m, measures=names, samples=4, seed=5 + i) for i, m in enumerate(models)]
    expected = cv.compare(*tables, labels=("a.pt", "b.pt"))
    rows = {row["name"]: (row["first"], row["second"], row["p"]) for row in json.loads(said.out)["rows"]}
    assert rows == {row.name: (row.first, row.second, row.p) for row in expected.rows}
    table = curv("compare", "a.pt", "b.pt", *OBJECTIVE).out
    assert "b.pt - a.pt" in table and "lambda_max" in table and "trace" in table


def test_a_comparison_goes_on_where_it_was(curv, models, folder):
    options = ("a.pt", "b.pt", *OBJECTIVE, "--out", "run", "--resume", "--format", "json")
    whole = json.loads(curv("compare", *options).out)
    assert not list((folder / "run").glob("checkpoint*"))
    again = json.loads(curv("compare", *options, "--overwrite").out)
    assert again["rows"] == whole["rows"]


def test_a_gate_is_on_the_difference(curv, models):
    said = curv("compare", "a.pt", "b.pt", *OBJECTIVE, "--fail-on", "lambda_max>-1000")
    assert said.code == 10


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("one", "a.pt"), (), "one and a.pt are a result and a model."),
        (("one", "one"), ("--measure", "trace"), "--measure is for two models, but these are results."),
        (("a.pt", "b.pt"), ("--measure", "flatness"), "measures are some of lambda_max"),
    ],
)
def test_what_cannot_be_compared_is_refused(curv, models, names, options, words):
    assert curv("trace", *OBJECTIVE, "--out", "one").code == 0
    said = curv("compare", *names, *OBJECTIVE, *options)
    assert said.code == 2 and words in said.err and not said.out
