"""The rules of the health check themselves, for people and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence

from gradscope.check_results import RuleText
from gradscope.views.json_view import plain
from gradscope.views.markdown import escaped

SCHEMA = "gradscope.rules/1"
_INDENT = "    "


def rules_text(rules: Sequence[RuleText], width: int) -> str:
    """Every rule with what it compares, its limits and where it comes from, in lines of ``width`` cells."""
    return "\n".join("\n".join(_lines(rule, width)) + "\n" for rule in rules)


def rules_markdown(rules: Sequence[RuleText]) -> str:
    """The same as a page."""
    return "\n\n".join("\n".join(_section(rule)) for rule in rules) + "\n"


def rules_json(rules: Sequence[RuleText]) -> str:
    """The same as an object with the keys ``schema`` and ``rules``."""
    return json.dumps({"schema": SCHEMA, "rules": plain(tuple(rules))}, indent=2, allow_nan=False) + "\n"


def _lines(rule: RuleText, width: int) -> Iterator[str]:
    yield from textwrap.wrap(f"{rule.rule} ({rule.severity}): {rule.about}", width, subsequent_indent=_INDENT)
    yield from _wrapped(rule.formula, width)
    for limit in rule.limits:
        yield from _wrapped(f"{limit.name} = {limit.typed or 'none'}: {limit.about}", width)
    yield from _wrapped(f"from {rule.source}", width)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=_INDENT, subsequent_indent=2 * _INDENT)


def _section(rule: RuleText) -> Iterator[str]:
    yield f"### {rule.rule} ({rule.severity})"
    yield f"\n{escaped(rule.about)}\n\n{escaped(rule.formula)}\n\nFrom {escaped(rule.source)}"
    if rule.limits:
        yield "\n| limit | value | |\n| :-- | --: | :-- |"
    for limit in rule.limits:
        yield f"| {rule.rule}.{limit.name} | {escaped(limit.typed or 'none')} | {escaped(limit.about)} |"
