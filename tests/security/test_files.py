"""Hostile and broken files: none runs code, none ends in a traceback, each says what is wrong and what to do next.

Every file of CASES is built here and goes through `curv inspect` and `curv trace`; those of DATA through `--data`. The
number of a case is that of its row. A row: how the file is made, the exit codes of both commands, and words of the cause.

 1-11  code in files of torch.save: at the top, nested, as a key, in the format before 1.6, in a whole module, in
       hyper-parameters, by other instructions than usual, and by functions that look harmless
12-18  programs and folders that are code: TorchScript, .pt2, DCP, a saved objective, Hugging Face's `auto_map`
19-27  zips: a bomb of 1 GB, cut, two members of one name, bytes of none, without checksums, of other programs
28-34  pickles that claim too much or nest too deep; tensors that are larger than what is stored of them
35-46  safetensors and indices: eight wrong headers; indices that lead out of the folder, in circles, or to code
47-57  what is no model: pages, pointers, text, YAML, devices, pipes, loops of links, folders named like models
58-65  Hugging Face and PEFT folders whose configuration claims, nests or points too far
66-68  names with control characters and markup; numbers that are none

Exit codes: 0 read as data (inspect lists code without running it), 3 unreadable, 4 refused as unsafe, 6 not finite,
7 more memory than there is.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import curvature as cv
from curvature.errors import BadFile

CANARY = Path("PWNED")
PARTS = ("--arch", "./task.py:stock", "--loss", "cross-entropy", "--data", "train.npz")
SHELL = b"cposix\nsystem\n(S'touch PWNED'\ntR."  # a pickle that runs a command


class Payload:
    """Unpickling it touches the canary."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


class Nested:
    """Unpickling it unpickles a payload."""

    def __reduce__(self):
        return pickle.loads, (SHELL,)


def stock() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def weights() -> dict[str, torch.Tensor]:
    return stock().state_dict()


def zipped(path: str, **members: bytes) -> None:
    """A zip as torch writes them, with these members beside its version."""
    with zipfile.ZipFile(path, "w") as records:
        records.writestr("x/version", b"3")
        for name, content in members.items():
            records.writestr(f"x/{name.replace('__', '/').replace('_pkl', '.pkl')}", content)


def saved(make: Callable[[], object], **options: object) -> Callable[[str], None]:
    return lambda path: torch.save(make(), path, **options)


def program(*instructions: bytes) -> Callable[[str], None]:
    return lambda path: zipped(path, data_pkl=b"".join(instructions))


def content(*pieces: bytes) -> Callable[[str], None]:
    return lambda path: Path(path).write_bytes(b"".join(pieces)) and None


def safetensors(header: bytes, body: bytes = bytes(4)) -> Callable[[str], None]:
    return content(struct.pack("<Q", len(header)), header, body)


def changed(damage: Callable[[bytes], bytes]) -> Callable[[str], None]:
    def make(path: str) -> None:
        torch.save(weights(), path)
        Path(path).write_bytes(damage(Path(path).read_bytes()))

    return make


def files(**contents: object) -> Callable[[str], None]:
    """A folder of these files: bytes, or something to write as JSON; a callable writes its own."""

    def make(path: str) -> None:
        Path(path).mkdir()
        for name, held in contents.items():
            file = Path(path) / name.replace("__", ".")
            if callable(held):
                held(str(file))
            else:
                file.write_bytes(held if isinstance(held, bytes) else json.dumps(held).encode())

    return make


def module_with_payload() -> nn.Module:
    module = stock()
    module.note = Payload()
    return module


def objective_with_code(path: str) -> None:
    cv.Objective.of(stock(), "cross-entropy", (torch.ones(4, 3), torch.arange(4) % 2)).save(path)
    held = torch.load(path, weights_only=True)
    torch.save({**held, "architecture": {"path": "os:abort"}, "loss": {"path": "os:abort"}}, path)


def exported(path: str) -> None:
    """A real program in which torch.export.load would unpickle the payload."""
    evil = io.BytesIO()
    torch.save(Payload(), evil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(stock(), (torch.zeros(5, 3),)), "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, evil.getvalue() if "sample_inputs" in name else old.read(name))


def zeros(count: int, path: str, name: str, start: bytes = b"") -> None:
    """A zip of one member: `start`, then so many MiB of zeros, deflated a thousandfold; all is written in no time."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = compress.compress(start) + compress.flush(zlib.Z_FULL_FLUSH)
    block = compress.compress(bytes(1 << 20)) + compress.flush(zlib.Z_FULL_FLUSH)
    deflated = head + block * count + compress.flush()
    with zipfile.ZipFile(path, "w") as records:
        records.writestr("x/data.pkl", b"\x80\x02}.") if name.startswith("x/") else None
        records.writestr(name, deflated)
    whole = bytearray(Path(path).read_bytes())
    local, central = whole.rindex(b"PK\x03\x04"), whole.rindex(b"PK\x01\x02")
    for method, size in ((local + 8, local + 22), (central + 10, central + 24)):
        struct.pack_into("<H", whole, method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<L", whole, size, len(start) + (count << 20))
    Path(path).write_bytes(whole)


def bomb(path: str) -> None:
    zeros(1000, path, "x/data/0")


def without_checksums(path: str) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights(), path)
    finally:
        torch.serialization.set_crc32_options(True)


def other_zip(path: str) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))


def duplicated(path: str) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as records:
        warnings.simplefilter("ignore")
        for held in (b"\x80\x02}.", SHELL):
            records.writestr("x/data.pkl", held)
        records.writestr("x/version", b"3")


def quantised() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"w": torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8).fill_(1.0)}


def itself() -> dict[str, object]:
    endless: dict[str, object] = {"n": 1}
    endless["model"] = endless
    return endless


def index(**places: str) -> bytes:
    return json.dumps({"weight_map": {name.replace("_", "."): place for name, place in places.items()}}).encode()


def linked(*names: str) -> Callable[[str], None]:
    """Links, each to the next, the last to the first."""

    def make(path: str) -> None:
        ring = (path, *names)
        for name, target in zip(ring, (*names, path), strict=True):
            Path(name).symlink_to(target)

    return make


def gpt(path: str, **config: object) -> None:
    """A tiny Hugging Face folder with some of its configuration changed."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 7,
        "n_positions": 4,
        "n_embd": 4,
        "n_layer": 1,
        "n_head": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    transformers.utils.logging.disable_progress_bar()
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(path)
    file = Path(path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def remote(path: str) -> None:
    gpt(path, architectures=["Evil"], model_type="evil", auto_map={"AutoModel": "modeling_evil.Evil"})
    (Path(path) / "modeling_evil.py").write_text("open('PWNED', 'w')\nclass Evil: pass\n")


def binary(path: str) -> None:
    gpt(path)
    (Path(path) / "model.safetensors").unlink()
    torch.save({"w": Payload()}, Path(path) / "pytorch_model.bin")


def adapter(base: object) -> Callable[[str], None]:
    return files(
        adapter_config__json={"peft_type": "LORA", "base_model_name_or_path": base, "task_type": "CAUSAL_LM"},
        adapter_model__safetensors=lambda path: save_file({"a": torch.ones(2)}, path),
    )


class Case(NamedTuple):
    make: Callable[[str], None]
    inspect: int
    trace: int
    words: str
    alone: bool = False  # without --arch, which for folders would build another model


STRANGE = "\x1b[31mred\x1b[0m\n../../x <script>alert(1)</script> [bold]\r\x07"
HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HYPER = {"pytorch-lightning_version": "2.6", "state_dict": weights(), "hyper_parameters": {"a": Payload()}}
CASES = {
    "pickle": Case(saved(Payload), 4, 4, "posix.system"),
    "state_dict": Case(saved(lambda: OrderedDict(weights(), evil=Payload())), 4, 4, "posix.system"),
    "key": Case(saved(lambda: {Payload(): 1}), 4, 4, "posix.system"),
    "pickle in a pickle": Case(saved(lambda: {"a": Nested()}), 4, 4, "pickle.loads"),
    "legacy": Case(saved(Payload, _use_new_zipfile_serialization=False), 4, 4, "posix.system"),
    "module": Case(saved(module_with_payload), 0, 4, "posix.system"),
    "hyper-parameters": Case(saved(lambda: HYPER), 4, 4, "posix.system"),
    "STACK_GLOBAL": Case(program(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch PWNED\x85R."), 4, 4, "os.system"),
    "computed name": Case(program(b"\x80\x04\x8c\x02os]\x93."), 4, 4, "os.?"),
    "torch.load": Case(program(b"ctorch.serialization\nload\n(S'evil'\ntR."), 4, 4, "torch.serialization.load"),
    "calls a dict": Case(program(b"\x80\x02ccollections\nOrderedDict\n)R)R."), 4, 4, "does more than"),
    "TorchScript": Case(lambda path: zipped(path, data_pkl=b"\x80\x02.", constants_pkl=SHELL), 0, 4, "TorchScript"),
    "pt2": Case(exported, 0, 4, "an exported program"),
    "pt2, old": Case(lambda path: zipped(path, archive_format=b"pt2", data_pkl=SHELL), 0, 4, "an exported program"),
    "DCP": Case(files(__metadata=SHELL), 0, 4, "index is a pickle"),
    "DCP, damaged": Case(files(__metadata=b"\x93."), 3, 4, "model.pt"),
    "objective": Case(objective_with_code, 0, 4, "needs the code at os:abort", alone=True),
    "auto_map": Case(remote, 0, 4, "needs code of its author: modeling_evil.Evil", alone=True),
    "bomb": Case(bomb, 3, 3, "a zip bomb"),
    "cut": Case(changed(lambda whole: whole[:700]), 3, 3, "truncated or damaged"),
    "last byte": Case(changed(lambda whole: whole[:-1]), 3, 3, "truncated or damaged"),
    "two members of one name": Case(duplicated, 3, 3, "two members have the same name"),
    "bytes before": Case(changed(lambda whole: b"#!/bin/sh\n" + whole), 3, 3, "not a model file"),
    "bytes after": Case(changed(lambda whole: whole + b"\n"), 3, 3, "truncated or damaged"),
    "no checksums": Case(without_checksums, 3, 3, "without checksums"),
    "another zip": Case(other_zip, 3, 3, "torch did not write it"),
    "empty zip": Case(content(b"PK\x05\x06", bytes(18)), 3, 3, "an empty zip"),
    "claims memory": Case(
        program(b"\x80\x02cbuiltins\nbytearray\n\x8a\x08", struct.pack("<q", 2**62), b"\x85R."), 7, 7, "more memory"
    ),
    "claims text": Case(program(b"\x80\x02X\xff\xff\xff\x7fab"), 3, 3, "truncated or damaged"),
    "nested lists": Case(program(b"\x80\x02", b"]" * 20_000, b"a" * 19_999, b"."), 3, 3, "no tensors by name"),
    "nested tuples": Case(program(b"\x80\x02", b")", b"\x85" * 20_000, b"."), 3, 3, "no tensors by name"),
    "itself": Case(saved(itself), 3, 3, "no tensors by name"),
    "stride 0": Case(saved(lambda: {"w": torch.zeros(1).expand(1 << 20, 1 << 14)}), 3, 3, "but 4 bytes are stored"),
    "quantised": Case(saved(quantised), 3, 3, "quantised and has no derivatives"),
    "header too large": Case(content(struct.pack("<Q", 2**62), HEADER, bytes(4)), 3, 3, "cut short"),
    "header cut": Case(content(struct.pack("<Q", len(HEADER)), HEADER[:30]), 3, 3, "cut short"),
    "header no JSON": Case(safetensors(b'{"w":'), 3, 3, "damaged"),
    "header nested": Case(safetensors(b'{"w":' * 100_000), 3, 3, "damaged"),
    "offsets beyond": Case(safetensors(HEADER.replace(b"[0,4]", b"[0,8]")), 3, 3, "damaged"),
    "a hole": Case(safetensors(HEADER, bytes(8)), 3, 3, "damaged"),
    "shape and bytes": Case(safetensors(HEADER.replace(b"[1]", b"[9]")), 3, 3, "damaged"),
    "unknown dtype": Case(safetensors(HEADER.replace(b"F32", b"Q9")), 3, 3, "damaged"),
    "index leads out": Case(files(model__index__json=index(w="../../etc/passwd")), 3, 3, "does not say which tensor"),
    "index of a device": Case(files(model__index__json=index(w="/dev/zero")), 3, 3, "does not say which tensor"),
    "index of itself": Case(files(model__index__json=index(w="model.index.json")), 3, 3, "no file of weights"),
    "index of code": Case(files(model__index__json=index(w="a.bin"), a__bin=saved(Payload)), 4, 4, "posix.system"),
    "LFS pointer": Case(content(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"), 3, 3, "git lfs pull"),
    "page": Case(content(b"\n<!DOCTYPE html><html>Sign in"), 3, 3, "an HTML page"),
    "empty": Case(content(), 3, 3, "is empty"),
    "YAML": Case(content(b"!!python/object/apply:os.system ['touch PWNED']\n"), 3, 3, "a text file"),
    "bare pickle": Case(content(b"\x80\x04", SHELL), 3, 3, "a bare pickle"),
    "random": Case(content(random.Random(0).randbytes(5000)), 3, 3, "not a model file"),
    "device": Case(lambda path: Path(path).symlink_to("/dev/zero"), 3, 3, "a device or a pipe"),
    "pipe": Case(os.mkfifo, 3, 3, "a device or a pipe"),
    "loop of links": Case(linked("b", "c"), 3, 3, "cannot be read"),
    "folder": Case(files(weights__txt=b"1"), 3, 3, "a folder, but not of a model"),
    "link to nowhere": Case(lambda path: Path(path).symlink_to("missing"), 3, 3, "There is no file"),
    "nested JSON": Case(files(config__json=b'{"model_type":' * 50_000), 3, 3, "a folder, but not of a model"),
    "config is a device": Case(files(config__json=lambda path: os.symlink("/dev/zero", path)), 3, 3, "not of a model"),
    "a billion layers": Case(lambda path: gpt(path, n_layer=10**9), 0, 3, "but its config says n_layer", alone=True),
    "a class that is none": Case(lambda path: gpt(path, architectures=["os.system"]), 0, 3, "lacks", alone=True),
    "quantised folder": Case(lambda path: gpt(path, quantization_config={"bits": 4}), 0, 3, "quantised", alone=True),
    "code in a folder": Case(binary, 4, 4, "posix.system", alone=True),
    "adapter leads out": Case(adapter("../../../../etc"), 0, 3, "is an adapter of ../../../../etc", alone=True),
    "an adapter of no name": Case(adapter(["x"]), 0, 3, "is an adapter of", alone=True),
    "names": Case(saved(lambda: {STRANGE: torch.ones(2), "0.weight": torch.ones(1)}), 0, 3, "\\x1b[31mred"),
    "names of layers": Case(saved(lambda: nn.Sequential(OrderedDict({"\x1b[1m": nn.Linear(2, 2)}))), 0, 3, "\\x1b[1m"),
    "NaN": Case(saved(lambda: {**weights(), "2.bias": torch.tensor([1.0, torch.nan])}), 0, 6, "2.bias"),
}  # fmt: skip


def harmless(said) -> None:
    """At most three printable lines, no traceback, and nothing has run."""
    assert not CANARY.exists()
    assert "Traceback" not in said.err and "weights_only" not in said.err
    lines = said.err.splitlines()
    assert len(lines) <= 3 and all(line.isprintable() for line in (*lines, *said.out.splitlines()))


def test_the_table_is_as_long_as_it_says():
    assert len(CASES) == 68


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("command", ["inspect", "trace"])
def test_no_file_runs_code_or_ends_in_a_traceback(curv, name, command):
    case = CASES[name]
    case.make("model.pt")
    parts = PARTS[2:] if case.alone and name != "objective" else () if case.alone else PARTS
    said = curv(command, "model.pt", *(parts if command == "trace" else ()))
    harmless(said)
    assert said.code == getattr(case, command), said
    if said.code == 0:
        assert said.err == "" and "model.pt" in said.out
        return
    cause, fix = said.err.splitlines()[-2:]
    assert said.out == "" and cause.startswith("curv: ") and fix
    assert case.words in said.err
    assert said.code == 6 or "model.pt" in cause


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.inspect == 0 and case.trace == 4])
def test_inspect_lists_the_code_that_it_does_not_run(curv, name):
    CASES[name].make("model.pt")
    facts = json.loads(curv("inspect", "model.pt", "--format", "json").out)
    assert facts["code"] or any("which is never run" in note for note in facts["notes"])
    assert not CANARY.exists()


# Data


class Rows(NamedTuple):
    make: Callable[[str], None]
    code: int
    words: str


def objects(path: str) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=np.array([Payload()], dtype=object), y=np.zeros(1))


def packed(path: str) -> None:
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, {"descr": "<f4", "fortran_order": False, "shape": (1 << 28, 1)})
    zeros(1024, path, "x.npy", start.getvalue())


def flipped(path: str) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=np.ones((10, 3), np.float32), y=np.zeros(10, int))
    whole = bytearray(Path(path).read_bytes())
    whole[whole.index(struct.pack("<f", 1.0) * 3)] ^= 1
    Path(path).write_bytes(whole)


DATA = {
    "objects": Rows(objects, 3, "cannot be read as numeric arrays"),
    "bomb": Rows(packed, 3, "a zip bomb"),
    "flipped": Rows(flipped, 3, "cannot be read as numeric arrays"),
    "pickle": Rows(saved(Payload), 4, "posix.system"),
    "list with code": Rows(saved(lambda: [(torch.ones(2, 3), Payload())]), 4, "posix.system"),
    "stride 0": Rows(saved(lambda: [(torch.zeros(1).expand(1 << 20, 1 << 14), torch.ones(1))]), 3, "are stored"),
    "bare pickle": Rows(content(b"\x80\x04", SHELL), 3, "a bare pickle"),
    "YAML": Rows(content(b"!!python/object/apply:os.system ['touch PWNED']\n"), 3, "nothing below it"),
    "page": Rows(content(b"<html>"), 3, "an HTML page"),
    "device": Rows(lambda path: Path(path).symlink_to("/dev/zero"), 3, "a device or a pipe"),
    "nested JSON lines": Rows(content(b'{"a":' * 100_000), 3, "is no table"),
    "a cell without end": Rows(content(b'a,b\n"', b"x" * 200_000), 3, "is no table"),
}


@pytest.mark.parametrize("name", DATA)
def test_no_data_runs_code_or_ends_in_a_traceback(curv, name):
    DATA[name].make("rows")
    said = curv("trace", "./task.py:stock", "--loss", "cross-entropy", "--data", "rows")
    harmless(said)
    assert said.code == DATA[name].code and said.out == "" and len(said.err.splitlines()) == 2, said
    assert said.err.startswith("curv: ") and "rows" in said.err.splitlines()[0] and DATA[name].words in said.err


# Names of files


@pytest.mark.parametrize("name", ["\x1b[31mred\n.pt", "[bold]x.pt", "<script>.pt", "-pt", "a:b", "\udcff.pt"])
def test_names_of_files_are_shown_harmlessly(curv, name):
    torch.save(Payload(), name)
    for tokens in (["inspect", f"./{name}"], ["trace", f"./{name}", *PARTS]):
        said = curv(*tokens)
        harmless(said)
        assert said.code in (2, 3, 4) and said.err.startswith("curv: ")


# Damage


@pytest.fixture
def damaged() -> Callable[[Path, int], None]:
    """Inverts 64 bytes of a file, somewhere."""

    def damage(path: Path, seed: int) -> None:
        whole = bytearray(path.read_bytes())
        start = random.Random(seed).randrange(len(whole) - 64)
        whole[start : start + 64] = bytes(byte ^ 0xFF for byte in whole[start : start + 64])
        path.write_bytes(whole)

    return damage


def test_inverted_bytes_are_seen_wherever_they_are_in_a_checkpoint(curv, damaged):
    for seed in range(50):
        torch.save(weights(), "model.pt")
        assert seed or curv("inspect", "model.pt").code == 0
        damaged(Path("model.pt"), seed)
        said = curv("inspect", "model.pt")
        harmless(said)
        assert said.code in (3, 4) and said.out == "", (seed, said)


@pytest.mark.parametrize("file", ["result.json", "arrays.safetensors"])
def test_inverted_bytes_are_seen_wherever_they_are_in_a_result(folder, damaged, file):
    cv.trace(cv.Diagonal(torch.arange(40.0))).save("whole")
    cv.Result.load("whole")
    kept = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    for seed in range(50):
        for name, held in kept.items():
            Path("whole", name).write_bytes(held)
        if len(kept[file]) <= 64:
            Path("whole", file).write_bytes(bytes(byte ^ 0xFF for byte in kept[file]))
        else:
            damaged(Path("whole", file), seed)
        with pytest.raises(BadFile):
            cv.Result.load("whole")


def test_a_result_reads_no_other_file(folder):
    cv.trace(cv.Diagonal(torch.arange(4.0))).save("run")
    written = json.loads(Path("run/result.json").read_text())
    written["arrays"]["file"] = "/dev/zero"
    Path("run/result.json").write_text(json.dumps(written))
    assert float(cv.Result.load("run").value) == 6
    Path("run/arrays.safetensors").unlink()
    os.mkfifo("run/arrays.safetensors")
    with pytest.raises(BadFile, match=r"there is no file arrays\.safetensors"):
        cv.Result.load("run")


# In a process of their own


GROWTH = """
import os, sys
import curvature_cli.main as cli

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

commands = [["inspect", "{}"], ["trace", "{}", *sys.argv[1:]]]
for tokens in commands:
    assert cli.run([t.format("good.pt") for t in tokens]) == 0
before = peak(reset=True)
codes = [cli.run([t.format(name) for t in tokens]) for name in ("bomb.pt", "pickle.pt", "program.pt2") for tokens in commands]
sys.stdout.flush()
print("growth", peak() - before, *codes)
"""


def test_a_bomb_takes_no_memory(folder):
    """A bomb of 1 GB, a payload and a program, after a good file has warmed the process up."""
    torch.save(weights(), "good.pt")
    for name, case in (("bomb.pt", "bomb"), ("pickle.pt", "pickle"), ("program.pt2", "pt2")):
        CASES[case].make(name)
    ran = subprocess.run([sys.executable, "-c", GROWTH, *PARTS], capture_output=True, text=True)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
    word, growth, *codes = ran.stdout.splitlines()[-1].split()
    assert word == "growth" and float(growth) <= 64
    assert [int(code) for code in codes] == [3, 3, 4, 4, 0, 4]
    assert not CANARY.exists()
