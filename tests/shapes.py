"""Shapes and types that annotations promise, checked at every call: a typechecker for

python -m pytest --jaxtyping-packages=curvature,shapes.checked
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, get_args, runtime_checkable

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked: of a Protocol that there are its members; none of a method that
    returns `Self`, which beartype knows of whole classes alone."""
    for hint in function.__annotations__.values():
        _make_checkable(hint)
    try:
        return beartype(function, conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
    except BeartypeDecorHintPep673Exception:
        return function


def _make_checkable(hint: Any) -> None:
    if isinstance(hint, type) and Protocol in hint.__bases__:
        runtime_checkable(hint)
    inside = hint.__bound__ if isinstance(hint, TypeVar) else None
    for part in (*get_args(hint), *(hint if isinstance(hint, list) else ()), *([inside] if inside else ())):
        _make_checkable(part)
