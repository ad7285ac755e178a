"""Defaults of options from a file and from the environment, and where each came from.

The command line goes before the environment, that before the file, and that before the default of the option.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_origin

from cyclopts import App, Argument, ArgumentCollection, CycloptsError
from cyclopts.config import Dict

from .options import SAFETY

PREFIX = "CURV_"
FILE, PROJECT = Path("curv.toml"), Path("pyproject.toml")
Options = Mapping[str, Argument]  # of a command, by name


@dataclass(frozen=True)
class Setting:
    """A value that is no default, and where it is from."""

    value: Any
    source: str


class Configured:
    """What is done with the arguments of a command, after those of the command line: settings are filled in."""

    def __init__(self, root: App, commands: Iterable[str]) -> None:
        self.root, self.commands = root, tuple(commands)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        if not commands:
            return
        given = [token.value for argument in arguments if "-C" in argument.names for token in argument.tokens]
        mine = settings(self.root, self.commands, Path(given[0]) if given else None).get(commands[0], {})
        by_source = sorted(mine.items(), key=lambda item: item[1].source)
        for source, some in groupby(by_source, key=lambda item: item[1].source):
            Dict({name: setting.value for name, setting in some}, source=source, use_commands_as_keys=False)(
                app, commands, arguments
            )


def settings(app: App, commands: Iterable[str], file: Path | None) -> dict[str, dict[str, Setting]]:
    """Those of every command, by option; CycloptsError where a name is unknown or may not be set this way."""
    tables, source = _read(file)
    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    if not (tables or variables):
        return {}
    known = {name: _options(app[name]) for name in commands}
    found: dict[str, dict[str, Setting]] = {name: {} for name in known}
    for command, name, value in _in_file(tables, source, known):
        found[command][name] = Setting(value, source)
    for command, name, variable in _in_environment(variables, known):
        found[command][name] = Setting(_parted(known[command][name], variables[variable]), variable)
    for command, some in found.items():
        for name, setting in some.items():
            if SAFETY in known[command][name].parameter.group:  # pyright: ignore[reportOperatorIssue]
                option = known[command][name].name
                raise CycloptsError(
                    msg=f"{option} cannot be set in {setting.source}: say it for each file that you trust."
                )
    return found


def _options(command: App) -> Options:
    """The options of a command by their names as files write them, with underscores."""
    return {
        name.removeprefix("--").replace("-", "_"): argument
        for argument in command.assemble_argument_collection()
        for name in argument.names
        if name.startswith("--") and name != "--config"
    }


def _read(file: Path | None) -> tuple[dict[str, Any], str]:
    """What the file says that was given or is here, and its name."""
    places = [file] if file is not None else [FILE, PROJECT]
    for place in places:
        try:
            tables = tomllib.loads(place.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if file is not None:
                raise CycloptsError(msg=f"There is no file {file}, which --config names.") from error
            continue
        except (OSError, ValueError) as error:
            raise CycloptsError(msg=f"{place} cannot be read: {error}.") from error
        if place.name != PROJECT.name:
            return tables, str(place)
        tables = tables.get("tool", {}).get("curv", {})
        if tables or file is not None:
            return tables, f"[tool.curv] of {place}"
    return {}, ""


def _in_file(tables: dict[str, Any], source: str, known: Mapping[str, Options]) -> Iterable[tuple[str, str, Any]]:
    """Command, option and value: first the options of all commands, then those of one."""
    shared = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    for written, value in shared.items():
        commands = [command for command, options in known.items() if _plain(written) in options]
        if written in known:
            raise CycloptsError(msg=f"{source} has {written} = {value!r}, but options of a command are in [{written}].")
        if not commands:
            raise _unknown(source, "{}", written, _every(known))
        yield from ((command, _plain(written), value) for command in commands)
    for command, table in tables.items():
        if command in shared:
            continue
        if command not in known:
            raise _unknown(source, "[{}]", command, known)
        for written, value in table.items():
            if _plain(written) not in known[command]:
                raise _unknown(source, f"{command}.{{}}", written, known[command])
            yield command, _plain(written), value


def _in_environment(variables: Mapping[str, str], known: Mapping[str, Options]) -> Iterable[tuple[str, str, str]]:
    """Command, option and variable: first those of all commands, such as CURV_SEED, then those of one, such as
    CURV_SPECTRUM_SEED."""
    names = {variable: _plain(variable.removeprefix(PREFIX)) for variable in variables}
    for variable, name in names.items():
        yield from ((command, name, variable) for command, options in known.items() if name in options)
    for variable, name in names.items():
        own = [(command, name.removeprefix(f"{command}_")) for command in known if name.startswith(f"{command}_")]
        own = [(command, rest) for command, rest in own if rest in known[command]]
        if not own and name not in _every(known):
            written = [*_every(known), *(f"{command}_{option}" for command in known for option in known[command])]
            raise _unknown("The environment", PREFIX + "{}", name.upper(), [name.upper() for name in written])
        yield from ((command, rest, variable) for command, rest in own)


def _every(known: Mapping[str, Options]) -> set[str]:
    return {name for options in known.values() for name in options}


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _parted(option: Argument, value: str) -> str | list[str]:
    """The words of an option that may be repeated."""
    return value.split() if get_origin(option.hint) is tuple else value


def _unknown(source: str, form: str, name: str, known: Iterable[str]) -> CycloptsError:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    kind, fix = "option", "Options are at the top, or in a table of their command: [spectrum]."
    if form == "[{}]":
        kind, fix = "command", "`curv --help` lists them."
    fix = f"Did you mean {form.format(near[0])}?" if near else fix
    return CycloptsError(msg=f"{source} has {form.format(name)!r}, which is no {kind}. {fix}")
