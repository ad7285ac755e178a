"""What the commands of the loss landscape say, against the library asked the same."""

from __future__ import annotations

import json

import pytest
import torch

import curvature as cv
from curvature.io.tables import read_table

OBJECTIVE = ("--objective", "./task.py:make")


def ask(curv, *options) -> dict:
    said = curv(*options, *OBJECTIVE, "--format", "json")
    assert said.code == 0 and not said.err, said
    return json.loads(said.out)


def checkpoints(task, folder, count: int) -> tuple[list[str], cv.Objective]:
    """The weights of a short run, as files, and the objective at its end."""
    objective = task.make()
    names = []
    for step in range(count):
        names.append(f"{step}.pt")
        torch.save(dict(objective.params), folder / names[-1])
        objective = objective.at(objective.position - (0.5 + step) * objective.gradient())
    return names, objective


@pytest.mark.parametrize(("axes", "look"), [("1", cv.line), ("2", cv.plane)])
def test_a_landscape_is_that_of_the_library(curv, task, axes, look):
    found = ask(curv, "landscape", "--axes", axes, "--points", 5, "--radius", 0.5, "--seed", 3, "--accuracy")
    objective = task.make()
    directions = cv.random_directions(objective, int(axes), seed=3)
    expected = look(objective, directions, points=5, radius=0.5, accuracy=True)
    assert found["loss"] == expected.loss.tolist() and found["accuracy"] == expected.accuracy.tolist()


def test_directions_are_random_or_of_the_hessian_or_the_gradient(curv, task):
    objective = task.make()
    drawn = cv.random_directions(objective, 2, scale=None)
    found = ask(curv, "landscape", "--points", 3, "--scale", "none")
    torch.testing.assert_close(torch.tensor(found["directions"]), drawn)
    found = ask(curv, "landscape", "--points", 3, "--directions", "gradient")
    torch.testing.assert_close(torch.tensor(found["directions"][0]), objective.gradient())
    found = ask(curv, "landscape", "--points", 3, "--directions", "hessian")
    values = torch.linalg.eigvalsh(cv.hessian(objective).dense())
    assert found["names"] == [f"eigenvector, λ = {values[i]:.4g}" for i in (-1, 0)]


def test_other_checkpoints_are_directions_and_a_run_is_drawn(curv, task, folder):
    names, end = checkpoints(task, folder, 4)
    torch.save(dict(end.params), folder / "end.pt")
    found = ask(curv, "landscape", "end.pt", "--points", 3, "--toward", names[0])
    torch.testing.assert_close(torch.tensor(found["directions"][0]), task.make().position - end.position)
    run = [option for name in names for option in ("--trajectory", name)]
    found = ask(curv, "landscape", "end.pt", "--points", 3, "--directions", "trajectory", *run, "--out", "out")
    rows = cv.positions(end, [torch.load(folder / name) for name in names] + [end])
    expected = cv.trajectory(end, rows)
    torch.testing.assert_close(torch.tensor(found["directions"]), expected.directions)
    assert (folder / "out" / "landscape.png").stat().st_size > 1000


def test_surfaces_and_other_data(curv, folder):
    found = ask(curv, "landscape", "--points", 3, "--surface", "--held-out", "./task.py:data", "--out", "out")
    torch.testing.assert_close(found["held_out_loss"], found["loss"])
    assert (folder / "out" / "landscape.png").stat().st_size > 1000


def test_the_roughness_is_that_of_the_library(curv, task, folder):
    found = ask(curv, "roughness", "--directions", 5, "--radius", 0.5, "--steps", 4, "--seed", 2, "--out", "out")
    expected = cv.roughness(task.make(), directions=5, radius=0.5, steps=4, seed=2)
    assert found["value"] == float(expected.value) and found["profiles"] == expected.profiles.tolist()
    assert (folder / "out" / "roughness.png").stat().st_size > 1000


def test_the_table_of_sharpness_is_that_of_the_library(curv, task, folder):
    measures = ("lambda_max", "adaptive_sam")
    found = ask(curv, "sharpness", "--measure", measures[0], "--measure", measures[1], "--rho", 0.1, "--out", "out")
    expected = cv.sharpness(task.make(), measures=measures, rho=0.1)
    assert found["names"] == list(measures) and found["values"] == expected.values.tolist()
    assert (folder / "out" / "sharpness.png").stat().st_size > 1000
    columns = read_table(folder / "out" / "sharpness.csv")
    assert columns["measure"] == list(measures) and list(map(float, columns["value"])) == expected.values.tolist()
    assert columns["stderr"] == columns["change"] == ["", ""]
    said = curv("sharpness", *OBJECTIVE, "--measure", "flatness")
    assert said.code == 2 and "measures are some of lambda_max" in said.err and "but got flatness" in said.err


@pytest.mark.parametrize("kind", ["line", "polygon", "bezier"])
def test_a_path_is_that_of_the_library(curv, task, folder, kind):
    names, end = checkpoints(task, folder, 2)
    start = end.with_state(torch.load(folder / names[0]))
    other = end.with_state(torch.load(folder / names[1]))
    train = () if kind == "line" else ("--steps", 5, "--bends", 2)
    found = ask(curv, "path", *names, "--kind", kind, "--points", 5, *train, "--out", "out")
    if kind == "line":
        expected = cv.interpolate(start, other, points=5)
    else:
        expected = cv.connect(start, other, kind=kind, points=5, steps=5, bends=2)
    assert found["loss"] == expected.loss.tolist() and found["knots"] == expected.knots.tolist()
    assert (folder / "out" / "path.png").stat().st_size > 1000
    columns = read_table(folder / "out" / "path.csv")
    assert list(columns) == ["t", "arc", "loss"] and list(map(float, columns["loss"])) == found["loss"]


def test_hidden_units_are_aligned_before_a_path(curv, task, folder):
    start = task.make()
    turned = start.at({n: p.flip(0) if n.startswith("first") else p.flip(1) if n == "last.weight" else p
                       for n, p in start.params.items()})  # fmt: skip
    torch.save(dict(start.params), folder / "a.pt")
    torch.save(dict(turned.params), folder / "b.pt")
    assert ask(curv, "path", "a.pt", "b.pt", "--points", 5)["arc"][-1] > 0.1
    assert ask(curv, "path", "a.pt", "b.pt", "--points", 5, "--align")["arc"][-1] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--directions", "trajectory"), "--directions trajectory is for the checkpoints of a run"),
        (("--axes", "1", "--toward", "a.pt", "--toward", "a.pt"), "--toward is given 2 times, for 1 axes"),
        (("--points", "4"), "points is odd"),
        (("--crowd", "0.5"), "crowd is 1 or more, or 'adaptive', but got 0.5"),
        (("--toward", "none.pt"), "none.pt"),
    ],
)
def test_misuse_of_a_landscape_says_what_to_do(curv, task, folder, options, words):
    torch.save(dict(task.make().params), folder / "a.pt")
    said = curv("landscape", *OBJECTIVE, *options)
    assert said.code in (2, 3) and words in said.err and "Traceback" not in said.err, said
