"""Several values after one option: ``--max-norm 0.5 1 5 grads/``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from gradscope.clipping.catalogue import POLICIES

_POLICY = re.compile(r"[a-z][a-z_-]*:[^/\\]*")
_GROUP = re.compile(r"[\w.-]+=.+")
_RULE_LIMIT = re.compile(r"[\w-]+\.[\w-]+=.*")
_RULE_NAMES = re.compile(r"[a-z]+(-[a-z]+)*(,[a-z]+(-[a-z]+)*)*")
_POLICY_NAMES = {rule.name for rule in POLICIES}


def is_number(text: str) -> bool:
    """Whether ``text`` reads as a number, nan and inf included: those deserve their own error."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_policy(text: str) -> bool:
    """Whether ``text`` is written like a policy and is no file."""
    return (text in _POLICY_NAMES or bool(_POLICY.fullmatch(text))) and not os.path.exists(text)


def is_group(text: str) -> bool:
    """Whether ``text`` is written like NAME=GLOB and is no file."""
    return bool(_GROUP.fullmatch(text)) and not os.path.exists(text)


def is_rule_limit(text: str) -> bool:
    """Whether ``text`` is written like RULE.LIMIT=VALUE and is no file."""
    return bool(_RULE_LIMIT.fullmatch(text)) and not os.path.exists(text)


def is_rule_names(text: str) -> bool:
    """Whether ``text`` is written like RULE or RULE,RULE and is no file."""
    return bool(_RULE_NAMES.fullmatch(text)) and not os.path.exists(text)


TAKES_SEVERAL: Mapping[str, Callable[[str], bool]] = {
    "--max-norm": is_number,
    "--max-grad-norm": is_number,
    "--clip-value": is_number,
    "--policy": is_policy,
    "--groups": is_group,
    "--rule": is_rule_limit,
    "--select": is_rule_names,
    "--ignore": is_rule_names,
}


def repeat_options(arguments: Sequence[str], takes: Mapping[str, Callable[[str], bool]]) -> list[str]:
    """``--max-norm 0.5 1 PATH`` as ``--max-norm 0.5 --max-norm 1 PATH``, for the options in ``takes``.

    The first value belongs to its option whatever it is; each further one for as long as it is written like a value.
    """
    return list(_repeated(iter(arguments), takes))


def _repeated(arguments: Iterator[str], takes: Mapping[str, Callable[[str], bool]]) -> Iterator[str]:
    option = ""
    for argument in arguments:
        if argument == "--":
            yield argument
            yield from arguments
            return
        if option and takes[option](argument):
            yield f"{option}={argument}"
            continue
        yield argument
        name, equals, _ = argument.partition("=")
        option = name if name in takes else ""
        if option and not equals:
            yield from _next(arguments)


def _next(arguments: Iterator[str]) -> Iterator[str]:
    for argument in arguments:
        yield argument
        return


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the options, then parse as ever."""
        repeatable = {
            name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts
        }
        takes = {name: belongs for name, belongs in TAKES_SEVERAL.items() if name in repeatable}
        return super().parse_args(ctx, repeat_options(args, takes))
