"""The notation ``NAME:ARGUMENT,…`` of the option ``--policy``."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from gradscope.clipping.catalogue import POLICIES, PolicyRule
from gradscope.errors import GradscopeError

if TYPE_CHECKING:
    from gradscope.clipping.policy import Policy


def parse_policy(text: str) -> Policy:
    """The policy that ``text`` names, such as ``"norm:0.5"``, ``"agc:0.01,0.001"`` or ``"zclip:2.5"``.

    Raises:
        GradscopeError: unknown name, missing or surplus arguments, or a number outside its range.
    """
    name, arguments = check_notation(text)
    return _build(name, arguments)


def check_notation(text: str) -> tuple[str, tuple[float, ...]]:
    """Name and numbers of ``text``, checked against the catalogue; numpy is not needed.

    Raises:
        GradscopeError: as :func:`parse_policy`.
    """
    option = f"--policy {text}"
    name, colon, rest = text.strip().partition(":")
    rule = next((rule for rule in POLICIES if rule.name == name), None)
    if rule is None:
        raise GradscopeError(option, f"no policy is called {name!r}", _nearest(name))
    fields = [field.strip() for field in rest.split(",")] if colon else []
    if fields == [""]:
        fields = []
    needed = sum(argument.default is None for argument in rule.arguments)
    if not needed <= len(fields) <= len(rule.arguments):
        raise GradscopeError(option, f"{_expected(rule, needed)}, got {len(fields)}", f"write {rule.usage}")
    numbers = tuple(_number(option, rule, field) for field in fields)
    for argument, number in zip(rule.arguments, numbers, strict=False):
        if fault := argument.fault(number):
            raise GradscopeError(option, fault)
    return name, numbers


def _number(option: str, rule: PolicyRule, field: str) -> float:
    try:
        return float(field)
    except ValueError:
        raise GradscopeError(option, f"{field!r} is not a number", f"write {rule.usage}") from None


def _expected(rule: PolicyRule, needed: int) -> str:
    most = len(rule.arguments)
    count = str(needed) if needed == most else f"{needed} to {most}"
    return f"{rule.name} takes {count} number{'s' if most > 1 else ''}"


def _nearest(name: str) -> str:
    names = [rule.name for rule in POLICIES]
    close = difflib.get_close_matches(name.replace("_", "-"), names, n=1)
    return f"did you mean {close[0]}?" if close else f"the policies are {', '.join(names)}"


def _build(name: str, arguments: tuple[float, ...]) -> Policy:
    from gradscope.clipping.adaptive import AutoClip, Skip, ZClip
    from gradscope.clipping.thresholds import BlockRms, ClipByNorm
    from gradscope.clipping.unitwise import AdaptiveGradientClip
    from gradscope.clipping.values import ClipByValue

    makers: dict[str, type[Policy]] = {
        "value": ClipByValue,
        "block-rms": BlockRms,
        "agc": AdaptiveGradientClip,
        "autoclip": AutoClip,
        "zclip": ZClip,
        "skip": Skip,
    }
    return makers.get(name, ClipByNorm)(name, arguments)
