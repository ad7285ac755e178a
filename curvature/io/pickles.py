"""What a pickle would do, read without doing it.

A pickle is a program for a small stack machine. `scan` steps through it keeping only what matters here:
strings, because a name may be put together from two of them, and names, because they may be called.
Everything else on the stack is opaque. The stack effect of each instruction comes from pickletools.
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO, NamedTuple

_MARK = object()
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}
_MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_MEMO_READS = {"GET", "BINGET", "LONG_BINGET"}


class Name(NamedTuple):
    """A class or function on the stack, by its dotted name; "?" is a part that is not a plain string."""

    dotted: str


class Pickle(NamedTuple):
    """What one pickle mentions, each thing once and in order of appearance."""

    globals: tuple[str, ...]  # every class or function, dotted
    called: frozenset[str]  # those that it calls with arguments of its own
    strings: tuple[str, ...]  # every text constant


def scan(stream: bytes | BinaryIO) -> Pickle:
    """What the pickle mentions; a file is left right after it. ValueError when it is not a valid pickle."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    names: dict[str, None] = {}
    called: set[str] = set()
    strings: dict[str, None] = {}
    try:
        for instruction, argument, _ in pickletools.genops(stream):
            pushed = _pushed(instruction.name, argument, stack)
            if isinstance(pushed, Name):
                names[pushed.dotted] = None
            elif isinstance(pushed, str):
                strings[pushed] = None
            if instruction.name == "REDUCE" and isinstance(stack[-2], Name):
                called.add(stack[-2].dotted)
            _step(instruction, argument, pushed, stack, memo)
    except (IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"not a valid pickle ({type(error).__name__})") from error
    return Pickle(tuple(names), frozenset(called), tuple(strings))


def _pushed(instruction: str, argument: Any, stack: list[Any]) -> Name | str | None:
    """The name or string that the instruction puts on the stack; None for anything else."""
    if instruction in ("GLOBAL", "INST"):
        return Name(argument.replace(" ", ".", 1))
    if instruction == "STACK_GLOBAL":
        module, name = stack[-2:]
        return Name(".".join(part if isinstance(part, str) else "?" for part in (module, name)))
    if instruction in _EXTENSIONS:
        return Name(f"copyreg.extension.{argument}")
    return argument if isinstance(argument, str) else None


def _step(
    instruction: pickletools.OpcodeInfo,
    argument: Any,
    pushed: Name | str | None,
    stack: list[Any],
    memo: dict[int, Any],
) -> None:
    """Change `stack` and `memo` as the instruction would."""
    if instruction.name in _MEMO_WRITES:
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif instruction.name in _MEMO_READS:
        stack.append(memo[argument])
    elif instruction.name == "DUP":
        stack.append(stack[-1])
    else:
        taken = instruction.stack_before
        if pickletools.markobject in taken:
            while stack.pop() is not _MARK:
                pass
            taken = taken[: taken.index(pickletools.markobject)]
        if taken:
            del stack[-len(taken) :]
        stack.extend(_MARK if item is pickletools.markobject else pushed for item in instruction.stack_after)
