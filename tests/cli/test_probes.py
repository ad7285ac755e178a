"""What the commands of the loss landscape say, against the library asked the same."""

from __future__ import annotations

import json

import pytest
import torch

import curvature as cv

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
