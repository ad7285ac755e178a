"""Gates, budgets, and going on: how a command ends when a number is too large, or its budget is spent."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from curvature_cli.gates import NUMBERS, Gate, GateFailed, check, foresee
from curvature_cli.options import Misuse, parsed_budget

import curvature as cv
from curvature.result import Quantity

OBJECTIVE = ("--objective", "./task.py:make")


class Told(cv.Result):
    """A result with these quantities."""

    told: dict[str, Quantity]

    def __init__(self, **quantities: Quantity) -> None:
        object.__setattr__(self, "told", quantities)

    def quantities(self) -> dict[str, Quantity]:
        return self.told


TOLD = Told(lambda_max=Quantity(12.0, bound=0.5), trace=Quantity(30.0, 2.0), **{"0.trace": Quantity(1.0)})


# Gates


@pytest.mark.parametrize(
    "text, fails",
    [("lambda_max>11", True), ("lambda_max > 12", False), ("lambda_max>=12", True), ("lambda_max<12", False),
     ("lambda_max <= 12", True), ("trace < 1e3", True), (" trace>-1.5 ", True), ("*.trace>0.5", True),
     ("*.trace > 2", False), ("trace > inf", False)],
)  # fmt: skip
def test_a_gate_fails_when_its_condition_holds(text, fails):
    if fails:
        with pytest.raises(GateFailed, match=r"--fail-on .* is "):
            check(TOLD, [text])
    else:
        check(TOLD, [text])


def test_the_message_has_the_number_its_error_and_whether_that_leaves_it_open():
    with pytest.raises(GateFailed) as failed:
        check(TOLD, ["trace > 29"])
    assert (
        failed.value.cause == ("--fail-on trace > 29: trace is 30 ± 2, its 95 % interval [26.08, 33.92] holds 29.")
        and failed.value.fix == "Spend more on it to be sure."
    )
    with pytest.raises(GateFailed) as failed:
        check(TOLD, ["trace > 2", "lambda_max > 3"])
    assert "[26.08, 33.92] is above 2." in failed.value.cause
    assert "lambda_max is 12 (within 0.5), its 95 % interval [11.5, 12.5] is above 3." in failed.value.cause
    assert failed.value.fix == ""
    with pytest.raises(GateFailed, match=r"trace is 1\."):
        check(TOLD, ["0.trace > 0.5"])


def test_what_passes_by_less_than_its_error_is_told():
    assert check(TOLD, ["trace > 31", "lambda_max > 13"]) == [
        "not --fail-on trace > 31, but only just: trace is 30 ± 2, its 95 % interval [26.08, 33.92] holds 31."
    ]


def test_what_has_not_converged_passes_no_gate():
    moving = Told(lambda_max=Quantity(12.0, bound=0.5, converged=False))
    with pytest.raises(GateFailed) as failed:
        check(moving, ["lambda_max > 100"])
    assert failed.value.cause == "--fail-on lambda_max > 100 is not decided: lambda_max is 12 (not converged)."
    assert failed.value.fix == "Spend more on it to be sure."
    with pytest.raises(GateFailed, match=r"lambda_max > 10: lambda_max is 12 \(not converged\)\."):
        check(moving, ["lambda_max > 10"])


def test_of_what_was_stopped_early_only_errors_are_believed():
    early = Told(**TOLD.told, outliers=Quantity(3.0))
    object.__setattr__(early, "complete", False)
    assert check(early, ["lambda_max > 100", "trace > 40"]) == []
    for gate in ("trace > 31", "outliers > 5"):  # within its error; may still be counted
        with pytest.raises(GateFailed, match="is not decided"):
            check(early, [gate])


def test_what_was_not_measured_before_the_end_passes_no_gate(curv):
    tokens = ("--measure", "sam", "--measure", "trace", "--products", 20, "--budget", "9hvp", "--format", "quiet")
    said = curv("sharpness", *OBJECTIVE, *tokens, "--fail-on", "trace > 1e9")
    assert said.code == 10 and "is not decided: the work ended before there was such a number." in said.err
    assert curv("sharpness", *OBJECTIVE, *tokens[:2], *tokens[-2:], "--fail-on", "trace > 1e9").code == 2


def test_eigenvalues_that_have_not_converged_pass_no_gate(curv):
    eig = ("eig", *OBJECTIVE, "--format", "quiet", "--fail-on", "lambda_max > 1e9")
    assert curv(*eig).code == 0
    early = curv(*eig, "--rtol", 1e-12, "--max-steps", 1)
    assert early.code == 10 and "is not decided: lambda_max is" in early.err and "(not converged)" in early.err


def test_what_is_no_number_passes_no_gate():
    with pytest.raises(GateFailed):
        check(Told(loss=Quantity(math.nan)), ["loss > 1"])
    with pytest.raises(GateFailed):
        check(Told(loss=Quantity(math.inf)), ["loss > 1"])


@pytest.mark.parametrize("text", ["", "lambda_max", "lambda_max > x", "> 3", "a == 3", "a > nan", "a > 1 > 2", "3 < "])
def test_what_is_no_condition_is_refused_before_anything_is_measured(curv, text):
    with pytest.raises(Misuse, match="is no condition"):
        Gate.of(text)
    said = curv("trace", *OBJECTIVE, "--fail-on", text)
    assert (said.code, said.out) == (2, "") and "Write it as 'lambda_max > 100'" in said.err


def test_many_failures_are_counted():
    table = Told(**{f"{i}.trace": Quantity(float(i)) for i in range(10)})
    with pytest.raises(GateFailed, match=r"7\.trace is 7\. And 2 more\."):
        check(table, ["*.trace >= 5"])


def test_a_gate_that_fails_ends_with_10_after_all_is_written(curv, folder):
    said = curv("trace", *OBJECTIVE, "--fail-on", "trace > 1e-9", "--out", "run", "--format", "json")
    assert said.code == 10 and cv.Result.load("run").complete
    assert json.loads(said.out)["kind"] == "Estimate"
    assert re.fullmatch(r"curv: --fail-on trace > 1e-09: trace is \S+.*\n", said.err)
    assert curv("trace", *OBJECTIVE, "--fail-on", "trace > 1e9", "--format", "quiet") == (0, "", "")


@pytest.mark.parametrize(
    "command, gate",
    [
        (("spectrum", "--probes", 2, "--steps", 3), "lambda_max > -1"),
        (("eig", "-k", 2), "eigenvalue_2 > -1"),
        (("landscape", "--axes", 1, "--points", 3), "loss > 0"),
        (("roughness", "--directions", 3, "--steps", 4), "roughness >= 0"),
        (("sharpness", "--measure", "trace"), "trace > -1e9"),
        (("spectrum", "--by", "layer", "--probes", 2, "--steps", 3), "*.lambda_max > -1"),
    ],
)
def test_every_measurement_has_gates(curv, command, gate):
    assert curv(*command, *OBJECTIVE, "--fail-on", gate).code == 10


@pytest.mark.parametrize("command", sorted(NUMBERS))
def test_a_number_that_a_command_never_has_is_refused_before_anything_is_read(curv, command):
    model = ("nowhere.pt",) * (1 + (command == "path"))
    said = curv(command, *model, "--fail-on", "nothing > 1")
    assert said.code == 2 and "There is no 'nothing' to --fail-on" in said.err
    foresee(["*.anything > 1"], command)


def test_a_name_that_there_is_none_of_is_answered_with_those_there_are(curv):
    said = curv("spectrum", *OBJECTIVE, "--probes", 2, "--steps", 3, "--fail-on", "lamda_max > 1", "--format", "quiet")
    assert said.code == 2
    assert said.err == (
        "curv: There is no 'lamda_max' to --fail-on, but lambda_min, lambda_max, trace, negative_share, outliers.\n"
        "Did you mean lambda_max?\n"
    )
    said = curv("diag", *OBJECTIVE, "--fail-on", "trace > 1", "--format", "quiet")
    assert said.code == 2 and "the result has no such numbers" in said.err


# Budgets


@pytest.mark.parametrize(
    "text, budget",
    [("60s", {"seconds": 60}), ("1.5m", {"seconds": 90}), ("2h", {"seconds": 7200}), ("200hvp", {"products": 200})],
)
def test_a_budget_is_a_time_or_a_number_of_products(text, budget):
    assert parsed_budget(text) == budget


@pytest.mark.parametrize("text", ["", "60", "s", "0s", "-1s", "1e3s", "0hvp", "1.5hvp", "inf", "10 s", "3days"])
def test_anything_else_is_no_budget(curv, text):
    with pytest.raises(ValueError, match="60s, 10m, 2h or 200hvp"):
        parsed_budget(text)
    said = curv("trace", *OBJECTIVE, "--budget", text)
    assert (said.code, said.out) == (2, "") and len(said.err.splitlines()) == 2


def test_a_budget_of_products_stops_at_the_same_place_with_what_there_is(curv):
    command = ("spectrum", *OBJECTIVE, "--probes", 3, "--steps", 8, "--budget", "17hvp", "--format", "json")
    first, second = curv(*command), curv(*command)
    assert (first.code, first.err) == (
        0,
        "curv: the budget of 17hvp is spent: this is what was measured until then.\n",
    )
    told, again = json.loads(first.out), json.loads(second.out)
    assert told["cost"]["products"] == 15 and told["steps"] == 5 and told["complete"] is False
    del told["cost"], again["cost"]
    assert told == again


@pytest.mark.parametrize("products, budget, spent", [(32, "12hvp", 12), (8, "100hvp", 8)])
def test_the_budget_of_a_trace_is_planned_with(curv, products, budget, spent):
    said = json.loads(curv("trace", *OBJECTIVE, "--products", products, "--budget", budget, "--format", "json").out)
    assert said["cost"]["products"] == spent and said["complete"] is True and said["stderr"] > 0


def test_a_budget_of_time_stops_with_what_there_is(curv):
    tokens = ("--probes", 2, "--steps", 2000, "--engine", "recomputed", "--budget", "1s", "--format", "json")
    told = json.loads(curv("spectrum", "demo:digits", *tokens).out)
    assert told["complete"] is False and 0 < told["steps"] < 2000
    assert 0.5 < told["cost"]["seconds"] < 10


def test_a_budget_too_small_for_anything_is_an_error(curv):
    said = curv("spectrum", *OBJECTIVE, "--budget", "3hvp")
    assert (said.code, said.out) == (7, "")
    assert said.err == "curv: The budget of 3hvp was spent before there was anything to tell.\nGive more.\n"


@pytest.mark.parametrize("command", ["landscape", "roughness"])
def test_commands_without_products_have_budgets_of_time_only(curv, command):
    said = curv(command, *OBJECTIVE, "--budget", "3hvp")
    assert said.code == 2 and "takes no products" in said.err and "--budget of time" in said.err


def test_layers_share_a_budget(curv):
    tokens = ("--by", "layer", "--rtol", 1e-30, "--max-steps", 500, "--budget", "20hvp", "--format", "json")
    said = curv("eig", *OBJECTIVE, *tokens)
    told = json.loads(said.out)
    assert said.code == 0 and told["cost"]["products"] <= 20 and told["complete"] is False
    assert told["names"] == ["first", "last"]


def test_a_table_of_measures_keeps_those_that_are_done(curv):
    tokens = ("--measure", "sam", "--measure", "trace", "--products", 20, "--budget", "9hvp", "--format", "json")
    told = json.loads(curv("sharpness", *OBJECTIVE, *tokens).out)
    assert told["names"] == ["sam"] and told["complete"] is False


# Going on


def test_what_a_budget_left_out_is_done_when_the_command_is_started_again(curv, folder):
    command = ("spectrum", *OBJECTIVE, "--probes", 2, "--steps", 12, "--format", "json")
    whole = json.loads(curv(*command).out)
    going = (*command, "--out", "run", "--resume", "--budget", "10hvp")
    for steps in (5, 9):  # the first step is done once more, to see that the matrix is the same
        said = curv(*going)
        assert json.loads(said.out)["steps"] == steps
        assert said.err.endswith("this is what was measured until then. The same command goes on.\n")
        assert (folder / "run" / "checkpoint").exists()
    last = json.loads(curv(*going).out)
    assert last["complete"] and last["cost"]["products"] == whole["cost"]["products"]
    for told in (whole, last):
        told.pop("cost")
    assert last == whole
    assert {path.name for path in Path("run").iterdir()} == {"result.json", "arrays.safetensors", "spectrum.png"}
    said = curv(*going)
    assert said.code == 2 and "The work in run is done." in said.err


def test_a_landscape_goes_on_with_its_directions(curv, folder):
    command = ("landscape", *OBJECTIVE, "--directions", "hessian", "--axes", "1", "--points", 5, "--format", "json")
    whole = json.loads(curv(*command).out)
    going = (*command, "--out", "run", "--resume")
    said = curv(*going, "--budget", "8hvp")
    assert said.code == 7 and said.err.endswith("The same command goes on.\n")
    assert {path.name for path in Path("run").iterdir()} == {"checkpoint.directions"}
    last = json.loads(curv(*going).out)
    assert last["loss"] == whole["loss"] and last["coordinates"] == whole["coordinates"]
    assert "checkpoint.directions" not in {path.name for path in Path("run").iterdir()}


def test_resuming_needs_a_folder(curv):
    said = curv("trace", *OBJECTIVE, "--resume")
    assert (said.code, said.err) == (2, "curv: --resume is for work that is kept in --out.\nPass --out DIR, too.\n")


def test_another_question_does_not_go_on(curv, folder):
    going = ("--out", "run", "--resume", "--budget", "8hvp", "--format", "quiet")
    assert curv("spectrum", *OBJECTIVE, "--probes", 2, *going).code == 0
    before = (folder / "run" / "checkpoint").read_bytes()
    said = curv("spectrum", *OBJECTIVE, "--probes", 3, *going)
    assert said.code == 3 and "is the checkpoint of other work: its options.probes is 2, not 3" in said.err
    assert (folder / "run" / "checkpoint").read_bytes() == before


def test_what_killed_processes_left_half_written_is_removed(curv, folder):
    (folder / "run").mkdir()
    stale, alive = folder / "run" / ".tmp-999999999-ab", folder / "run" / ".tmp-1-ab"
    for path in (stale, alive):
        path.write_bytes(b"half")
    assert curv("trace", *OBJECTIVE, "--out", "run", "--format", "quiet").code == 0
    assert not stale.exists() and alive.exists()


def test_what_another_wrote_meanwhile_is_kept(curv, folder):
    (folder / "late.py").write_text(
        "from pathlib import Path\nimport task\n\ndef make():\n"
        "    Path('run').mkdir()\n    Path('run/result.json').write_text('another')\n    return task.make()\n"
    )
    said = curv("trace", "--objective", "./late.py:make", "--out", "run")
    assert said.code == 0 and "another run has written into run meanwhile" in said.err
    assert "Written to run-2: result.json" in said.err and cv.Result.load("run-2").complete
    assert Path("run/result.json").read_text() == "another"
