"""How much memory there is, was used, and is needed."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from curvature.errors import TooLarge
from curvature.linalg.space import Space


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that can be had now; of the main memory without swapping, where the system tells (Linux)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":") for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: of a GPU by torch since the last reset, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def need_basis(rows: int, space: Space) -> None:
    """TooLarge when a basis of `rows` vectors would not fit into the memory that is free now."""
    needed = rows * space.size * torch.empty(0, dtype=space.dtype).element_size()
    free = free_bytes(space.device)
    if free is not None and needed > 0.9 * free:
        fit = int(0.9 * free * rows / needed)
        raise TooLarge(
            f"A basis of {rows} vectors of {space.size:,} entries takes {needed / 2**30:.1f} GiB, "
            f"but {free / 2**30:.1f} GiB are free.",
            f"Ask for fewer probes, steps or eigenvalues (about {fit} vectors fit), or for fewer parameters.",
        )
