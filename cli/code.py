"""Code that the user named on the command line: ./file.py:name or package.module:name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import operator
import os
import sys
from pathlib import Path
from typing import Any

from .options import Misuse


def is_spec(text: str) -> bool:
    """Whether `text` names code rather than a file: something, a colon, and a dotted name."""
    place, colon, name = text.rpartition(":")
    return bool(colon and place) and place != "demo" and all(p.isidentifier() for p in name.split("."))


def resolve(spec: str) -> Any:
    """The object that `spec` names. A place with a slash, or ending in .py, is a file, else an installed module.

    A file is imported as `python file.py` would find its neighbours: from its own folder, not from the current one.
    Raises Misuse when there is no such place or name, BadObjective when importing it fails.
    """
    from curvature.errors import BadObjective, one_line

    place, _, name = spec.rpartition(":")
    if not is_spec(spec):
        raise Misuse(f"{spec!r} names no code.", "Write ./file.py:name or package.module:name.")
    import_from_here()
    is_file = "/" in place or place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise Misuse(f"There is no file {place}.", "Check the path before the colon.")
    try:
        module = _from_file(Path(place)) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the user's own code can raise anything, or parse our options
        raise BadObjective(
            f"Importing {place} failed: {one_line(error)}.", "Run it with python to see where."
        ) from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(name, vars(module), n=1)
        fix = f"Did you mean {place}:{near[0]}?" if near else "Check the name after the colon."
        raise Misuse(f"{place} has no {name!r}.", fix) from error


def import_from_here() -> None:
    """Let modules of the current folder be found, after all installed ones: `python` does so, a command does not."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


def _from_file(path: Path) -> Any:
    name = f"curv_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up here
    sys.path.insert(0, str(path.resolve().parent))  # and there it stays, for imports inside functions
    spec.loader.exec_module(module)
    return module
