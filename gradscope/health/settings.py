"""How a check is set up: which rules, with which limits, and what counts as a failure."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from gradscope.check_results import Severity
from gradscope.errors import GradscopeError
from gradscope.health.catalogue import RULES
from gradscope.health.rule import Limit, LimitValue, Rule
from gradscope.nearest import nearest
from gradscope.notation import setting
from gradscope.project_file import ProjectFile, nearest_project

FailOn: TypeAlias = Literal["error", "warn"]

TABLE = "[tool.gradscope.check]"
SEVERITY = "severity"
_LIST_RULES = "gradscope check --list-rules prints every rule"
# The keys of the table that are no rules.
_OPTIONS = ("select", "ignore", "strict", "fail-on", "baseline")


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
        rule, limit = _find(key)
        if limit is None:
            severity = _choice(key, value, get_args(Severity))
            return replace(self, severities={**self.severities, rule.name: cast(Severity, severity)})
        given = {**self.limits.get(rule.name, {}), limit.name: _checked(key, limit, value)}
        return replace(self, limits={**self.limits, rule.name: given})

    def with_written_rule(self, text: str) -> CheckSettings:
        """These settings with what ``text`` says, ``RULE.LIMIT=VALUE``.

        Raises GradscopeError as :meth:`with_rule`, and for another form.
        """
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise GradscopeError(key, "is not of the form NAME.LIMIT=VALUE", "for example clip-rate.max=0.5")
        _, limit = _find(key)
        if limit is None or isinstance(limit.default, str):
            return self.with_rule(key, value)
        try:
            number = float(value)
        except ValueError:
            raise GradscopeError(key, f"must be {_bounds(limit)}, not {value or 'nothing'}") from None
        return self.with_rule(key, number)

    def with_choice(
        self,
        *,
        select: Iterable[str] | None = None,
        ignore: Iterable[str] = (),
        strict: bool | None = None,
        fail_on: str | None = None,
        baseline: Path | None = None,
    ) -> CheckSettings:
        """These settings with what else is given; None leaves a setting as it is.

        As in ruff, ``select`` takes the place of the rules selected and ignored so far, and ``ignore`` takes away more.

        Raises GradscopeError for an unknown rule, for no rule at all, and for another ``fail_on``.
        """
        chosen = self if select is None else replace(self, select=_known(select), ignore=())
        chosen = replace(
            chosen,
            ignore=tuple(dict.fromkeys((*chosen.ignore, *_known(ignore)))),
            strict=self.strict if strict is None else strict,
            fail_on=self.fail_on if fail_on is None else cast(FailOn, _choice("fail-on", fail_on, get_args(FailOn))),
            baseline=self.baseline if baseline is None else baseline,
        )
        if not any(chosen.asks_for(rule.name) for rule in RULES):
            raise GradscopeError("rules", "select and ignore leave none", _LIST_RULES)
        return chosen

    def asks_for(self, rule: str) -> bool:
        """Whether the rule of this name is to be judged."""
        return (self.select is None or rule in self.select) and rule not in self.ignore


def project_settings(directory: Path | None = None) -> CheckSettings:
    """``[tool.gradscope.check]`` of the nearest ``pyproject.toml`` in ``directory`` or upwards; the defaults without.

    Raises GradscopeError for a damaged file, and, naming file and key, for what is wrong in the table.
    """
    project = nearest_project(directory)
    return CheckSettings() if project is None else settings_of(project)


def settings_of(project: ProjectFile) -> CheckSettings:
    """``[tool.gradscope.check]`` of ``project``.

    Raises GradscopeError that names file and key.
    """
    table = project.settings.get("check", {})
    if not isinstance(table, dict):
        raise GradscopeError(str(project.path), "check in [tool.gradscope] must be a table")
    try:
        return _from_table(table, project.directory)
    except GradscopeError as error:
        raise GradscopeError(f"{project.path}: {error.what} in {TABLE}", error.why, error.hint) from None


def _from_table(table: Mapping[str, Any], directory: Path) -> CheckSettings:
    settings = CheckSettings()
    for key, value in table.items():
        if key in _OPTIONS:
            continue
        if "." in key:
            settings = settings.with_rule(key, value)
            continue
        if not any(rule.name == key for rule in RULES):
            known = [*_OPTIONS, *(rule.name for rule in RULES)]
            raise GradscopeError(key, "is no rule and no setting", nearest(key, known) or _LIST_RULES)
        if not isinstance(value, dict):
            raise GradscopeError(key, "must be a table", f'for example {key}.severity = "warn"')
        for name, given in value.items():
            settings = settings.with_rule(f"{key}.{name}", given)
    baseline = _of_kind(table, "baseline", str)
    if baseline == "":
        raise GradscopeError("baseline", "must be the name of a file")
    return settings.with_choice(
        select=_names(table, "select"),
        ignore=_names(table, "ignore") or (),
        strict=_of_kind(table, "strict", bool),
        fail_on=_of_kind(table, "fail-on", str),
        baseline=None if baseline is None else directory / baseline,
    )


_KINDS = {str: "a text", bool: "true or false", list: "a list of rules"}


def _of_kind(table: Mapping[str, Any], key: str, kind: type) -> Any:
    value = table.get(key)
    if value is not None and not isinstance(value, kind):
        raise GradscopeError(key, f"must be {_KINDS[kind]}")
    return value


def _names(table: Mapping[str, Any], key: str) -> list[str] | None:
    names = _of_kind(table, key, list)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise GradscopeError(key, f"must be {_KINDS[list]}")
    return cast("list[str] | None", names)


# --- rules, limits and their values ----------------------------------------------------------------------------------


def _known(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(find_rule(name).name for name in names))


def find_rule(name: str) -> Rule:
    """The rule of this name.

    Raises GradscopeError that names the nearest one.
    """
    rule = next((rule for rule in RULES if rule.name == name), None)
    if rule is None:
        known = [rule.name for rule in RULES]
        raise GradscopeError(name, "no such rule", nearest(name.replace("_", "-"), known) or _LIST_RULES)
    return rule


def _find(key: str) -> tuple[Rule, Limit | None]:
    """The rule and the limit that ``key`` names; None in place of the limit for the severity."""
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


def _checked(key: str, limit: Limit, value: object) -> LimitValue:
    if isinstance(limit.default, str):
        if limit.choices:
            return _choice(key, value, limit.choices)
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


def _bounds(limit: Limit) -> str:
    if limit.most < math.inf:
        return f"a number from {setting(limit.least)} to {setting(limit.most)}"
    return f"a number of at least {setting(limit.least)}" if limit.least > -math.inf else "a number"


def _choice(key: str, value: object, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    hint = nearest(value, choices) if isinstance(value, str) else None
    named = " or ".join(choice or '""' for choice in choices)
    raise GradscopeError(key, f"must be {named}, not {_told(value)}", hint)


def _told(value: object) -> str:
    """``value`` in a sentence, however long it is."""
    huge = isinstance(value, int) and value.bit_length() > 64
    return "a huge number" if huge else reprlib.repr(value)
