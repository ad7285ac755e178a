"""Code that the user named on the command line: ./file.py:name or package.module:name."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .options import Misuse
from .output import warn

if TYPE_CHECKING:
    import torch


def is_spec(text: str) -> bool:
    """Whether `text` names code rather than a file: something, a colon, and a dotted name."""
    place, colon, name = text.rpartition(":")
    return bool(colon and place) and place != "demo" and all(p.isidentifier() for p in name.split("."))


def resolve(spec: str) -> Any:
    """The object that `spec` names. A place with a slash, or ending in .py, is a file, else an installed module.

    A file is imported as `python file.py` would find its neighbours: from its own folder, not from the current one.
    Raises Misuse when there is no such place or name, BadObjective when importing it fails.
    """
    place, _, name = spec.rpartition(":")
    module = _imported(spec)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        own = {n.casefold(): n for n, held in vars(module).items() if n[0] != "_" and not inspect.ismodule(held)}
        near = difflib.get_close_matches(name.casefold(), own, n=1)
        fix = f"Did you mean {place}:{own[near[0]]}?" if near else "Check the name after the colon."
        raise Misuse(f"{place} has no {name!r}.", fix) from error


@contextmanager
def as_script(spec: str | None) -> Iterator[None]:
    """Context in which the code at `spec` passes for the script that runs, where a trusted pickle looks for classes of
    the script that saved it."""
    if spec is None:
        yield
        return
    running = sys.modules["__main__"]
    sys.modules["__main__"] = _imported(spec)
    try:
        yield
    finally:
        sys.modules["__main__"] = running


def _imported(spec: str) -> Any:
    """The module in which `spec` is."""
    from curvature.errors import BadObjective, one_line
    from curvature.io.recognise import near_miss

    place = spec.rpartition(":")[0]
    if not is_spec(spec):
        raise Misuse(f"{spec!r} names no code.", "Write ./file.py:name or package.module:name.")
    import_from_here()
    is_file = "/" in place or place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise Misuse(f"There is no file {place}.", near_miss(Path(place)))
    try:
        return _from_file(Path(place)) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # the user's own code can raise anything, or parse our options
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            raise Misuse(f"There is no module {place} here.", "Install it, or name a file: ./file.py:name.") from error
        raise BadObjective(
            f"Importing {place} failed: {one_line(error)}.", "Run it with python to see where."
        ) from error


def called(spec: str, arguments: tuple[str, ...] = (), given: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """What the code at `spec` returns when called with name=value arguments, and with those of `given` that its
    signature names; objects that are no code as they are."""
    import curvature as cv
    from curvature.errors import one_line, printable

    made = resolve(spec)
    if not callable(made) or isinstance(made, cv.Objective) or _is_module(made):
        if arguments:
            raise Misuse(f"{spec} is a {type(made).__name__}, which takes no --arch-arg.", "Name what makes it.")
        return made
    pairs = [argument.partition("=") for argument in arguments]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise Misuse(f"--arch-arg {name}{equals} is not of the form name=value.", "Write --arch-arg hidden=32.")
    own = {name: _literal(value) for name, _, value in pairs}
    taken = {**_taken(made, given, own), **own}
    _check_arguments(spec, made, taken)
    try:
        return made(**taken)
    except cv.CurvatureError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code can raise anything
        told = ", ".join(f"{name}={value!r}" for name, value in taken.items())
        raise cv.BadObjective(
            f"Calling {spec}{told and f'({printable(told)})'} failed: {one_line(error)}.",
            f"{'Check these values, or r' if taken else 'R'}un it with python to see where.",
        ) from error


def _check_arguments(spec: str, made: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise Misuse when the code has no such arguments, or more that must be given."""
    from curvature.errors import listing

    try:
        signature = inspect.signature(made)
    except (ValueError, TypeError):  # builtins need not tell theirs
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        names = listing(list(signature.parameters)) or "no arguments"
        raise Misuse(
            f"{spec} takes {names}, and cannot be called: {error}.",
            "Give arguments of --arch as --arch-arg name=value, and others a default.",
        ) from error


def _taken(made: Callable[..., Any], given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a checkpoint that the code has arguments for, but not those that --arch-arg gives."""
    from curvature.errors import listing

    names = inspect.signature(made).parameters if given else ()
    taken = {name: given[name] for name in names if name in given and name not in own}
    if taken:
        warn(f"took {listing([f'{name}={value}' for name, value in taken.items()])} from its hyper_parameters")
    return taken


def made_by(spec: str, arguments: tuple[str, ...], given: Mapping[str, Any]) -> torch.nn.Module:
    """The module that the code at `spec` makes of --arch-arg and of what it takes of `given`."""
    import curvature as cv

    made = called(spec, arguments, given)
    if not _is_module(made):
        raise cv.BadObjective(f"{spec} made a {type(made).__name__}.", "It must return a torch.nn.Module.")
    return made


def _is_module(made: Any) -> bool:
    import torch

    return isinstance(made, torch.nn.Module)


def _literal(text: str) -> Any:
    """A number, list or quoted text as Python writes it; anything else as plain text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


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
