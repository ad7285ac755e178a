"""Journals: what was whole when a process died is there for the next, and nothing else is taken for it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from curvature.errors import BadFile, TooLarge
from curvature.io.journal import Journal

HEADING = {"question": "test", "options": {"k": 3}}
RECORDS = [{"a": torch.arange(5.0), "b": torch.tensor(0.1)}, {"a": torch.zeros(0, 3)}, {"c": torch.ones(2).bfloat16()}]


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def written(path) -> None:
    journal = Journal(path, HEADING)
    assert journal.read() is None
    for record in RECORDS:
        journal.append(record)


def records(path) -> list:
    journal, found = Journal(path, HEADING), []
    while (record := journal.read()) is not None:
        found.append(record)
    return found


def test_records_come_back_bit_for_bit_and_more_can_follow(tmp_path):
    path = tmp_path / "new folder" / "j"
    written(path)
    journal = Journal(path, HEADING)
    for record in RECORDS:
        assert same(journal.read(), record)
    assert journal.read() is None
    journal.append({"d": torch.ones(1)})
    assert len(records(path)) == 4


def test_a_file_that_ends_anywhere_gives_the_records_that_are_whole(tmp_path):
    path, cut = tmp_path / "j", tmp_path / "cut"
    written(path)
    data, ends = path.read_bytes(), []
    journal = Journal(path, HEADING)
    while journal.read() is not None:
        ends.append(journal.end)
    start = len(data) - journal.size
    for end in range(start, len(data)):
        cut.write_bytes(data[:end])
        assert len(records(cut)) == sum(whole <= end for whole in ends)
        assert cut.stat().st_size in (start, *ends)  # the rest is gone, so that what follows is found
        journal = Journal(cut, HEADING)
        while journal.read() is not None:
            pass
        journal.append(RECORDS[0])
        assert same(records(cut)[-1], RECORDS[0])


def test_a_changed_byte_ends_the_records(tmp_path):
    path = tmp_path / "j"
    written(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(records(path)) == 2


def test_replacing_leaves_one_record(tmp_path):
    path = tmp_path / "j"
    written(path)
    journal = Journal(path, HEADING)
    while journal.read() is not None:
        pass
    journal.replace(RECORDS[0])
    journal.append(RECORDS[2])
    assert [same(*pair) for pair in zip(records(path), [RECORDS[0], RECORDS[2]], strict=True)] == [True, True]


def test_the_journal_of_other_work_is_refused_and_names_the_difference(tmp_path):
    path = tmp_path / "j"
    written(path)
    before = path.read_bytes()
    with pytest.raises(BadFile, match=r"its options\.k is 3, not 4\. .*another path"):
        Journal(path, {"question": "test", "options": {"k": 4}})
    with pytest.raises(BadFile, match=r"its options\.m is null, not 1"):
        Journal(path, {"question": "test", "options": {"k": 3, "m": 1}})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"weights", b"curvature journal 1\n", b"curvature journal 1\n" + 50 * b"x"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(BadFile, match="is not a checkpoint"):
        Journal(path, HEADING)
    assert path.read_bytes() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(BadFile, match="cannot be written"):
        Journal(tmp_path, HEADING)


def test_another_process_is_refused_while_one_writes(tmp_path):
    path = tmp_path / "j"
    first = Journal(path, HEADING)
    code = f"from curvature.io.journal import Journal; Journal({str(path)!r}, {HEADING!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode and "Another process writes to the checkpoint" in other.stderr
    assert first.read() is None
    first.append(RECORDS[0])
    del first
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert len(records(path)) == 1


def test_zeros_at_the_end_are_no_records(tmp_path):
    path = tmp_path / "j"
    written(path)
    with open(path, "ab") as file:
        file.write(bytes(4096))  # what a power cut leaves on some file systems
    assert len(records(path)) == 3


def test_damage_in_the_middle_is_told_and_loses_nothing(tmp_path):
    path = tmp_path / "j"
    written(path)
    data = bytearray(path.read_bytes())
    journal = Journal(path, HEADING)
    journal.read()
    data[journal.end - 1] ^= 1
    del journal
    path.write_bytes(data)
    with pytest.raises(BadFile, match="is damaged from byte"):
        records(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["file/below", "x" * 300, "a\0b"])
def test_a_path_that_cannot_be_written_is_refused(name, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadFile, match="cannot be written"):
        Journal(tmp_path / name, HEADING)


def test_a_full_disk_leaves_the_records_before(tmp_path, monkeypatch):
    path = tmp_path / "j"
    written(path)
    journal = Journal(path, HEADING)
    while journal.read() is not None:
        pass
    write = os.write

    def full(descriptor, data):
        write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(TooLarge, match="No space is left on the disk"):
        journal.append(RECORDS[0])
    monkeypatch.undo()
    assert len(records(path)) == 3
    journal.append(RECORDS[0])
    assert len(records(path)) == 4
