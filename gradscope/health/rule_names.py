"""Rules and their limits by the names that people type."""

from __future__ import annotations

from collections.abc import Iterable

from gradscope.errors import GradscopeError
from gradscope.health.catalogue import RULES
from gradscope.health.rule import Limit, Rule
from gradscope.nearest import nearest

SEVERITY = "severity"
LIST_RULES = "gradscope check --list-rules prints every rule"


def find_rule(name: str) -> Rule:
    """The rule of this name.

    Raises GradscopeError that names the nearest one.
    """
    rule = next((rule for rule in RULES if rule.name == name), None)
    if rule is None:
        known = [rule.name for rule in RULES]
        raise GradscopeError(name, "no such rule", nearest(name.replace("_", "-"), known) or LIST_RULES)
    return rule


def known_rules(names: Iterable[str]) -> tuple[str, ...]:
    """``names``, each once.

    Raises GradscopeError as ``find_rule``.
    """
    return tuple(dict.fromkeys(find_rule(name).name for name in names))


def find_limit(key: str) -> tuple[Rule, Limit | None]:
    """The rule and the limit that ``key`` names; None in place of the limit for the severity.

    Raises GradscopeError, whose ``what`` is the key, for another form, and where there is none of the name.
    """
    name, dot, limit_name = key.partition(".")
    if not (name and dot):
        raise GradscopeError(key, "is not of the form NAME.LIMIT", "for example clip-rate.max")
    try:
        rule = find_rule(name)
    except GradscopeError as error:
        raise GradscopeError(key, f"no rule is called {name}", error.hint) from None
    limits = {limit.name: limit for limit in rule.limits}
    if limit_name == SEVERITY or limit_name in limits:
        return rule, limits.get(limit_name)
    known = [*limits, SEVERITY]
    hint = nearest(limit_name.replace("_", "-"), known) or f"{name} has {', '.join(known)}"
    raise GradscopeError(key, f"{name} has no limit {limit_name!r}", hint)
