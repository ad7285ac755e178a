"""What every command does with bad input: its exit code, one line of cause, one of fix, and nothing else at all."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import curvature as cv

USAGE, UNREADABLE, UNSAFE, UNFIT, NUMERICAL, RESOURCES = 2, 3, 4, 5, 6, 7
PARTS = ("--loss", "cross-entropy", "--data", "train.npz")
ARCH = ("--arch", "./task.py:stock")
OBJECTIVE = ("--objective", "./task.py:make")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, and every folder, below `folder`; but not what Python caches."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture
def refused(curv, folder) -> Callable[..., tuple[str, str]]:
    """Runs a command line that must be refused with `code`; returns the lines of cause and fix."""

    def run(code: int, *tokens: object, command: str = "trace") -> tuple[str, str]:
        before = contents(folder)
        said = curv(command, *tokens)
        assert said.code == code, said
        assert said.out == ""
        assert "Traceback" not in said.err
        cause, fix = said.err.removesuffix("\n").split("\n")  # exactly two lines
        assert cause.startswith("curv: ") and fix
        assert cause.isprintable() and fix.isprintable()
        assert contents(folder) == before
        return cause.removeprefix("curv: "), fix

    return run


@pytest.fixture
def weights(task) -> Path:
    """A file of good weights for task.stock."""
    torch.save(task.stock().state_dict(), "weights.pt")
    return Path("weights.pt")


def code_of(path: str, text: str) -> None:
    """A Python file that begins with what most need."""
    Path(path).write_text(f"import torch\nfrom torch import nn\nimport curvature as cv\nfrom task import *\n{text}\n")


# Files that are missing, damaged, or something else: exit 3


def test_missing_file(refused, weights):
    cause, fix = refused(UNREADABLE, "wieghts.pt", *ARCH, *PARTS)
    assert cause == "There is no file wieghts.pt."
    assert fix == "Did you mean weights.pt?"
    assert refused(UNREADABLE, "nope.pt", *ARCH, *PARTS)[1] == "Check the path."
    refused(UNREADABLE, "wieghts.pt", *ARCH, *PARTS, "--out", "run")
    refused(UNREADABLE, "nowhere/else.pt", command="inspect")
    refused(UNREADABLE, "wieghts.pt", *OBJECTIVE)


@pytest.mark.parametrize("left", [1, 100, 1000, -1])
def test_truncated_zip(refused, weights, left):
    weights.write_bytes(weights.read_bytes()[:left])
    cause, _ = refused(UNREADABLE, weights, *ARCH, *PARTS, "--out", "run")
    assert cause.startswith("weights.pt")
    refused(UNREADABLE, weights, command="inspect")


def test_one_flipped_byte_in_a_tensor(refused, weights):
    with zipfile.ZipFile(weights) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    content = bytearray(weights.read_bytes())
    name_length, extra_length = struct.unpack_from("<2H", content, info.header_offset + 26)
    content[info.header_offset + 30 + name_length + extra_length + 5] ^= 1
    weights.write_bytes(content)
    cause, _ = refused(UNREADABLE, weights, *ARCH, *PARTS, "--out", "run")
    assert cause == f"weights.pt is damaged: its member {info.filename} does not match its checksum."


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "an HTML page"),
        (b"  \n<HTML>", "an HTML page"),
        (b"", "empty"),
        (b"hello\n", "a text file"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"GGUF\x03", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x80\x04K\x01.", "a bare pickle"),
        (bytes(range(256)), "not a model file"),
        (b"PK\x05\x06" + bytes(18), "an empty zip"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_files_of_other_kinds(refused, content, words):
    Path("model.pt").write_bytes(content)
    cause, _ = refused(UNREADABLE, "model.pt", *ARCH, *PARTS, "--out", "run")
    assert cause.startswith("model.pt is ") and words in cause
    refused(UNREADABLE, "model.pt", command="inspect")
    refused(UNREADABLE, "model.pt", *ARCH, *PARTS, "--trust")


def test_a_folder(refused, folder):
    (folder / "runs").mkdir()
    cause, _ = refused(UNREADABLE, "runs", *PARTS)
    assert cause == "runs is a folder, but not of a model."
    refused(UNREADABLE, ".", command="inspect")
    cause, _ = refused(UNREADABLE, "runs", *OBJECTIVE)
    cause, _ = refused(UNREADABLE, "./task.py:stock", "--loss", "mse", "--data", "runs")
    assert cause == "runs is a folder, not a file of data."


def test_wrong_architecture(refused, weights):
    code_of("other.py", "def wide(): return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))\n")
    cause, fix = refused(UNREADABLE, weights, "--arch", "./other.py:wide", *PARTS, "--out", "run")
    assert cause.startswith(
        "The tensors of weights.pt do not fit Sequential: 3 different: 0.weight (file [4, 3], model [5, 3])"
    )
    assert "--arch" in fix
    cause, _ = refused(UNFIT, weights, *OBJECTIVE)
    assert cause.startswith("The weights do not fit the model: 4 missing, 4 unexpected")


def test_weights_without_architecture(refused, weights):
    cause, fix = refused(UNREADABLE, weights, *PARTS)
    assert "weights without the model they belong to" in cause and "--arch" in fix


def test_a_file_without_tensors(refused):
    torch.save({"epoch": 3, "loss": 0.1}, "log.pt")
    cause, _ = refused(UNREADABLE, "log.pt", *ARCH, *PARTS)
    assert cause == "log.pt holds no tensors by name, only epoch, loss."


def test_an_incomplete_objective(refused, task):
    cv.Objective.of(task.stock(), "cross-entropy", task.data()).save("objective.pt")
    held = torch.load("objective.pt", weights_only=True)
    for key in held.keys() - {"format"}:
        torch.save({name: value for name, value in held.items() if name != key}, "part.pt")
        cause, _ = refused(UNREADABLE, "part.pt")
        assert cause.startswith("part.pt is not a complete objective") and key in cause
    elsewhere = {"path": "/dev/zero", "sha256": "", "batch_size": 3}
    for code, key, value in [
        (UNREADABLE, "state", {}),
        (UNREADABLE, "state", {"0.weight": 1}),
        (UNREADABLE, "selected", []),
        (UNREADABLE, "selected", ["0.weight", 3]),
        (UNREADABLE, "architecture", None),
        (UNREADABLE, "loss", 3),
        (UNFIT, "loss", {"name": "Mine", "options": {}}),
        (UNFIT, "loss", {"name": "CrossEntropy", "options": {"ignore_index": "x"}}),
        (UNREADABLE, "data", []),
        (UNREADABLE, "data", {"batches": 3}),
        (UNREADABLE, "data", elsewhere),
        (UNREADABLE, "mode", "evil"),
        (UNREADABLE, "seed", "x"),
    ]:
        torch.save({**held, key: value}, "part.pt")
        refused(code, "part.pt")


# Files that run code: exit 4, and nothing has run


class Payload:
    """Unpickling it touches a file."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"a": torch.ones(2), "b": p}], ids=["bare", "dict"])
def test_a_pickle_that_runs_code(refused, legacy, wrap):
    torch.save(wrap(Payload()), "evil.pt", _use_new_zipfile_serialization=not legacy)
    for tokens in ([*ARCH, *PARTS, "--out", "run"], OBJECTIVE):
        cause, _ = refused(UNSAFE, "evil.pt", *tokens)
        assert "system" in cause
    cause, _ = refused(UNSAFE, "./task.py:stock", "--loss", "mse", "--data", "evil.pt")
    assert "system" in cause
    assert not Path("PWNED").exists()


def test_trust_is_never_taken_from_a_file_of_options(refused, task):
    torch.save(task.Net(), "own.pt")
    for line in ("trust = true", 'allow_global = ["posix.system"]', 'allow-global = ["posix.system"]'):
        Path("curv.toml").write_text(f"[trace]\n{line}\n")
        cause, _ = refused(USAGE, "own.pt", *PARTS)
        assert "cannot be set in curv.toml" in cause
    for text in ("trust = true\n", "[trace.task]\ntrust = true\n", '[trace]\n"--trust" = true\n'):
        Path("curv.toml").write_text(text)
        refused(USAGE, "own.pt", *PARTS)


# Models, losses and data that cannot be analysed: exit 5


def test_targets_the_loss_cannot_take(refused):
    np.savez("float.npz", x=np.zeros((4, 3), np.float32), y=np.zeros(4))
    cause, fix = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "float.npz", "--out", "run")
    assert cause.startswith("Cross-entropy takes class indices (integers) or probabilities")
    assert "outputs (4, 2) and torch.float32 targets (4,)" in cause and ".long()" in fix
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "mse", "--data", "float.npz")
    assert cause == "Squared error takes targets shaped like the outputs (4, 2), but (4,) came."


@pytest.mark.parametrize("label", [2, -1, 99])
@pytest.mark.parametrize("row", [0, 9], ids=["first-batch", "last-batch"])
def test_labels_out_of_range(refused, label, row):
    y = np.arange(10) % 2
    y[row] = label
    np.savez("labels.npz", x=np.ones((10, 3), np.float32), y=y)
    parts = ("--loss", "cross-entropy", "--data", "labels.npz", "--batch-size", 4)
    cause, _ = refused(UNFIT, "./task.py:stock", *parts, "--out", "run")
    assert str(label) in cause and ("there are 2 outputs" in cause or "out of bounds" in cause)


def test_inputs_and_targets_of_different_lengths(refused):
    np.savez("uneven.npz", x=np.zeros((10, 3), np.float32), y=np.zeros(8, int))
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "uneven.npz")
    assert cause == "The outputs (10, 2) have 10 rows, but the targets (8,) have 8."


def test_inputs_of_the_wrong_width(refused):
    np.savez("wide.npz", x=np.zeros((10, 7), np.float32), y=np.zeros(10, int))
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "wide.npz")
    assert "batch 1" in cause and "10x7 and 3x4" in cause


def test_empty_data(refused):
    np.savez("empty.npz", x=np.zeros((0, 3), np.float32), y=np.zeros(0, int))
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "empty.npz", "--out", "run")
    assert cause == "The data is empty: no batch came."
    torch.save([], "none.pt")
    refused(UNREADABLE, "./task.py:stock", "--loss", "cross-entropy", "--data", "none.pt")


def test_only_ignored_targets(refused):
    np.savez("ignored.npz", x=np.zeros((4, 3), np.float32), y=np.full(4, -100))
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "ignored.npz")
    assert "does not depend" in cause or "no terms" in cause


@pytest.mark.parametrize(
    "body, words",
    [
        ("model(batch[0])", "must be a scalar tensor, but shape (10, 2) came"),
        ("3.0", "must be a scalar tensor, but float came"),
        ("model(batch[0]).mean().detach()", "changes with the selected parameters"),
        ("model(batch[0]).argmax(1).float().mean()", "changes with the selected parameters"),
        ("1 / 0", "ZeroDivisionError"),
        ("next(iter(()))", "StopIteration"),
        ("model(batch['x'])", "TypeError"),
        ("nn.functional.cross_entropy(model(batch[0]), batch[1]) * torch.rand(()).item() ** 0 * next(noise)", "random"),
    ],
)
def test_losses_that_cannot_be_analysed(refused, body, words):
    code_of("lost.py", f"import itertools\nnoise = itertools.count(1.0)\ndef loss(model, batch): return {body}\n")
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "./lost.py:loss", "--data", "train.npz", "--out", "run")
    assert words in cause


UNSUPPORTED = {
    "ctc": """
def loss(model, batch):
    logits = model(batch[0]).log_softmax(1).unsqueeze(1)
    return nn.functional.ctc_loss(logits, torch.ones(1, 2).long(), torch.tensor([10]), torch.tensor([2]))
""",
    "once-differentiable": """
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x * x
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return 2 * ctx.saved_tensors[0] * g
def loss(model, batch): return Double.apply(model(batch[0])).mean()
""",
    "detaching": """
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x ** 3
    @staticmethod
    def backward(ctx, g): return 3 * ctx.saved_tensors[0].detach() ** 2 * g
def loss(model, batch): return Cube.apply(model(batch[0])).mean()
""",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_losses_without_second_derivatives(refused, name):
    code_of("lost.py", UNSUPPORTED[name])
    cause, fix = refused(UNFIT, "./task.py:stock", "--loss", "./lost.py:loss", "--data", "train.npz", "--out", "run")
    assert "second derivatives" in cause.lower() or "cannot be differentiated again" in cause
    assert "autograd Function" in fix or "plain torch operations" in fix or "backward differentiable" in fix


@pytest.mark.parametrize(
    "error", ["RuntimeError('boom')", "KeyError('boom')", "ZeroDivisionError('boom')", "Own('boom')"]
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_model_that_raises(refused, error, number):
    code_of(
        "broken.py",
        "class Own(Exception): pass\n"
        "class Broken(nn.Linear):\n"
        "    def __init__(self): super().__init__(3, 2)\n"
        "    def forward(self, x):\n"
        f"        if len(x) == {(10, 3)[number - 1]}: raise {error}\n"
        "        return super().forward(x)\n"
        "def batches(): x, y = data(); return [(x.repeat(2, 1), y.repeat(2)), (x[:3], y[:3])]\n",
    )
    options = ("--loss", "cross-entropy", "--data", "train.npz" if number == 1 else "./broken.py:batches")
    cause, _ = refused(UNFIT, "./broken.py:Broken", *options, "--out", "run")
    assert cause.startswith(f"The model or the loss failed on batch {number}: ") and "boom" in cause


def test_a_data_set_that_raises(refused):
    code_of(
        "broken.py",
        "class Rows:\n"
        "    def __iter__(self):\n"
        "        yield data()\n"
        "        raise OSError('disk on fire')\n"
        "def rows(): return Rows()\n",
    )
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "./broken.py:rows")
    assert cause == "Reading batch 2 of the data failed: OSError: disk on fire."


def test_pictures_that_are_whole_numbers(refused):
    np.savez("bytes.npz", x=np.zeros((10, 3), np.uint8), y=np.zeros(10, int))
    cause, fix = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "bytes.npz")
    assert "must have the same dtype" in cause and "pictures as x.float() / 255" in fix


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_the_cause_of_a_failing_program_is_told(curv):
    torch.jit.trace(torch.nn.Linear(7, 2), torch.ones(1, 7)).save("program.pt")
    said = curv("trace", "program.pt", "--trust", *PARTS)
    assert said.code == UNFIT and "mat1 and mat2 shapes cannot be multiplied (10x3 and 7x2).\n" in said.err


def test_data_that_can_be_read_only_once(refused):
    code_of("once.py", "def rows(): return (pair for pair in [data()])\n")
    cause, _ = refused(UNFIT, "./task.py:stock", "--loss", "cross-entropy", "--data", "./once.py:rows")
    assert cause == "The data (generator) can be read only once."


def test_no_gauss_newton_matrix_of_a_scalar(refused):
    options = ("--loss", "./task.py:loss", "--data", "train.npz", "--operator", "ggn", "--out", "run")
    cause, fix = refused(UNFIT, "./task.py:stock", *options)
    assert cause == "loss returns a scalar, and this needs the model's outputs."
    assert "there is the Hessian" in fix


def test_nothing_to_differentiate(refused):
    cause, _ = refused(UNFIT, *OBJECTIVE, "--params", "nope.*")
    assert cause == "No trainable parameter matches the selection."
    code_of("frozen.py", "def net(): return stock().requires_grad_(False)\n")
    cause, _ = refused(UNFIT, "./frozen.py:net", *PARTS)
    assert cause == "The model has no trainable parameters."


def test_code_that_fails(refused):
    for name, text, words in [
        ("syntax.py", "def loss(:\n", "SyntaxError"),
        ("raises.py", "raise ValueError('no\\nway')\n", "ValueError: no"),
        (
            "attribute.py",
            "import torch\ntorch.nonsense\n",
            "AttributeError: module 'torch' has no attribute 'nonsense'",
        ),
        ("exits.py", "import sys\nsys.exit('usage: train.py')\n", "SystemExit: usage: train.py"),
        ("needs.py", "import not_installed_at_all\n", "ModuleNotFoundError"),
    ]:
        Path(name).write_text(text)
        for tokens in (["--objective", f"./{name}:loss"], ["./task.py:stock", "--loss", f"./{name}:loss", *PARTS[2:]]):
            cause, _ = refused(UNFIT, *tokens)
            assert cause.startswith(f"Importing ./{name} failed: ") and words in cause


@pytest.mark.parametrize(
    "option, words",
    [
        ("--objective", "It must return a curvature.Objective."),
        ("--arch", "It must return a torch.nn.Module."),
        ("MODEL", "Return a torch.nn.Module or an Objective."),
    ],
)
def test_code_that_returns_something_else(refused, weights, option, words):
    code_of("made.py", "def number(): return 3\n")
    tokens = {
        "--objective": ["--objective", "./made.py:number"],
        "--arch": [weights, "--arch", "./made.py:number", *PARTS],
        "MODEL": ["./made.py:number"],
    }[option]
    _, fix = refused(UNFIT, *tokens)
    assert fix == words


def test_architectures_that_cannot_be_called(refused, weights):
    code_of("made.py", "def net(width): return nn.Linear(width, 1)\ndef bad(): raise KeyError('x')\n")
    cause, _ = refused(UNFIT, weights, "--arch", "./made.py:bad", *PARTS)
    assert cause == "Calling ./made.py:bad failed: KeyError: 'x'."
    said = refused(UNFIT, weights, "--arch", "./made.py:net", "--arch-arg", "width=three", *PARTS)
    assert said[0].startswith("Calling ./made.py:net(width='three') failed: TypeError: ")
    assert said[1] == "Check these values, or run it with python to see where."


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "takes width, and cannot be called: missing a required argument: 'width'."),
        (["width=3", "depth=3"], "takes width, and cannot be called: got an unexpected keyword argument 'depth'."),
    ],
)
def test_arguments_that_an_architecture_does_not_take(refused, weights, arguments, words):
    code_of("made.py", "def net(width): return nn.Linear(width, 1)\n")
    given = [token for argument in arguments for token in ("--arch-arg", argument)]
    assert refused(USAGE, weights, "--arch", "./made.py:net", *given, *PARTS) == (
        f"./made.py:net {words}",
        "Give arguments of --arch as --arch-arg name=value, and others a default.",
    )


def test_arguments_of_what_is_made_already(refused, weights):
    code_of("made.py", "net = stock()\n")
    cause, _ = refused(USAGE, weights, "--arch", "./made.py:net", "--arch-arg", "width=3", *PARTS)
    assert cause == "./made.py:net is a Sequential, which takes no --arch-arg."


# Numbers that are none: exit 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(refused, task, value):
    state = task.stock().state_dict()
    state["2.weight"][0, 1] = value
    torch.save(state, "nan.pt")
    cause, fix = refused(NUMERICAL, "nan.pt", *ARCH, *PARTS, "--out", "run")
    assert cause == "2.weight has 1 of 8 entries that are not finite."
    assert fix == "Load an earlier checkpoint."


def test_inputs_that_are_not_finite(refused):
    for row, words in ((0, "is nan. Of the numbers in the batch 1 are not finite"), (9, "not finite")):
        x = np.ones((10, 3), np.float32)
        x[row, 1] = np.nan
        np.savez("nan.npz", x=x, y=np.zeros(10, int))
        parts = ("--loss", "cross-entropy", "--data", "nan.npz", "--batch-size", 4)
        cause, _ = refused(NUMERICAL, "./task.py:stock", *parts, "--out", "run")
        assert words in cause


# Resources: exit 7


def test_memory_that_does_not_suffice(refused):
    code_of("huge.py", "def loss(model, batch): return torch.empty(2**55).mean() + model(batch[0]).mean()\n")
    cause, _ = refused(RESOURCES, "./task.py:stock", "--loss", "./huge.py:loss", "--data", "train.npz", "--out", "run")
    assert cause == "Batch 1 does not fit into memory."


# Options: exit 2


@pytest.mark.parametrize(
    "tokens, words",
    [
        (["--stepz", "3"], "Unknown option: --stepz"),
        (["--formt", "json"], "Did you mean --format?"),
        (["--format", "jsn"], 'Did you mean "json"?'),
        (["--products", "0"], "Must be >= 1"),
        (["--products", "many"], "many"),
        (["--operator", "jacobian"], "hessian"),
        (["--dtype", "float16"], "float64"),
        (["--seed"], "--seed"),
        (["--seed", "-1"], "Must be >= 0"),
        (["--seed", str(2**63)], "Must be <"),
        (["a.pt", "b.pt"], "b.pt"),
        (["--device", "gpu0"], "--device gpu0 cannot be used"),
        (["--arch-arg", "width=3"], "--arch"),
        (["--loss", "mse"], "MODEL brings its own model and loss."),
        (["--batch-size", "3"], "MODEL brings its own batches."),
        ([*OBJECTIVE, "--arch", "./task.py:stock"], "MODEL brings its own model and loss."),
        (["./task.py:stock"], "says nothing about loss and data"),
        (["./task.py:stock", "--loss", "mse"], "says nothing about data"),
        (["./task.py:stock", "--loss", "cross_entropy", "--data", "train.npz"], "Did you mean cross-entropy?"),
        (["./task.py:stock", *PARTS, "--arch", "./task.py:Net"], "is code, which brings its own model"),
        (["--objective", "./tsk.py:make"], "There is no file ./tsk.py. Did you mean task.py?"),
        (["--objective", "not_installed_at_all:make"], "There is no module not_installed_at_all here. Install it, or"),
        (["--objective", "./task.py:mkae"], "Did you mean ./task.py:make?"),
        (["--objective", "./task.py:NN"], "Check the name after the colon."),  # and no module that is imported there
        (["--objective", "./task.py:net"], "Did you mean ./task.py:Net?"),
        (["--objective", "./task.py"], "names no code"),
        (["--objective", "./task.py:make()"], "names no code"),
        ([*OBJECTIVE, "--products", "1"], "at least 2 products"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misused_options(refused, tokens, words):
    assert words in " ".join(refused(USAGE, *tokens))


def test_arguments_of_an_architecture_are_named(refused, weights):
    for argument in ("hidden", "=3"):
        cause, _ = refused(USAGE, weights, *ARCH, "--arch-arg", argument, *PARTS)
        assert "not of the form name=value" in cause


def test_unknown_commands(curv):
    said = curv("spectrm")
    assert said.code == 2 and said.out == "" and 'Did you mean "spectrum"?' in said.err


def test_impossible_questions(refused):
    cause, _ = refused(USAGE, *OBJECTIVE, "-k", 100, "--out", "run", command="eig")
    assert cause == "k lies between 1 and the size of A, 26, but got 100."
    refused(USAGE, *OBJECTIVE, "--probes", 1, command="spectrum")
    cause, _ = refused(NUMERICAL, *OBJECTIVE, "-k", 10, "--max-steps", 1, command="eig")
    assert "fewer than the k = 10 asked for" in cause


@pytest.mark.parametrize(
    "text, words",
    [
        ("[trace]\nprodcts = 3\n", "has 'trace.prodcts', which is no option. Did you mean trace.products?"),
        ("[eig]\nxyzzy = 3\n", "Options are at the top, or in a table of their command"),
        ("[trce]\nproducts = 3\n", "Did you mean [trace]?"),
        ("prodcts = 3\n", "Did you mean products?"),
        ("trust = true\n", "--trust cannot be set in curv.toml"),
        ("[trace]\nproducts = 'many'\n", "many"),
        ("[trace\n", "curv.toml cannot be read: Expected ']'"),
        ("trace = 3\n", "options of a command are in [trace]"),
        ("\x00", "curv.toml cannot be read"),
        ("[trace]\nformat = 'jsn'\n", 'Did you mean "json"?'),
    ],
)
def test_a_broken_file_of_options(refused, text, words):
    Path("curv.toml").write_text(text)
    cause, fix = refused(USAGE, *OBJECTIVE, "--out", "run")
    assert words in cause and "curv.toml" in cause
    assert fix == "Run `curv --help`, or `curv COMMAND --help`."


def test_a_file_of_options_that_is_none(refused, folder):
    (folder / "curv.toml").write_bytes(b"\xff\xfe[\x00")
    refused(USAGE, *OBJECTIVE)
    (folder / "curv.toml").unlink()
    (folder / "curv.toml").mkdir()
    refused(USAGE, *OBJECTIVE)


@pytest.mark.parametrize("out", ["task.py", "task.py/run", "task.py/deep/run", "nowhere", "nowhere/run"])
def test_out_in_place_of_a_file(refused, out):
    Path("nowhere").symlink_to("missing")
    cause, _ = refused(USAGE, *OBJECTIVE, "--out", out)
    assert cause.endswith(f"{Path(out).parts[0]} is not a folder, which --out takes.")


def test_out_where_nothing_can_be_written(refused):
    """Tried before anything is computed; not even root can write there."""
    for out in ("/proc/run", "/proc/deep/run"):
        cause, _ = refused(USAGE, *OBJECTIVE, "--out", out)
        assert cause.startswith("Nothing can be written in ")


# Names that are not ours


def test_control_characters_in_names_stay_in_the_file(curv, refused, task):
    evil = "\x1b[31mred\x1b[0m\nnew\rline [bold]\x07"
    torch.save({evil: torch.ones(2), "0.weight": torch.ones(1)}, "evil.pt")
    cause, _ = refused(UNREADABLE, "evil.pt", *ARCH, *PARTS)
    assert "\\x1b[31mred" in cause
    said = curv("inspect", "evil.pt")
    assert said.code == 0 and all(line.isprintable() for line in said.out.splitlines())
    net = task.stock()
    net.add_module("\x1b[31mred", nn.Linear(2, 2))
    net.get_submodule("\x1b[31mred").weight.data.fill_(torch.nan)
    torch.save(net, "evil.pt")
    refused(NUMERICAL, "evil.pt", *PARTS)


def test_warnings_name_no_control_characters(curv, task):
    net = task.stock()
    net.register_parameter("\x1b[31mred", nn.Parameter(torch.ones(2)))
    task.net = lambda: net
    said = curv("trace", "task:net", *PARTS, "--format", "quiet")
    assert said.code == 0
    assert said.err == "curv: the loss of the first batch does not depend on 1 parameters: \\x1b[31mred\n"


# As a program, where nothing catches what Python prints by itself


def test_the_program_prints_no_more(folder):
    torch.save(Payload(), "evil.pt")
    Path("page.pt").write_bytes(b"<!DOCTYPE html>")
    for code, tokens in [
        (UNSAFE, ["evil.pt", *ARCH, *PARTS]),
        (UNREADABLE, ["page.pt", *ARCH, *PARTS]),
        (UNFIT, ["./task.py:stock", "--loss", "mse", "--data", "train.npz"]),
        (USAGE, ["--stepz", "3"]),
    ]:
        ran = subprocess.run(["curv", "spectrum", *tokens, "--out", "run"], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (code, "", 2), ran
    assert not Path("PWNED").exists() and not Path("run").exists()


def test_debug_shows_where(folder):
    code_of("broken.py", "def loss(model, batch): return model.nothing\n")
    tokens = ["curv", "trace", "./task.py:stock", "--loss", "./broken.py:loss", "--data", "train.npz", "--debug"]
    ran = subprocess.run(tokens, capture_output=True, text=True)
    assert ran.returncode == UNFIT and 'broken.py", line 5, in loss' in ran.stderr


def test_an_accident_of_ours_says_so(curv, monkeypatch):
    def accident(*args, **kwargs):
        return {}["nothing"]

    monkeypatch.setattr(cv, "trace", accident)
    said = curv("trace", *OBJECTIVE)
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines() == [
        "curv: internal error: KeyError: 'nothing'",
        "Run again with --debug and report the traceback.",
    ]


def test_no_network(folder):
    """Nothing here, not even a Hugging Face folder, opens a socket."""
    code = (
        "import socket, sys\n"
        "def refuse(*a): raise AssertionError('network')\n"
        "socket.socket.connect = socket.socket.bind = socket.getaddrinfo = refuse\n"
        "import curvature_cli.main as cli\n"
        "sys.exit(cli.run(['spectrum', '--objective', './task.py:make', '--probes', '2', '--steps', '2', '--out', 'run']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
