"""What a ``Recorder`` is asked for, checked before anything trains."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from gradscope.errors import GradscopeError


def whole_number(name: str, value: Any, least: int) -> int:
    """``value`` as an int, whatever integer type it has.

    Raises GradscopeError, which names the option, for another type and below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise GradscopeError(f"{name}={value!r}", "must be a whole number") from None
    if number < least:
        raise GradscopeError(f"{name}={value!r}", f"must be at least {least}")
    return number


def name_globs(include: Any) -> tuple[str, ...] | None:
    """The globs of tensor names; None for all names.

    Raises GradscopeError for what is no list of strings: a single string would be one of letters.
    """
    if include is None:
        return None
    if isinstance(include, str):
        raise GradscopeError(f"include={include!r}", "must be a list of globs", f"include=[{include!r}]")
    globs = tuple(include) if isinstance(include, Iterable) else ()
    if not isinstance(include, Iterable) or any(not isinstance(glob, str) for glob in globs):
        raise GradscopeError(f"include={include!r}", "must be a list of globs")
    return globs or None


def one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raise GradscopeError, which names the option, unless ``value`` is allowed."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise GradscopeError(f"{name}={value!r}", f"must be {' or '.join(map(repr, allowed))}")
