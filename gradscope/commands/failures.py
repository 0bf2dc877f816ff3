"""Every failure as one line: ``error: WHAT: WHY``, and where it helps a second, ``hint: …``."""

from __future__ import annotations

import re

import typer

from gradscope.errors import GradscopeError
from gradscope.nearest import nearest
from gradscope.printable import printable

# Typer carries its own copy of click from 0.2x on, so click's classes are reached through typer's.
_USAGE_ERROR: type = typer.BadParameter.__mro__[1]


def failure_lines(error: Exception) -> list[str]:
    """The lines for ``error``, whatever it is."""
    known = as_gradscope_error(error)
    lines = [f"error: {printable(known.what)}: {printable(known.why)}"]
    return [*lines, f"hint: {printable(known.hint)}"] if known.hint else lines


def as_gradscope_error(error: Exception) -> GradscopeError:
    """``error`` as what, why and hint."""
    if isinstance(error, GradscopeError):
        return error
    if isinstance(error, _USAGE_ERROR):
        return _usage_error(error)
    why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return GradscopeError("internal", f"{why}; rerun with --debug")


def _usage_error(error: Exception) -> GradscopeError:
    message = str(getattr(error, "message", error)).rstrip(".")
    option = getattr(error, "option_name", None)
    parameter = getattr(error, "param", None)
    if option and "requires an argument" in message:
        return GradscopeError(option, "needs a value")
    if option and "No such option" in message:
        context = getattr(error, "ctx", None)
        known = [name for p in context.command.params for name in p.opts] if context else []
        return GradscopeError(option, "no such option", nearest(option, [*known, "--help"]))
    if option:
        return GradscopeError(option, message)
    if parameter is not None:
        if whole := _whole_number(parameter.type):
            return GradscopeError(parameter.opts[0], whole)
        why = message.removeprefix("Value error, ")
        why = why[:1].lower() + why[1:]
        given, *choices = re.findall(r"'([^']*)'", why) or [""]
        return GradscopeError(parameter.opts[0], why, nearest(given, choices))
    return GradscopeError("usage", message, "gradscope --help lists the commands")


def _whole_number(wanted: object) -> str | None:
    """What an option of type ``wanted`` takes, if that is a whole number; typer speaks of an "int range"."""
    if not getattr(wanted, "name", "").startswith("int"):
        return None
    least = getattr(wanted, "min", None)
    return "must be a whole number" if least is None else f"must be a whole number of at least {least}"
