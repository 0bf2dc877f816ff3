"""``[tool.gradscope.check]``: what a project asks of a check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from gradscope.errors import GradscopeError
from gradscope.health.catalogue import RULES
from gradscope.health.rule_names import LIST_RULES
from gradscope.health.settings import CheckSettings
from gradscope.nearest import nearest
from gradscope.project_file import ProjectFile, nearest_project

TABLE = "[tool.gradscope.check]"
# The keys of the table that are no rules.
_OPTIONS = ("select", "ignore", "strict", "fail-on", "baseline")
_KINDS = {str: "a text", bool: "true or false", list: "a list of rules"}


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
            raise GradscopeError(key, "is no rule and no setting", nearest(key, known) or LIST_RULES)
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
