"""How much memory there is, was used, and is needed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from curvature.errors import TooLarge
from curvature.linalg.space import Space

SHARE = 0.8  # of what is free may be planned with: the rest is for activations, and what others begin to use
SYSTEM = Path("/")


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that can be had now; of the main memory without swapping and within the limits of the
    process and its container, where the system tells (Linux)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    bounds = [bound for bound in (_available(), *_left_of_groups()) if bound is not None]
    return max(0, min(bounds)) if bounds else None


def _available() -> int | None:
    """What the machine has left, by its own account."""
    sizes = _table("proc/meminfo", ":")
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def _left_of_groups() -> Iterator[int]:
    """What is left of the limit of each control group that this process is in: of a container, a batch job."""
    own = next((line[3:] for line in _text("proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    for place in (Path(own), *Path(own).parents):
        folder = "sys/fs/cgroup" + str(place).rstrip("/")
        limit, used = _text(f"{folder}/memory.max").strip(), _text(f"{folder}/memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            cached = _table(f"{folder}/memory.stat", " ").get("inactive_file", "0")  # files that give way
            yield int(limit) - int(used) + int(cached)


def _table(path: str, separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in _text(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _text(path: str) -> str:
    try:
        return (SYSTEM / path).read_text()
    except OSError:
        return ""


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: of a GPU by torch since the last reset, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def short_of(needed: float, device: torch.device) -> int | None:
    """What is free, where so many bytes are more than may be planned with; None where they are not, or nobody knows."""
    free = free_bytes(device)
    return free if free is not None and needed > SHARE * free else None


def need_basis(rows: int, space: Space) -> None:
    """TooLarge when a basis of `rows` vectors would not fit into the memory that is free now."""
    needed = rows * space.size * torch.empty(0, dtype=space.dtype).element_size()
    if (free := short_of(needed, space.device)) is not None:
        fit = int(SHARE * free * rows / needed)
        raise TooLarge(
            f"A basis of {rows} vectors of {space.size:,} entries takes {needed / 2**30:.1f} GiB, "
            f"but {free / 2**30:.1f} GiB are free.",
            f"Ask for fewer probes, steps or eigenvalues (about {fit} vectors fit), or for fewer parameters.",
        )
