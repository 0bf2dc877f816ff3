"""How a check is set up: which rules, with which limits, and what counts as a failure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, cast, get_args

from gradscope.check_results import Severity
from gradscope.errors import GradscopeError
from gradscope.health.catalogue import RULES
from gradscope.health.limit_values import checked_value, one_of, parsed_value
from gradscope.health.rule import Limit, LimitValue, Rule
from gradscope.health.rule_names import LIST_RULES, find_limit, known_rules

FailOn: TypeAlias = Literal["error", "warn"]


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What is asked of a check; every name in it is known, and every value within its bounds.

    ``limits`` maps rule → limit → value for what differs from the defaults, ``severities`` rule → severity likewise.
    ``select`` (None: all) and ``ignore`` name rules.  ``strict`` makes a skipped rule a failure, ``fail_on`` ``"warn"``
    a warning.  ``baseline`` is the file that ``drift`` compares with.
    """

    limits: Mapping[str, Mapping[str, LimitValue]] = field(default_factory=dict)
    severities: Mapping[str, Severity] = field(default_factory=dict)
    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    strict: bool = False
    fail_on: FailOn = "error"
    baseline: Path | None = None

    def with_rule(self, key: str, value: object) -> CheckSettings:
        """These settings with ``value`` for ``key``: ``"RULE.LIMIT"`` or ``"RULE.severity"``.

        Raises GradscopeError, whose ``what`` is the key, for an unknown rule or limit and for a value of another kind
        or out of bounds.
        """
        rule, limit = find_limit(key)
        if limit is None:
            return self._with_severity(rule, key, value)
        return self._with_limit(rule, limit, checked_value(key, limit, value))

    def with_written_rule(self, text: str) -> CheckSettings:
        """These settings with what ``text`` says, ``RULE.LIMIT=VALUE``.

        Raises GradscopeError as :meth:`with_rule`, and for another form.
        """
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise GradscopeError(key, "is not of the form NAME.LIMIT=VALUE", "for example clip-rate.max=0.5")
        rule, limit = find_limit(key)
        if limit is None:
            return self._with_severity(rule, key, value)
        return self._with_limit(rule, limit, parsed_value(key, limit, value))

    def with_choice(
        self,
        *,
        rules: Mapping[str, object] = MappingProxyType({}),
        select: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] = (),
        strict: bool | None = None,
        fail_on: str | None = None,
        baseline: str | os.PathLike[str] | None = None,
    ) -> CheckSettings:
        """These settings with what else is given; None leaves a setting as it is.

        ``rules`` are limits and severities as in :meth:`with_rule`.  As in ruff, ``select`` takes the place of the
        rules selected and ignored so far, and ``ignore`` takes away more.

        Raises GradscopeError for an unknown rule, limit or value, for no rule at all, and for another ``fail_on``.
        """
        chosen = self
        if not isinstance(rules, Mapping) or not all(isinstance(key, str) for key in rules):
            raise GradscopeError("rules", "must map limits to values", 'for example {"clip-rate.max": 0.5}')
        for key, value in rules.items():
            chosen = chosen.with_rule(key, value)
        if select is not None:
            chosen = replace(chosen, select=known_rules([select] if isinstance(select, str) else select), ignore=())
        more = known_rules([ignore] if isinstance(ignore, str) else ignore)
        chosen = replace(
            chosen,
            ignore=tuple(dict.fromkeys((*chosen.ignore, *more))),
            strict=self.strict if strict is None else strict,
            fail_on=self.fail_on if fail_on is None else cast(FailOn, one_of("fail-on", fail_on, get_args(FailOn))),
            baseline=self.baseline if baseline is None else Path(baseline),
        )
        if not any(chosen.asks_for(rule.name) for rule in RULES):
            raise GradscopeError("rules", "select and ignore leave none", LIST_RULES)
        return chosen

    def asks_for(self, rule: str) -> bool:
        """Whether the rule of this name is to be judged."""
        return (self.select is None or rule in self.select) and rule not in self.ignore

    def _with_severity(self, rule: Rule, key: str, value: object) -> CheckSettings:
        severity = cast(Severity, one_of(key, value, get_args(Severity)))
        return replace(self, severities={**self.severities, rule.name: severity})

    def _with_limit(self, rule: Rule, limit: Limit, value: LimitValue) -> CheckSettings:
        given = {**self.limits.get(rule.name, {}), limit.name: value}
        return replace(self, limits={**self.limits, rule.name: given})
