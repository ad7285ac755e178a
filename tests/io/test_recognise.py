"""Files are told apart by content, and what is no model is refused with its cause and its fix."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from curvature.errors import BadFile
from curvature.io.pickles import scan
from curvature.io.recognise import OBJECTIVE_FORMAT, FileKind, pickle_globals, recognise

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


def save_legacy(obj, path):
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def save_hugging_face(path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def save_distributed(path):
    path.mkdir()
    (path / ".metadata").write_bytes(b"\x80\x02}.")


def save_exported(path):
    torch.export.save(torch.export.export(Net(), (torch.zeros(5, 3),)), path)


SAVERS = {
    "tensors": (FileKind.TENSORS, lambda path: torch.save(WEIGHTS, path)),
    "checkpoint": (FileKind.TENSORS, lambda path: torch.save({"state_dict": WEIGHTS, "epoch": 3}, path)),
    "with options": (
        FileKind.TENSORS,
        lambda path: torch.save({"w": WEIGHTS, "o": argparse.Namespace(a=1)}, path),
    ),
    "protocol 4": (FileKind.TENSORS, lambda path: torch.save(WEIGHTS, path, pickle_protocol=4)),
    "module": (FileKind.MODULE, lambda path: torch.save(Net(), path)),
    "stock module": (FileKind.MODULE, lambda path: torch.save(nn.Sequential(nn.Linear(3, 2)), path)),
    "module in a dict": (FileKind.MODULE, lambda path: torch.save({"epoch": 1, "model": Net()}, path)),
    "legacy": (FileKind.LEGACY, lambda path: save_legacy(WEIGHTS, path)),
    "objective": (
        FileKind.OBJECTIVE,
        lambda path: torch.save({"format": OBJECTIVE_FORMAT, "state": WEIGHTS}, path),
    ),
    "TorchScript": (FileKind.TORCHSCRIPT, lambda path: torch.jit.script(Net()).save(path)),
    "exported": (FileKind.EXPORTED, save_exported),
    "safetensors": (FileKind.SAFETENSORS, lambda path: safetensors.torch.save_file(WEIGHTS, path)),
    "Hugging Face": (FileKind.HUGGING_FACE, save_hugging_face),
    "distributed": (FileKind.DCP, save_distributed),
}
ZIPS = ["tensors", "module", "TorchScript", "exported", "objective"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        for name, (_, save) in SAVERS.items():
            save(folder / f"{name}.pt2" if name == "exported" else folder / name)
    (folder / "exported.pt2").rename(folder / "exported")
    return folder


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("extension", ["", ".safetensors", ".html"])
def test_kind_follows_content_not_name(saved, tmp_path, name, extension):
    copy = tmp_path / f"file{extension}"
    if (saved / name).is_dir():
        shutil.copytree(saved / name, copy)
    else:
        shutil.copy(saved / name, copy)
    assert recognise(str(copy)) is SAVERS[name][0]


def npz(path):
    np.savez(path.open("wb"), a=np.ones(3))


NOT_MODELS = {
    "empty": (b"", r"is empty\. Its download .* make it again"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        r"is a Git LFS pointer, not the model itself\. Fetch the model with `git lfs pull`\.",
    ),
    "HTML": (
        b"\n<!DOCTYPE html>\n<html><body>Sign in",
        r"is an HTML page, not a model\. Download the raw file",
    ),
    "HTML without doctype": (b"<HTML><head>", r"is an HTML page"),
    "text": (
        "état: 404\nnot found".encode(),
        r"is a text file, not a model\. Give a file made by torch\.save",
    ),
    "JSON": (b'{"error": "not found"}', r"is a text file"),
    "long text cut inside a letter": ("é".encode() * 2000, r"is a text file"),
    "binary": (bytes(range(200, 256)) * 9, r"is not a model file of any known kind\. Give a file made by"),
    "NumPy": (b"\x93NUMPY\x01\x00", r"is a NumPy array\. Save data by"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00", r"is an HDF5 file"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", r"is a GGUF file"),
    "gzip": (b"\x1f\x8b\x08\x00\x00", r"is compressed with gzip"),
    "bare pickle": (pickle.dumps({"a": 1}), r"is a bare pickle, not written by torch\.save\. Give"),
    "empty zip": (b"PK\x05\x06" + bytes(18), r"is an empty zip"),
    "only the magic of a zip": (b"PK\x03\x04", r"is truncated or damaged: .* Download or copy it again"),
    "cut safetensors": (
        (99).to_bytes(8, "little") + b'{"w":{"dtype":"F32"',
        r"is a safetensors file cut short at 27 bytes, or damaged\. Download or copy it again",
    ),
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_what_is_no_model_is_refused_with_cause_and_fix(tmp_path, name):
    content, message = NOT_MODELS[name]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=re.escape(str(path)) + " " + message) as caught:
        recognise(path)
    assert caught.value.cause and caught.value.fix and "\n" not in str(caught.value)


def test_a_missing_file_is_told_with_its_near_miss(tmp_path):
    (tmp_path / "model.pth").touch()
    with pytest.raises(BadFile, match=r"There is no file .*model\.pt\. Did you mean .*model\.pth\?"):
        recognise(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "name, others, words",
    [
        ("tarin.npz", ["train.csv", "train.npz", "train.pt"], r"Did you mean .*train\.npz\?"),
        ("nope.npz", ["vae.npz", "nets.npz"], r"Check the path\."),
        ("nowhere/train.npz", ["train.npz"], r"Check the path\."),
    ],
)
def test_what_files_end_with_makes_no_near_miss(tmp_path, name, others, words):
    for other in others:
        (tmp_path / other).touch()
    with pytest.raises(BadFile, match=words):
        recognise(tmp_path / name)
    with pytest.raises(BadFile, match=r"There is no file .*/absent/x\. Check the path\."):
        recognise(tmp_path / "absent" / "x")


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"is a folder, but not of a model\. Give the model file in it"),
        ({"config.json": "{}"}, r"is a folder, but not of a model"),
        ({"config.json": "[" * 100_000}, r"is a folder, but not of a model"),
        ({"config.json": '["model_type"]'}, r"is a folder, but not of a model"),
        ({"adapter_config.json": "{}"}, r"is a folder, but not of a model"),
        ({"b.ckpt": "", "a.pt": ""}, r"not of a model\. Give the file in it: .*/a\.pt\."),
    ],
)
def test_other_folders_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadFile, match=message):
        recognise(tmp_path)


def test_a_device_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match=r"is a device or a pipe, not a file\. Copy its content"):
        recognise(tmp_path / "pipe")


def test_an_unreadable_file_says_why(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadFile, match=r"cannot be read: Permission denied\. Check its permissions"):
        recognise(tmp_path / "x")


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_cut_anywhere_is_told(saved, tmp_path, name):
    whole = (saved / name).read_bytes()
    ends = [found.end() + 18 for found in re.finditer(b"PK\x05\x06", whole)]  # of zips within the zip, too
    lengths = {*range(5, len(whole), len(whole) // 60), len(whole) - 1, *ends[:-1]}
    path = tmp_path / "cut.pt"
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(BadFile, match=r"cut\.pt is truncated or damaged: .*Download or copy it again"):
            recognise(path)


def rezip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)


def test_other_zips_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    with pytest.raises(BadFile, match=r"a\.npz is a zip archive, but torch did not write it\. Give a file"):
        recognise(tmp_path / "a.npz")


def directory(whole):
    return whole.index(b"PK\x01\x02")


def patched(whole, *places):
    """The bytes with one byte set at each (offset, value)."""
    changed = bytearray(whole)
    for offset, value in places:
        changed[offset] = value
    return bytes(changed)


AMBIGUOUS = {
    "bytes before": lambda whole: b"#!/bin/sh\n" + whole,
    "bytes after": lambda whole: whole + b"\n",
    "bytes between": lambda whole: whole[: directory(whole)] + bytes(100) + whole[directory(whole) :],
    "wrong directory offset": lambda whole: patched(whole, (len(whole) - 6, directory(whole) - 5)),
    "another name": lambda whole: whole.replace(b"x/data.pkl", b"x/evil.pkl", 1),
    "another method": lambda whole: patched(whole, (8, 8)),
    "another size": lambda whole: patched(whole, (18, 1)),
    "encrypted": lambda whole: patched(whole, (6, 1), (directory(whole) + 8, 1)),
}


@pytest.mark.parametrize("damage", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_zip_that_two_readers_could_read_differently_is_refused(tmp_path, damage):
    rezip(tmp_path / "good", [("x/data.pkl", b"\x80\x02}."), ("x/version", b"3")])
    assert recognise(tmp_path / "good") is FileKind.TENSORS
    (tmp_path / "bad").write_bytes(damage((tmp_path / "good").read_bytes()))
    with pytest.raises(BadFile, match=r"bad is (truncated or damaged: |not a model file)"):
        recognise(tmp_path / "bad")


def test_two_members_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        rezip(
            tmp_path / "two",
            [("x/data.pkl", b"\x80\x02}."), ("x/data.pkl", b"\x80\x02]."), ("x/version", b"3")],
        )
    with pytest.raises(BadFile, match="two members have the same name"):
        recognise(tmp_path / "two")


def test_a_file_without_checksums_is_refused(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(BadFile, match=r"saved without checksums, .* Save it again after .*set_crc32_options"):
        recognise(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["tensors", "protocol 4", "legacy"])
def test_globals_of_plain_weights(saved, name):
    assert set(pickle_globals(saved / name)) == {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
    }


def test_globals_of_a_module_come_in_order(saved):
    names = pickle_globals(saved / "module")
    assert names[0] == f"{__name__}.Net" and "torch.nn.modules.linear.Linear" in names


def test_globals_of_an_exported_program_are_not_those_of_torch_save(saved):
    with pytest.raises(BadFile, match=r"holds no pickle of torch\.save"):
        pickle_globals(saved / "exported")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


PROGRAMS = {
    "GLOBAL": (b"cos\nsystem\n.", "os.system"),
    "INST": (b"(S'ls'\nios\nsystem\n.", "os.system"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "through the memo": (b"\x80\x04\x8c\x06system\x940\x8c\x02os\x94h\x00\x93.", "os.system"),
    "another string last": (b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x04safe0\x93.", "os.system"),
    "numbered memo": (b"\x80\x04\x8c\x02os\x71\x07\x30\x68\x07\x8c\x06system\x93.", "os.system"),
    "after a tuple": (b"\x80\x04\x8c\x02os\x8c\x06system(K\x01K\x02t0\x93.", "os.system"),
    "after a popped mark": (b"\x80\x04\x8c\x02os(\x8c\x04safe1\x8c\x06system\x93.", "os.system"),
    "duplicated": (b"\x80\x04\x8c\x04time2\x93.", "time.time"),
    "computed": (b"\x80\x04\x8c\x02os]\x93.", "os.?"),
    "extension": (b"\x82\x07.", "copyreg.extension.7"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_way_to_name_a_function_is_seen(name):
    program, found = PROGRAMS[name]
    assert scan(program).globals == (found,)


@pytest.mark.parametrize("protocol", range(6))
def test_globals_are_found_without_running_the_pickle(tmp_path, protocol):
    program = pickle.dumps({"a": [Payload(tmp_path / "ran")]}, protocol)
    (name,) = (name for name in scan(program).globals if not name.startswith(("_codecs", "copyreg")))
    assert name == f"{os.system.__module__}.system"
    assert name in scan(io.BytesIO(program)).called
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"}",
        b"\xff.",
        b"\x93.",
        b"h\x05.",
        b"t.",
        b"\x80\x02X\xff\xff\xff\x7fab",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",
        b"I1x\n.",
    ],
)
def test_a_broken_pickle_is_a_value_error(program):
    with pytest.raises(ValueError):
        scan(program)


def test_a_broken_pickle_in_a_file_is_told(tmp_path):
    rezip(tmp_path / "x.pt", [("x/data.pkl", b"\x80\x02}"), ("x/version", b"3")])
    with pytest.raises(BadFile, match=r"x\.pt is truncated or damaged: pickle exhausted before"):
        recognise(tmp_path / "x.pt")


def test_a_pickle_beyond_all_measure_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("curvature.io.archive.RECORD", 1 << 20)
    rezip(tmp_path / "x.pt", [("x/data.pkl", bytes(1 << 21)), ("x/version", b"3")])
    with pytest.raises(BadFile, match=r"x/data\.pkl is larger than 1 MiB"):
        recognise(tmp_path / "x.pt")
