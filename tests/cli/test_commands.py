"""What every command does when all is well: exit code, standard output, files, options, and every kind of MODEL."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import get_args, get_type_hints

import curvature_cli.main
import curvature_cli.options
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import curvature as cv
from curvature.operators.engine import ENGINES

SMALL = {
    "spectrum": ("--probes", 2, "--steps", 3),
    "trace": ("--products", 6, "--method", "hutchinson"),
    "eig": ("-k", 2),
}
RESULTS = {"spectrum": cv.SpectralDensity, "trace": cv.Estimate, "eig": cv.Eigenpairs}
COMMANDS = pytest.mark.parametrize("command", SMALL)
OBJECTIVE = ("--objective", "./task.py:make")
PARTS = ("--loss", "cross-entropy", "--data", "train.npz")


def parsed(text: str) -> dict:
    """Strict JSON: no NaN, no Infinity."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


def exact_trace(objective: cv.Objective) -> float:
    return float(cv.trace(cv.hessian(objective), products=objective.space.size).value)


def trace_of(said) -> float:
    """The trace that `curv trace ... --format json` printed; the tiny ones are exact."""
    assert (said.code, said.err) == (0, ""), said
    return parsed(said.out)["value"]


# What comes out


@COMMANDS
@pytest.mark.parametrize(
    "model", [OBJECTIVE, ("demo:digits", "--params", "4.*", "--max-examples", 50)], ids=["objective", "demo"]
)
def test_prints_a_table_and_where_it_went(curv, folder, command, model):
    said = curv(command, *model, *SMALL[command])
    assert said.code == 0
    title, *rows, cost = said.out.splitlines()
    assert title.startswith("hessian of ") and "CrossEntropy()" in title
    assert rows and cost.startswith("cost ") and "products" in cost
    assert said.err == "Nothing was written; --out DIR keeps the numbers and a picture.\n"
    assert {path.name for path in folder.iterdir()} <= {"task.py", "train.npz", "__pycache__"}


@COMMANDS
def test_json_is_what_result_json_holds(curv, folder, command):
    said = curv(command, *OBJECTIVE, *SMALL[command], "--format", "json", "--out", "run")
    written = parsed((folder / "run" / "result.json").read_text())
    assert (said.code, said.err) == (0, "")
    assert said.out.count("\n") == 1
    assert set(written.pop("arrays")) == {"file", "sha256"}
    assert parsed(said.out) == written


@COMMANDS
def test_quiet_prints_nothing(curv, command):
    assert curv(command, *OBJECTIVE, *SMALL[command], "--format", "quiet") == (0, "", "")


@COMMANDS
def test_out_holds_numbers_and_picture_and_reads_back(curv, folder, command):
    said = curv(command, *OBJECTIVE, *SMALL[command], "--out", "runs/first")
    out = folder / "runs" / "first"
    names = {"result.json", "arrays.safetensors", f"{command}.png"}
    assert said.code == 0
    assert {path.name for path in out.iterdir()} == names
    assert all(name in said.err for name in names)
    assert (out / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    result = cv.Result.load(out)
    assert type(result) is RESULTS[command]
    assert result.complete
    assert result.origin.operator["model"] == "Net"
    assert {"products": 6, "probes": 2, "k": 2}.items() & result.origin.options.items()


def test_numbers_are_those_of_the_library(curv, task):
    said = curv("trace", *OBJECTIVE, "--format", "json")
    assert trace_of(said) == pytest.approx(exact_trace(task.make()), rel=1e-6)
    said = curv("eig", *OBJECTIVE, "-k", 3, "--which", "both", "--format", "json")
    H = cv.hessian(task.make()).dense().double()
    values = torch.linalg.eigvalsh(H)
    assert parsed(said.out)["values"] == pytest.approx(values[[-1, 0, -2]].tolist(), rel=1e-4)


@COMMANDS
def test_a_seed_repeats_bit_for_bit_and_another_differs(curv, command):
    def told(seed: int) -> dict:
        numbers = parsed(curv(command, *OBJECTIVE, *SMALL[command], "--seed", seed, "--format", "json").out)
        return {key: value for key, value in numbers.items() if key != "cost"}

    assert told(3) == told(3)
    differs = told(3) != {**told(4), "origin": told(3)["origin"]}
    assert differs or command == "eig"  # converged eigenvalues may agree to the last bit


def test_refuses_to_replace_a_result_unless_told(curv, folder):
    assert curv("trace", *OBJECTIVE, "--out", "run").code == 0
    before = (folder / "run" / "result.json").read_bytes()
    said = curv("trace", *OBJECTIVE, "--out", "run", "--seed", 1)
    assert said.code == 2 and said.out == ""
    assert said.err.startswith("curv: run already holds result.json, arrays.safetensors, trace.png.\n")
    assert "--overwrite" in said.err
    assert (folder / "run" / "result.json").read_bytes() == before
    assert curv("trace", *OBJECTIVE, "--out", "run", "--seed", 1, "--overwrite").code == 0
    assert cv.Result.load("run").origin.seed == 1


def test_never_replaces_files_of_other_programs(curv, folder):
    (folder / "run").mkdir()
    (folder / "run" / "arrays.safetensors").write_bytes(b"mine")
    said = curv("trace", *OBJECTIVE, "--out", "run")
    assert said.code == 2 and "run already holds arrays.safetensors." in said.err
    assert [path.name for path in (folder / "run").iterdir()] == ["arrays.safetensors"]


def test_numbers_are_printed_even_when_they_cannot_be_written(curv, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(cv.Result, "save", full)
    said = curv("trace", *OBJECTIVE, "--out", "run")
    assert said.code == 7
    assert "(exact)" in said.out
    assert said.err == "curv: [Errno 28] No space left on device: 'run'.\nFree some disk space.\n"


def test_works_without_matplotlib(curv, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("matplotlib.", "curvature.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    said = curv("trace", *OBJECTIVE, "--out", "run")
    assert said.code == 0
    assert {path.name for path in (folder / "run").iterdir()} == {"result.json", "arrays.safetensors"}
    assert "curvature-toolkit[plot]" in said.err


@pytest.mark.parametrize("kind", ["bar", "log", "none"])
def test_progress_never_reaches_standard_output(curv, kind):
    said = curv("spectrum", *OBJECTIVE, *SMALL["spectrum"], "--format", "json", "--progress", kind)
    assert said.code == 0 and parsed(said.out)["complete"]


def test_a_log_line_now_and_then(curv, monkeypatch):
    monkeypatch.setattr("curvature_cli.output.PATIENCE", 0.0)
    said = curv("spectrum", *OBJECTIVE, *SMALL["spectrum"], "--format", "json", "--progress", "log")
    lines = said.err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("curv: 1/3 steps, at most ")


# What is asked: the options


def test_a_file_of_options_gives_defaults(curv, folder):
    (folder / "curv.toml").write_text('[trace]\nproducts = 5\nseed = 9\nobjective = "./task.py:make"\n')
    said = parsed(curv("trace", "--format", "json").out)
    assert (said["origin"]["options"]["products"], said["origin"]["seed"]) == (5, 9)
    said = parsed(curv("trace", "--products", 7, "--format", "json").out)  # the command line goes first
    assert (said["origin"]["options"]["products"], said["origin"]["seed"]) == (7, 9)
    assert curv("eig", *OBJECTIVE).code == 0  # the table of another command


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "gradient_covariance", "ggn_diagonal", "kfac", "ekfac"])
def test_operator(curv, task, matrix):
    said = curv("trace", *OBJECTIVE, "--operator", matrix.replace("_", "-"), "--format", "json")
    assert parsed(said.out)["origin"]["operator"]["operator"] == matrix
    expected = getattr(cv, matrix)(task.make()).dense().trace()
    assert trace_of(said) == pytest.approx(float(expected), rel=1e-5)


def test_matrices_that_are_held_whole_have_no_engine_and_an_exact_trace(curv):
    said = parsed(curv("trace", *OBJECTIVE, "--operator", "kfac", "--format", "json").out)
    assert (said["samples"], said["cost"]["products"], said["value"]) == (0, 0, pytest.approx(said["value"]))
    refused = curv("trace", *OBJECTIVE, "--operator", "kfac", "--engine", "retained")
    assert refused.code == 2 and "--engine is how products are computed, but kfac is held whole" in refused.err


def test_engines_are_those_of_the_library():
    assert get_args(get_type_hints(curvature_cli.options.Matrix)["engine"]) == tuple(ENGINES)


@pytest.mark.parametrize(
    "options, size",
    [
        (["--params", "first.*"], 16),
        (["--exclude", "*.bias"], 20),
        (["--params", "last.*", "--params", "first.bias", "--exclude", "last.weight"], 6),
    ],
)
def test_params_and_exclude_choose_parameters(curv, options, size):
    for model in (OBJECTIVE, ("./task.py:Net", *PARTS)):
        said = curv("trace", *model, *options, "--format", "json")
        assert parsed(said.out)["origin"]["operator"]["parameters"] == size


def test_max_examples_is_the_front_of_the_data(curv, task):
    x, y = task.data()
    expected = exact_trace(task.make().on((x[:4], y[:4])))
    assert trace_of(curv("trace", *OBJECTIVE, "--max-examples", 4, "--format", "json")) == pytest.approx(expected)


def test_dtype(curv, task):
    said = curv("trace", *OBJECTIVE, "--dtype", "float64", "--format", "json")
    assert parsed(said.out)["origin"]["operator"]["dtype"] == "float64"
    expected = exact_trace(task.make().to(dtype=torch.float64))
    assert trace_of(said) == pytest.approx(expected, rel=1e-13)


def test_mode(curv, folder):
    (folder / "norm.py").write_text(
        "import torch, task\nfrom torch import nn\n"
        "def net():\n"
        "    torch.manual_seed(2)\n"
        "    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))\n"
        "def make():\n"
        "    return task.cv.Objective.of(net(), 'cross-entropy', task.data(), mode='train')\n"
    )
    for model, default in ((("./norm.py:net", *PARTS), "eval"), (("--objective", "./norm.py:make"), "train")):
        traces = {}
        for options in ((), ("--mode", "eval"), ("--mode", "train")):
            said = curv("trace", *model, *options, "--format", "json")
            mode = parsed(said.out)["origin"]["operator"]["mode"]
            assert mode == (options[1] if options else default)
            traces.setdefault(mode, set()).add(trace_of(said))
        assert len(traces["eval"]) == len(traces["train"]) == 1
        assert traces["eval"] != traces["train"]


def test_batch_size_bounds_memory_and_changes_no_number(curv):
    model = ("./task.py:stock", "--loss", "cross-entropy", "--dtype", "float64")
    whole = trace_of(curv("trace", *model, "--data", "train.npz", "--format", "json"))
    parts = trace_of(curv("trace", *model, "--data", "train.npz", "--batch-size", 3, "--format", "json"))
    assert parts == pytest.approx(whole, rel=1e-12)


def test_data_of_the_options_goes_before_that_of_the_objective(curv, task, folder):
    x, y = task.data()
    save_file({"inputs": x[5:].clone(), "targets": y[5:].clone()}, "other.safetensors")
    expected = exact_trace(task.make().on((x[5:], y[5:])))
    said = curv("trace", *OBJECTIVE, "--data", "other.safetensors", "--format", "json")
    assert trace_of(said) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("data", ["train.npz", "./task.py:data", "pairs.pt", "batches.pt", "dict.safetensors"])
def test_every_kind_of_data(curv, task, data):
    x, y = task.data()
    torch.save((x, y), "pairs.pt")
    torch.save([(x[:3], y[:3]), (x[3:], y[3:])], "batches.pt")
    save_file({"input": x, "labels": y}, "dict.safetensors")
    expected = exact_trace(cv.Objective.of(task.stock(), "cross-entropy", (x, y)))
    said = curv("trace", "./task.py:stock", "--loss", "cross-entropy", "--data", data, "--format", "json")
    assert trace_of(said) == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_ones_own(curv, task):
    said = curv("trace", "./task.py:stock", "--loss", "./task.py:loss", "--data", "train.npz", "--format", "json")
    expected = exact_trace(cv.Objective.of(task.stock(), "cross-entropy", task.data()))
    assert trace_of(said) == pytest.approx(expected, rel=1e-5)


def test_code_may_import_its_neighbours_whenever_it_likes(curv, folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "neighbour.py").write_text("from pathlib import Path\nclasses = 2\n")
    (folder / "deep" / "late.py").write_text(
        "def make():\n"
        "    from neighbour import classes\n"
        "    import torch, curvature as cv\n"
        "    net = torch.nn.Linear(3, classes)\n"
        "    return cv.Objective.of(net, 'cross-entropy', (torch.randn(6, 3), torch.arange(6) % 2))\n"
    )
    assert curv("trace", "--objective", "deep/late.py:make", "--format", "quiet") == (0, "", "")


def test_a_file_called_demo_is_code(curv, folder):
    (folder / "demo_task.py").write_text("from task import *\n")
    assert curv("trace", "--objective", "demo_task.py:make", "--format", "quiet") == (0, "", "")
    assert curv("trace", "demo_task.py:make", "--format", "quiet") == (0, "", "")


def test_threads(curv):
    said = curv("trace", *OBJECTIVE, "--threads", 1, "--format", "json")
    assert parsed(said.out)["origin"]["threads"] == 1


# Every kind of MODEL


def test_objective_with_the_weights_of_a_file(curv, task):
    torch.manual_seed(7)
    other = task.Net()
    torch.save({"epoch": 3, "model": other.state_dict()}, "weights.pt")
    save_file(other.state_dict(), "weights.safetensors")
    expected = exact_trace(cv.Objective.of(other, "cross-entropy", task.data()))
    said = curv("trace", "weights.safetensors", *OBJECTIVE, "--format", "json")
    assert trace_of(said) == pytest.approx(expected, rel=1e-6)
    said = curv("trace", "weights.pt", *OBJECTIVE, "--format", "json")
    assert said.err == "curv: took 'model', left out epoch\n"
    assert parsed(said.out)["value"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["state_dict", "safetensors", "stock", "legacy"])
def test_weights_with_their_architecture(curv, task, kind):
    torch.manual_seed(7)
    net = task.Net(hidden=5, activation="sin")
    torch.save(net.state_dict(), "state_dict")
    torch.save(net.state_dict(), "legacy", _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), "safetensors")
    torch.save(nn.Sequential(net.first, nn.Tanh(), net.last), "stock")
    arch = ("--arch", "./task.py:Net", "--arch-arg", "hidden=5", "--arch-arg", "activation=sin")
    if kind == "stock":
        arch = ()
        net = nn.Sequential(net.first, nn.Tanh(), net.last)
    expected = exact_trace(cv.Objective.of(net, "cross-entropy", task.data()))
    said = curv("trace", kind, *arch, *PARTS, "--format", "json")
    assert trace_of(said) == pytest.approx(expected, rel=1e-6)


def test_a_saved_objective_needs_nothing_else(curv, task, folder):
    objective = cv.Objective.of(task.stock(), nn.CrossEntropyLoss(label_smoothing=0.1), task.data())
    objective.save("objective.pt")
    (folder / "task.py").unlink()
    said = curv("trace", "objective.pt", "--format", "json")
    assert trace_of(said) == pytest.approx(exact_trace(objective), rel=1e-6)
    said = curv(
        "trace", "objective.pt", "--data", "train.npz", "--batch-size", 4, "--params", "2.*", "--format", "json"
    )
    assert trace_of(said) == pytest.approx(exact_trace(objective.narrowed("2.*")), rel=1e-5)


def test_a_saved_objective_of_an_own_class_needs_trust_or_arch(curv, task):
    objective = task.make()
    objective.save("objective.pt")
    said = curv("trace", "objective.pt")
    assert (said.code, said.out) == (4, "")
    assert said.err.splitlines() == [
        "curv: objective.pt needs the code at task:Net.",
        "Pass --trust if you trust it, or name yours with --arch.",
    ]
    for way in (["--trust"], ["--arch", "./task.py:Net"]):
        assert trace_of(curv("trace", "objective.pt", *way, "--format", "json")) == pytest.approx(
            exact_trace(objective)
        )


def test_a_pickled_module_of_an_own_class_needs_trust(curv, task):
    torch.manual_seed(7)
    net = task.Net()
    torch.save(net, "own.pt")
    expected = exact_trace(cv.Objective.of(net, "cross-entropy", task.data()))
    said = curv("trace", "own.pt", *PARTS)
    assert (said.code, said.out, len(said.err.splitlines())) == (4, "", 2)
    assert "task.Net" in said.err and "--trust" in said.err
    said = curv("trace", "own.pt", *PARTS, "--trust", "--format", "json")
    assert said.err == "curv: ran code of own.pt, as --trust allows\n"
    assert parsed(said.out)["value"] == pytest.approx(expected, rel=1e-6)


def scripted(net: nn.Module, x: torch.Tensor, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), path)


def traced(net: nn.Module, x: torch.Tensor, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, x), path)


def exported(net: nn.Module, x: torch.Tensor, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (x,), dynamic_shapes={"input": {0: torch.export.Dim("n", min=2)}})
        with open(path, "wb") as file:
            torch.export.save(program, file)


@pytest.mark.parametrize("write", [scripted, traced, exported], ids=lambda write: write.__name__)
def test_compiled_files_need_trust_and_have_the_spectrum_of_the_eager_model(curv, task, write):
    net, (x, _) = task.stock(), task.data()
    write(net, x, "model.bin")
    said = curv("spectrum", "model.bin", *PARTS)
    assert (said.code, said.out, len(said.err.splitlines())) == (4, "", 2)
    options = (*SMALL["spectrum"], "--format", "json")
    said = curv("spectrum", "model.bin", *PARTS, "--trust", *options)
    eager = curv("spectrum", "./task.py:stock", *PARTS, *options)
    assert said.code == eager.code == 0
    assert parsed(said.out)["nodes"] == pytest.approx(parsed(eager.out)["nodes"], rel=1e-4, abs=1e-6)


def test_eigenvalues_of_layers_with_fewer_than_k(curv, task):
    said = curv("eig", *OBJECTIVE, "--by", "parameter", "-k", 4, "--format", "json")
    sizes = [min(4, p.numel()) for p in task.stock().parameters()]
    assert [len(pairs["values"]) for pairs in parsed(said.out)["results"]] == sizes and min(sizes) < 4


def test_a_hugging_face_folder(curv, folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        max_position_embeddings=8,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained("bert")
    ids, labels = torch.randint(0, 20, (6, 5)), torch.arange(6) % 3
    save_file({"input_ids": ids, "labels": labels}, "ids.safetensors")
    expected = cv.Objective.of(model, "cross-entropy", {"input_ids": ids, "labels": labels}, select="classifier.*")
    options = ("--loss", "cross-entropy", "--data", "ids.safetensors", "--params", "classifier.*", "--format", "json")
    said = curv("trace", "bert", *options)
    assert parsed(said.out)["value"] == pytest.approx(exact_trace(expected), rel=1e-5)


# inspect and env


def test_inspect_weights(curv, task):
    state = task.stock().state_dict()
    torch.save({"epoch": 2, "state_dict": state}, "weights.pt")
    said = curv("inspect", "weights.pt")
    assert said.code == 0 and "a torch.save file of tensors" in said.out and "0.weight" in said.out
    facts = parsed(curv("inspect", "weights.pt", "--format", "json").out)
    assert facts["parameters"] == 26 and facts["bytes"] == 4 * 26 and facts["code"] == []
    assert [tensor["shape"] for tensor in facts["tensors"]] == [[4, 3], [4], [2, 4], [2]]
    assert curv("inspect", "weights.pt", "--format", "quiet") == (0, "", "")


def write_every_kind(task) -> dict[str, str]:
    """Files of every kind that can be loaded, and words of what they are."""
    net, (x, _) = task.stock(), task.data()
    torch.save(net.state_dict(), "tensors")
    torch.save(net.state_dict(), "legacy", _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), "safetensors")
    torch.save(net, "stock")
    torch.save(task.Net(), "own")
    task.make().save("objective")
    scripted(net, x, "torchscript")
    exported(net, x, "exported")
    return {
        "tensors": "a torch.save file of tensors",
        "legacy": "before 1.6",
        "safetensors": "a safetensors file",
        "stock": "a pickled nn.Module",
        "own": "a pickled nn.Module",
        "objective": "a saved curvature objective",
        "torchscript": "a TorchScript archive",
        "exported": "an exported program",
    }


def test_inspect_every_kind_without_running_it(curv, task):
    runs = {"own": ["task.Net"], "objective": ["task:Net"], "torchscript": ["TorchScript"]}
    runs["exported"] = ["an exported program"]
    for name, words in write_every_kind(task).items():
        sys.modules.pop("task", None)
        said = curv("inspect", name, "--format", "json")
        assert said.code == 0, said
        facts = parsed(said.out)
        assert words in facts["kind"]
        assert set(runs.get(name, [])) <= set(facts["code"]) and bool(facts["code"]) == (name in runs)
        assert "task" not in sys.modules
        listed = name not in ("own", "torchscript", "exported")
        assert facts["parameters"] == (26 if listed else 0)
        table = curv("inspect", name)
        assert table.code == 0 and facts["kind"] in table.out


def test_inspect_tells_what_is_not_finite_and_shortens_long_lists(curv):
    state = {f"w{i:02}": torch.ones(i + 1) for i in range(50)}
    state["w07"][3] = torch.nan
    torch.save(state, "many.pt")
    said = curv("inspect", "many.pt")
    assert "not finite  w07\n" in said.out
    assert "... and 10 more (--format json)" in said.out


def test_env(curv):
    said = curv("env", "--format", "json")
    facts = parsed(said.out)
    assert facts["torch"] == torch.__version__ and facts["numpy"] == np.__version__
    table = curv("env").out
    assert all(f"{name} " in table and str(value) in table for name, value in facts.items())
    assert curv("env", "--format", "quiet") == (0, "", "")


# The command itself


@pytest.mark.parametrize("tokens", [[], ["--help"], *([command, "--help"] for command in curvature_cli.main.COMMANDS)])
def test_help_needs_no_torch(tokens, tmp_path):
    code = (
        "import sys, curvature_cli.main as cli\n"
        f"code = cli.run({tokens!r})\n"
        "heavy = {'torch', 'curvature', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert (code, heavy) == (0, set()), (code, heavy)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: curv" in ran.stdout and ran.stderr == ""


def test_version(curv):
    from importlib.metadata import version

    assert curv("--version").out == version("curvature-toolkit") + "\n"


def test_help_lists_every_exit_code(curv):
    text = " ".join(curv("--help").out.split())
    for code in ("0 ok", "1 internal", "2 usage", "3 file", "4 refused", "5 model", "6 num", "7 out of", "130 int"):
        assert code in text


def test_as_a_program(folder):
    command = ["curv", "trace", *OBJECTIVE, "--format", "json"]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0 and first.stderr == ""
    numbers = [parsed(ran.stdout) for ran in (first, second)]
    assert numbers[0]["value"] == numbers[1]["value"]
    assert numbers[0]["origin"] == numbers[1]["origin"]


def test_a_reader_that_has_read_enough_is_no_error(folder):
    ran = subprocess.run(
        "curv env --format json | true; exit ${PIPESTATUS[0]}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_trace_goes_on_until_its_tolerance_is_reached_and_says_so(curv):
    told = parsed(curv("trace", *OBJECTIVE, "--rtol", 0.3, "--format", "json").out)
    assert told["converged"] is True and told["origin"]["options"]["rtol"] == 0.3
    few = parsed(curv("trace", *OBJECTIVE, "--rtol", 1e-9, "--budget", "8hvp", "--format", "json").out)
    assert few["converged"] is False and few["cost"]["products"] <= 8


def test_what_models_print_is_not_among_the_results(curv, folder):
    code = (
        (folder / "task.py")
        .read_text()
        .replace("        return self.last(", '        print("loud")\n        return self.last(')
    )
    (folder / "task.py").write_text(code)
    for command in ("trace", "doctor"):
        said = curv(command, *OBJECTIVE, "--format", "json")
        assert said.code == 0 and "loud" in said.err
        assert parsed(said.out)["kind"] in ("Estimate", "Diagnosis")


@pytest.mark.parametrize("loss", ["mse", "bce", "poisson-nll"])
def test_whole_numbers_in_a_table_are_numbers_where_the_loss_is_of_numbers(loss, curv, folder):
    rows = "\n".join(f"{i / 7},{i % 3},{i / 5},{i % 2}" for i in range(12))
    (folder / "table.csv").write_text(f"a,b,c,y\n{rows}\n")
    (folder / "net.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(3, 1)\n")
    task = ("./net.py:net", "--loss", loss, "--data", "table.csv")
    assert curv("trace", *task).code == 0
    assert curv("influence", *task, "--operator", "ggn", "--damping", 1, "--test", "table.csv").code == 0
