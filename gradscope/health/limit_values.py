"""Values for the limits of rules, as people write them: of the right kind, and within bounds."""

from __future__ import annotations

import math
import numbers
import reprlib

from gradscope.errors import GradscopeError
from gradscope.health.rule import Limit, LimitValue
from gradscope.nearest import nearest
from gradscope.notation import setting


def checked_value(key: str, limit: Limit, value: object) -> LimitValue:
    """``value`` for ``limit``, whatever kind of number it is.

    Raises GradscopeError, whose ``what`` is ``key``, for another kind and out of bounds.
    """
    if isinstance(limit.default, str):
        if limit.choices:
            return one_of(key, value, limit.choices)
        if not isinstance(value, str):
            raise GradscopeError(key, f"must be a text, not {_told(value)}")
        if limit.verify is not None:
            try:
                limit.verify(value)
            except GradscopeError as error:
                raise GradscopeError(key, error.why, error.hint) from None
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise GradscopeError(key, f"must be {_bounds(limit)}, not {_told(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = -math.inf if value < 0 else math.inf
    if not limit.least <= number <= limit.most:
        raise GradscopeError(key, f"must be {_bounds(limit)}, not {setting(number)}")
    return number


def parsed_value(key: str, limit: Limit, text: str) -> LimitValue:
    """What ``text`` says for ``limit``.

    Raises GradscopeError as ``checked_value``.
    """
    if isinstance(limit.default, str):
        return checked_value(key, limit, text)
    try:
        number = float(text)
    except ValueError:
        raise GradscopeError(key, f"must be {_bounds(limit)}, not {text or 'nothing'}") from None
    return checked_value(key, limit, number)


def one_of(key: str, value: object, choices: tuple[str, ...]) -> str:
    """``value``, if it is one of ``choices``.

    Raises GradscopeError, whose ``what`` is ``key``, otherwise.
    """
    if isinstance(value, str) and value in choices:
        return value
    hint = nearest(value, choices) if isinstance(value, str) else None
    named = " or ".join(choice or '""' for choice in choices)
    raise GradscopeError(key, f"must be {named}, not {_told(value)}", hint)


def _bounds(limit: Limit) -> str:
    if limit.most < math.inf:
        return f"a number from {setting(limit.least)} to {setting(limit.most)}"
    return f"a number of at least {setting(limit.least)}" if limit.least > -math.inf else "a number"


def _told(value: object) -> str:
    """``value`` in a sentence, however long it is."""
    huge = isinstance(value, int) and value.bit_length() > 64
    return "a huge number" if huge else reprlib.repr(value)
