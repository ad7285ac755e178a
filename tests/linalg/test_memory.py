"""What memory there is: of the machine, and of the container or batch job that the process is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import curvature as cv
from curvature.linalg import memory
from curvature.linalg.space import Space

CPU = torch.device("cpu")
GROUP = "sys/fs/cgroup"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a system, in the place of this one's."""
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write(**{"proc/meminfo": "MemTotal:  8 kB\nMemAvailable:   1000000 kB\n"})
    return write


def test_free_is_what_the_machine_has_left(system):
    assert memory.free_bytes(CPU) == 1_024_000_000


def test_a_limit_of_the_container_counts_too_but_not_files_that_give_way(system):
    system(**{f"{GROUP}/memory.max": "5000\n", f"{GROUP}/memory.current": "3000\n"})
    assert memory.free_bytes(CPU) == 2000
    system(**{f"{GROUP}/memory.stat": "anon 1\ninactive_file 500\n"})
    assert memory.free_bytes(CPU) == 2500
    system(**{f"{GROUP}/memory.current": "9000\n"})
    assert memory.free_bytes(CPU) == 0
    system(**{f"{GROUP}/memory.max": "max\n"})
    assert memory.free_bytes(CPU) == 1_024_000_000


def test_the_tightest_group_around_the_process_counts(system):
    job = f"{GROUP}/batch/job7"
    system(**{"proc/self/cgroup": "3:cpu:/x\n0::/batch/job7/step\n", f"{job}/memory.max": "900"})
    system(**{f"{job}/memory.current": "100", f"{GROUP}/memory.max": "5000", f"{GROUP}/memory.current": "1000"})
    assert memory.free_bytes(CPU) == 800


def test_a_system_that_tells_nothing_bounds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SYSTEM", tmp_path / "none")
    assert memory.free_bytes(CPU) is None
    memory.need_basis(1 << 40, Space(1 << 20, torch.float64, CPU))


def test_a_basis_may_take_four_fifths_of_it_and_the_message_says_what_fits(system):
    system(**{f"{GROUP}/memory.max": str(100 * 1024), f"{GROUP}/memory.current": "0"})
    space = Space(1024, torch.float32, CPU)
    memory.need_basis(20, space)
    with pytest.raises(cv.TooLarge, match=r"A basis of 21 vectors .*\(about 20 vectors fit\)"):
        memory.need_basis(21, space)


def test_this_machine_tells():
    free = memory.free_bytes(CPU)
    assert free is None or (Path("/proc/meminfo").exists() and 0 < free < 1 << 50)


def test_a_fifth_of_what_is_free_is_not_planned_with(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.short_of(800, CPU) is None and memory.short_of(801, CPU) == 1000
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert memory.short_of(1e18, CPU) is None
