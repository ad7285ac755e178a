"""How the time, the arithmetic and the memory of a call are measured, and on which machine."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

LEAST = 0.05  # seconds that a timing takes at least, by repetition
PACKAGES = ("torch", "curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian", "backpack-for-pytorch")


class Clock:
    """Seconds of a call: (of the processor where one thread of it is all there is, of the wall)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.headline = time.process_time if alone else time.perf_counter

    def once(self, call: Callable[[], Any]) -> tuple[float, float]:
        self._finish()
        started = self.headline(), time.perf_counter()
        call()
        self._finish()
        return self.headline() - started[0], time.perf_counter() - started[1]

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float]:
        """The mean of as many calls as `LEAST` asks for."""
        times = [self.once(call)]
        while sum(wall for _, wall in times) < LEAST:
            times.append(self.once(call))
        headline, wall = (sum(column) / len(times) for column in zip(*times, strict=True))
        return headline, wall

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Flops(TorchDispatchMode):
    """Counts those of all matrix products and convolutions by torch's formulas, which its own counter, for the sake of
    a table of modules, cannot do under `torch.func`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def flops(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and those that it took."""
    with Flops() as counter:
        result = call()
    return result, counter.total


def peak_since(device: torch.device) -> Callable[[], float]:
    """Call what is returned for the MiB at the peak since now, above those of now."""
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - start) / 2**20
    process = Path("/proc/self")
    (process / "clear_refs").write_text("5")  # forgets the peak; Linux only

    def kibibytes(name: str) -> int:
        line = next(line for line in (process / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    now = kibibytes("VmRSS")
    return lambda: (kibibytes("VmHWM") - now) / 2**10


def machine(device: torch.device) -> dict[str, Any]:
    """What decides about the figures."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": ", ".join(sorted(models)) or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def rounded(value: Any) -> Any:
    """Four digits of every number, and nothing for what is none."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {name: rounded(item) for name, item in value.items()} if isinstance(value, dict) else value
