"""Writing replaces a file whole or not at all, and says in its own words why not."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from curvature.errors import (
    BadFile,
    BadObjective,
    CurvatureError,
    Interrupted,
    NotConverged,
    TooLarge,
    printable,
)
from curvature.io.files import sha256, write_atomically


def temporaries(folder):
    return list(folder.glob(".tmp-*"))


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    return path


@pytest.fixture
def no_space():
    """Writes beyond 64 KiB fail in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("data", [b"new", lambda file: file.write(b"new")], ids=["bytes", "writer"])
def test_new_content_replaces_the_old(old, data):
    write_atomically(old, data)
    assert old.read_bytes() == b"new"
    assert temporaries(old.parent) == []


def test_torch_writes_through_it(tmp_path):
    write_atomically(tmp_path / "w.pt", lambda file: torch.save({"w": torch.arange(5)}, file))
    assert torch.load(tmp_path / "w.pt")["w"].tolist() == [0, 1, 2, 3, 4]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_atomically(str(tmp_path / "new"), b"x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_symbolic_link_stays_one(old):
    link = old.with_name("link")
    link.symlink_to(old)
    write_atomically(link, b"new")
    assert link.is_symlink() and old.read_bytes() == b"new"


@pytest.mark.parametrize("stop", [ValueError("broken"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_the_old_file(old, stop):
    def write(file):
        file.write(b"half of the n")
        raise stop

    with pytest.raises(type(stop)):
        write_atomically(old, write)
    assert old.read_bytes() == b"old" and temporaries(old.parent) == []


@pytest.mark.parametrize(
    "data",
    [bytes(1 << 17), lambda file: torch.save(torch.zeros(1 << 15), file)],  # torch hides the OSError
    ids=["bytes", "torch.save"],
)
def test_a_full_disk_is_told_and_leaves_the_old_file(old, no_space, data):
    with pytest.raises(TooLarge, match=r"No space is left .* write .*result\.bin\. Free some space"):
        write_atomically(old, data)
    assert old.read_bytes() == b"old" and temporaries(old.parent) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_late_is_told(old, monkeypatch, number):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TooLarge, match="No space is left"):
        write_atomically(old, b"new")
    assert old.read_bytes() == b"old" and temporaries(old.parent) == []


def test_other_disk_errors_name_the_path_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/absent/result\.bin'"):
        write_atomically(tmp_path / "absent" / "result.bin", b"")


def test_the_error_of_another_file_keeps_its_name(old):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        write_atomically(old, lambda _: Path("/elsewhere/x").read_bytes())


@pytest.mark.parametrize("path", ["/dev/null", "."])
def test_only_files_are_replaced(path):
    with pytest.raises(BadFile, match=r"is not a file that can be replaced\. Choose another name"):
        write_atomically(path, b"x")


WRITER = """
import sys
from curvature.io.files import write_atomically
for n in range(10**6):
    write_atomically(sys.argv[1], bytes([n % 256]) * (1 << 20))
    print(n, flush=True)
"""


def test_kills_leave_a_whole_file(tmp_path):
    path = tmp_path / "result.bin"
    for kill in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.0037 * (kill + 1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        content = path.read_bytes()
        assert len(content) == 1 << 20 and len(set(content)) == 1


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_errors_read_as_cause_then_fix():
    error = BadObjective("The model is empty.", "Add a layer.")
    assert (str(error), error.cause, error.fix) == (
        "The model is empty. Add a layer.",
        error.args[0],
        "Add a layer.",
    )
    assert str(BadFile("Only a cause.")) == "Only a cause."
    assert issubclass(NotConverged, CurvatureError)


def test_partial_results_travel_with_their_error():
    assert pickle.loads(pickle.dumps(NotConverged("No.", "Try.", solution=[1]))).solution == [1]
    assert Interrupted([1]).result == [1]
    assert isinstance(Interrupted(), KeyboardInterrupt) and not isinstance(Interrupted(), CurvatureError)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("layer.0", "layer.0"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("\u202e\x9b", "\\u202e\\x9b"),
        ("x" * 90, "x" * 80 + "..."),
    ],
)
def test_names_from_files_cannot_move_the_cursor(text, shown):
    assert printable(text) == shown
