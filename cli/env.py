"""curv env: what a bug report needs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .config import Setting, settings
from .options import OUTPUT, Format
from .output import tell

PACKAGES = ("curvature-toolkit", "torch", "numpy", "scipy", "safetensors", "matplotlib", "transformers")


def env(
    *,
    config: Annotated[bool, Parameter(negative=(), group=OUTPUT)] = False,
    file: Annotated[Path | None, Parameter(name="-C", group=OUTPUT)] = None,
    format: Format = "human",
) -> None:
    """Versions, device, threads and memory, for a bug report; or the defaults that are set, and where.

    Examples: `curv env`; `curv env --config`; `curv env --format json`.

    Parameters
    ----------
    config
        Every option that a file or a variable of the environment sets, by command, and which of them does.
    file
        The file, in place of ./curv.toml or [tool.curv] in ./pyproject.toml.
    """
    if config:
        _show({name: asdict(setting) for name, setting in _set(file).items()}, format)
    else:
        _show(_versions(), format)


def _show(facts: Mapping[str, str | Mapping[str, Any]], format: Format) -> None:
    if format == "json":
        tell(json.dumps(facts))
    elif format == "human":
        rows = {name: f if isinstance(f, str) else f"{f['value']!r} from {f['source']}" for name, f in facts.items()}
        width = max((len(name) for name in rows), default=0)
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        tell("\n".join(lines) or "No defaults are set: there is no ./curv.toml, [tool.curv] or CURV_ variable.")


def _set(file: Path | None) -> dict[str, Setting]:
    from .main import COMMANDS, build

    found = settings(build(), COMMANDS, file)
    return {f"{command}.{name}": setting for command, some in found.items() for name, setting in some.items()}


def _versions() -> dict[str, str]:
    import torch

    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
