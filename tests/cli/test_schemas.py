"""What every command prints with --format json is what cli/schemas.json says, and the schema says all of it."""

from __future__ import annotations

import copy
import json
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
import torch
from curvature_cli.gates import NUMBERS, foresee
from curvature_cli.main import COMMANDS

import curvature as cv

SCHEMAS = json.loads((files("curvature_cli") / "schemas.json").read_text(encoding="utf-8"))
OBJECTIVE = ("--objective", "./task.py:make")
TINY = {
    "spectrum": ("--probes", 2, "--steps", 3),
    "eig": ("-k", 2),
    "trace": ("--rtol", 0.3),
    "diag": ("--products", 4),
    "landscape": ("--points", 3, "--accuracy"),
    "roughness": ("--directions", 3, "--steps", 4),
    "sharpness": ("--measure", "trace", "--measure", "sam", "--invariance"),
    "path": ("a.pt", "b.pt", "--points", 3),
    "ihvp": ("--damping", 1.0),
    "influence": ("--self",),
    "compare": ("run1", "run2"),
    "optim": ("--optimizer", "sgd", "--steps", 2, "--repeats", 1, "--lr", "0.1"),
    "report": ("--question", "spectrum", "--question", "rates"),
    "inspect": ("a.pt",),
    "env": (),
    "doctor": (),
}
WHOLE = ("path", "compare", "inspect", "env")  # commands that take no --objective


def validator(command: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": f"#/commands/{command}", **SCHEMAS})


@pytest.fixture
def printed(curv, folder, task):
    """What a command prints as JSON."""
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        cv.Objective.of(torch.nn.Linear(3, 2), "cross-entropy", task.data()).save(f"{name}.pt")
        cv.trace(cv.hessian(task.make()), products=8, seed=seed).save(f"run{seed + 1}")
    np.savez("test.npz", x=np.ones((2, 3), dtype=np.float32), y=np.arange(2))

    def run(command: str, *more: object) -> dict:
        model = () if command in WHOLE else OBJECTIVE
        said = curv(command, *TINY[command], *model, *more, "--format", "json")
        assert said.code == 0, said
        return json.loads(said.out)

    return run


def test_the_schemas_are_schemas_and_there_is_one_for_every_command():
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)
    assert set(COMMANDS) <= set(SCHEMAS["commands"]) and set(COMMANDS) <= set(TINY)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_what_its_schema_says_and_nothing_less_or_more(printed, command):
    told, schema = printed(command), validator(command)
    schema.validate(told)
    if command == "env":  # names of packages, whichever there are
        return
    for name in set(told) - {"schema"}:
        less = {key: value for key, value in told.items() if key != name}
        assert not schema.is_valid(less), name
        assert not schema.is_valid({**told, name: object}), name
    assert not schema.is_valid({**told, "more": 1})


@pytest.mark.parametrize("command", NUMBERS)
def test_the_numbers_of_a_command_are_those_that_gates_know_of(printed, command):
    printed(command, "--out", "run")
    names = cv.Result.load("run").quantities()
    foresee([f"{name} > 1" for name in names], command)
    assert bool(names) == bool(NUMBERS[command])


@pytest.mark.parametrize("command", ["spectrum", "eig", "trace"])
def test_results_by_layer_have_schemas_too(printed, command):
    told = printed(command, "--by", "layer")
    validator(command).validate(told)
    wrong = copy.deepcopy(told)
    del wrong["results"][0]["cost"]
    assert not validator(command).is_valid(wrong)


def test_large_tensors_are_named_and_settings_have_their_source(printed, folder):
    told = printed("diag", "--data", "test.npz")
    validator("diag").validate(told)
    (folder / "curv.toml").write_text("seed = 3\n")
    validator("env").validate(printed("env", "--config"))
    assert not validator("env").is_valid({"trace.seed": {"value": 3}})
    stored = {"array": "value", "shape": [2000], "dtype": "float32"}
    validator("diag").validate({**told, "value": stored})
    assert not validator("diag").is_valid({**told, "value": {**stored, "shape": "2000"}})
