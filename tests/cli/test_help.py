"""What `--help` says is so: every example of every command runs, and completion knows commands and options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from curvature_cli import options
from curvature_cli.main import COMMANDS, build
from safetensors.torch import save_file

import curvature as cv


def examples(command: str) -> list[str]:
    """The command lines in the docstring of a command."""
    text = inspect.getdoc(getattr(importlib.import_module(f"curvature_cli.{command}"), command)) or ""
    return re.findall(r"`(curv [^`]+)`", text.partition("Parameters\n---")[0].replace("\n", " "))


EXAMPLES = [example for command in COMMANDS for example in examples(command)]


@pytest.fixture
def files(folder, task) -> Path:
    """Beside task.py and train.npz what examples name: models, weights of a run, other data."""
    for seed, name in enumerate(("model", "first", "second", "last", "a", "b")):
        module = task.stock()
        torch.manual_seed(seed)
        cv.Objective.of(module.apply(_drawn), "cross-entropy", task.data()).save(f"{name}.pt")
    torch.save(task.Net().state_dict(), "weights.pt")
    save_file(task.Net().state_dict(), "model.safetensors")
    for name in ("test.npz", "held-out.npz"):
        np.savez(name, x=torch.randn(6, 3).numpy(), y=np.arange(6) % 2)
    return folder


def _drawn(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(curv, command, capsys):
    shown = " ".join(curv(command, "--help").out.split())
    found = examples(command)
    assert found and all(" ".join(example.split()) in shown for example in found)
    assert all(example.split()[1] == command for example in found)


def tiered(example: str):
    """Those of the embedded models take seconds, those of the tiny ones beside them do not."""
    tiny = re.search(r"\w+\.pt|task\.py|run1", example) or example.split()[1] in ("eig", "trace", "env")
    return pytest.param(example, marks=() if tiny else pytest.mark.slow, id=example.removeprefix("curv "))


@pytest.mark.parametrize("example", [tiered(example) for example in EXAMPLES])
def test_an_example_runs(curv, files, task, example):
    if example.startswith("curv compare run1"):
        for name, products in (("run1", 8), ("run2", 12)):
            cv.trace(cv.hessian(task.make()), products=products).save(name)
    said = curv(*shlex.split(example)[1:])
    assert said.code == 0 and said.out and "Traceback" not in said.err, said


def test_help_of_all_names_every_command(curv):
    said = curv("--help")
    assert said.code == 0 and said.err == ""
    assert {line.split()[1] for line in said.out.splitlines() if line.startswith("│ ")} >= set(COMMANDS)


def test_one_option_has_one_meaning_everywhere():
    """What is in the groups that commands share is in no command besides, with other words."""
    shared = {
        option.name.replace("_", "-")
        for group in (options.Task, options.Matrix, options.Look, options.Goal, options.Output)
        for option in dataclasses.fields(group)
    }
    words: dict[str, set[str]] = {}
    for command in COMMANDS:
        for argument in build()[command].assemble_argument_collection():
            words.setdefault(argument.name.removeprefix("--"), set()).add(str(argument.parameter.help))
    shared -= {
        "rtol",
        "products",
        "config",
    }  # eig has another tolerance, sharpness other products, env shows the file's
    assert {name: texts for name, texts in words.items() if name in shared and len(texts) > 1} == {}


def test_bash_completes_commands_and_options(tmp_path):
    script = build().generate_completion(shell="bash")
    (tmp_path / "curv.bash").write_text(script)
    assert subprocess.run(["bash", "-n", "curv.bash"], cwd=tmp_path).returncode == 0
    (function,) = re.findall(r"complete .*-F (\w+) curv", script)
    ask = (
        f'source curv.bash; COMP_WORDS=($1 $2 $3); COMP_CWORD=$4; COMP_LINE="$1 $2 $3"; COMP_POINT=${{#COMP_LINE}}; '
        f'{function}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )

    def completed(*words: str) -> set[str]:
        line = ["bash", "-c", ask, "bash", *[*words, "", ""][:3], str(len(words) - 1)]
        return set(subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split())

    assert completed("curv", "sp") == {"spectrum"}
    assert {"--probes"} <= completed("curv", "spectrum", "--pro") <= {"--probes", "--progress"}
