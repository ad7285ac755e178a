"""Code that the user named on the command line: ./file.py:name or package.module:name."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
from pathlib import Path
from typing import Any


def is_spec(text: str) -> bool:
    """Whether `text` names code rather than a file: something, a colon, and a dotted name."""
    place, colon, name = text.rpartition(":")
    return bool(colon and place) and not place.startswith("demo") and all(p.isidentifier() for p in name.split("."))


def resolve(spec: str) -> Any:
    """The object that `spec` names. A place with a slash, or ending in .py, is a file, else an installed module.

    A file is imported as `python file.py` would find its neighbours: from its own folder, not from the current one.
    Raises BadObjective when there is no such place or name, or when importing it fails.
    """
    from curvature import BadObjective

    place, _, name = spec.rpartition(":")
    if not is_spec(spec):
        raise BadObjective(f"{spec!r} names no code.", "Write ./file.py:name or package.module:name.")
    is_file = "/" in place or place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise BadObjective(f"There is no file {place}.", "Check the path before the colon.")
    try:
        module = _from_file(Path(place)) if is_file else importlib.import_module(place)
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        raise BadObjective(f"{place} has no {name!r}: {error}.", "Check the name after the colon.") from error
    except Exception as error:  # the user's own code can raise anything
        raise BadObjective(
            f"Importing {place} failed: {type(error).__name__}: {error}.", "Run it with python to see where."
        ) from error


def _from_file(path: Path) -> Any:
    name = f"curv_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up here
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module
