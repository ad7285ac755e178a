"""curv env: what a bug report needs."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .options import Format

PACKAGES = ("curvature-toolkit", "torch", "numpy", "scipy", "safetensors", "matplotlib", "transformers")


def env(*, format: Format = "human") -> None:
    """Versions, device, threads and memory, for a bug report.

    Parameters
    ----------
    format
        A table, JSON, or nothing.
    """
    import torch

    facts = {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if format == "json":
        print(json.dumps(facts))
    elif format == "human":
        print("\n".join(f"{name:<18} {value}" for name, value in facts.items()))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
