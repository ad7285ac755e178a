"""Defaults of options: from a file and the environment, who goes before whom, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OBJECTIVE = ("--objective", "./task.py:make")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No variable of whoever runs the tests."""
    import os

    for name in [name for name in os.environ if name.startswith("CURV_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def asked(curv):
    """What a trace was asked for: its products and its seed."""

    def run(*tokens: object) -> tuple[int, int]:
        said = curv("trace", *OBJECTIVE, *tokens, "--format", "json")
        assert said.code == 0, said
        origin = json.loads(said.out)["origin"]
        return origin["options"]["products"], origin["seed"]

    return run


def test_the_command_line_goes_before_the_environment_that_before_the_file_and_that_before_defaults(asked, monkeypatch):
    assert asked() == (32, 0)
    Path("curv.toml").write_text("[trace]\nproducts = 4\nseed = 4\n")
    assert asked() == (4, 4)
    monkeypatch.setenv("CURV_TRACE_PRODUCTS", "5")
    assert asked() == (5, 4)
    assert asked("--products", 6) == (6, 4)


def test_options_of_one_command_go_before_those_of_all(asked, monkeypatch):
    Path("curv.toml").write_text("seed = 1\nproducts = 7\n[trace]\nseed = 2\n[spectrum]\nseed = 3\n")
    assert asked() == (7, 2)
    monkeypatch.setenv("CURV_SEED", "8")
    assert asked() == (7, 8)
    monkeypatch.setenv("CURV_TRACE_SEED", "9")
    assert asked() == (7, 9)


def test_options_that_a_command_does_not_have_are_left_to_others(curv, monkeypatch):
    Path("curv.toml").write_text("probes = 3\nproducts = 7\n[sharpness]\nsigma = 0.1\n")
    monkeypatch.setenv("CURV_STEPS", "4")
    assert curv("eig", *OBJECTIVE, "--format", "quiet") == (0, "", "")


def test_the_file_is_curv_toml_then_pyproject_toml_unless_one_is_given(asked, curv):
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n[tool.curv]\nseed = 3\n[tool.curv.trace]\nproducts = 9\n")
    assert asked() == (9, 3)
    Path("curv.toml").write_text("seed = 4\n")
    assert asked() == (32, 4)
    Path("mine.toml").write_text("seed = 5\n")
    assert asked("-C", "mine.toml") == asked("--config", "mine.toml") == (32, 5)
    assert asked("--config", "pyproject.toml") == (9, 3)
    said = curv("trace", *OBJECTIVE, "--config", "none.toml")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("curv: There is no file none.toml, which --config names.\n")


def test_a_project_that_says_nothing_of_curv_changes_nothing(asked):
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert asked() == (32, 0)


def test_names_are_written_with_hyphens_or_underscores_and_lists_as_words(curv, monkeypatch):
    Path("curv.toml").write_text("[trace]\nmax-examples = 4\nparams = ['first.*']\n")
    said = json.loads(curv("trace", *OBJECTIVE, "--format", "json").out)
    assert said["origin"]["operator"]["parameters"] == 16
    monkeypatch.setenv("CURV_PARAMS", "first.bias last.bias")
    said = json.loads(curv("trace", *OBJECTIVE, "--format", "json").out)
    assert said["origin"]["operator"]["parameters"] == 6


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("CURV_TRACE_PRODCTS", "3", "has 'CURV_TRACE_PRODCTS', which is no option. Did you mean CURV_TRACE_PRODUCTS?"),
        ("CURV_SEEED", "3", "has 'CURV_SEEED', which is no option. Did you mean CURV_SEED?"),
        ("CURV_ZZZZZZ", "3", "Options are at the top, or in a table of their command"),
        ("CURV_SEED", "many", 'from CURV_SEED: unable to convert "many" into int'),
        ("CURV_TRUST", "true", "--trust cannot be set in CURV_TRUST: say it for each file that you trust"),
        ("CURV_TRACE_ALLOW_GLOBAL", "os.system", "--allow-global cannot be set in CURV_TRACE_ALLOW_GLOBAL"),
    ],
)
def test_a_wrong_variable_is_refused(curv, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    said = curv("trace", *OBJECTIVE)
    assert (said.code, said.out) == (2, "") and words in said.err
    assert len(said.err.splitlines()) == 2


@pytest.mark.parametrize("option", ["trust = true", "allow-global = ['os.system']"])
@pytest.mark.parametrize("place", ["curv.toml", "pyproject.toml"])
def test_no_file_says_what_may_be_trusted(curv, option, place):
    table = "[tool.curv.trace]" if place == "pyproject.toml" else "[trace]"
    Path(place).write_text(f"{table}\n{option}\n")
    said = curv("trace", *OBJECTIVE)
    assert (said.code, said.out) == (2, "") and "say it for each file that you trust" in said.err


def test_a_wrong_name_for_another_command_is_seen_too(curv):
    Path("curv.toml").write_text("[spectrum]\nprobs = 3\n")
    said = curv("trace", *OBJECTIVE)
    assert said.code == 2 and "'spectrum.probs', which is no option. Did you mean spectrum.probes?" in said.err


def test_env_tells_what_is_set_and_where(curv, monkeypatch):
    assert curv("env", "--config").out.startswith("No defaults are set")
    Path("curv.toml").write_text("products = 5\n[trace]\nseed = 3\n")
    monkeypatch.setenv("CURV_TRACE_SEED", "4")
    said = json.loads(curv("env", "--config", "--format", "json").out)
    assert said["trace.seed"] == {"value": "4", "source": "CURV_TRACE_SEED"}
    assert said["trace.products"] == said["diag.products"] == {"value": 5, "source": "curv.toml"}
    assert "spectrum.products" not in said and "spectrum.seed" not in said
    lines = curv("env", "--config").out.splitlines()
    assert [line.split() for line in lines if line.startswith("trace.seed")] == [
        ["trace.seed", "'4'", "from", "CURV_TRACE_SEED"]
    ]
    Path("mine.toml").write_text("k = 9\n")
    assert json.loads(curv("env", "--config", "-C", "mine.toml", "--format", "json").out)["eig.k"]["value"] == 9
