"""What the options of ``gradscope check`` ask for, on top of what the project asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from gradscope.errors import GradscopeError
from gradscope.health.project_settings import project_settings
from gradscope.health.rule_names import find_rule
from gradscope.health.settings import CheckSettings


def asked_settings(
    *,
    rules: Sequence[str],
    select: Sequence[str] | None,
    ignore: Sequence[str] | None,
    strict: bool | None,
    fail_on: str | None,
    baseline: str | None,
    save_baseline: str | None,
) -> CheckSettings:
    """The settings of the nearest ``pyproject.toml``, and over them what the options say (None: not given).

    Raises GradscopeError, which names the option, or the file and its key.
    """
    if baseline == "":
        raise GradscopeError("--baseline", "needs the name of a file")
    settings = project_settings()
    if save_baseline is not None and settings.baseline is not None and same_file(save_baseline, settings.baseline):
        # What is about to be written down anew is no measure.
        settings = replace(settings, baseline=None)
    for text in rules:
        try:
            settings = settings.with_written_rule(text)
        except GradscopeError as error:
            raise GradscopeError(f"--rule {text}", error.why, error.hint) from None
    return settings.with_choice(
        select=None if select is None else _rule_names("--select", select),
        ignore=_rule_names("--ignore", ignore or ()),
        strict=strict,
        fail_on=fail_on,
        baseline=baseline,
    )


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether both name one file, which need not be there."""
    return os.path.realpath(one) == os.path.realpath(other)


def _rule_names(option: str, given: Sequence[str]) -> list[str]:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``, every one of them a rule."""
    names = [name.strip() for text in given for name in text.split(",")]
    for name in names:
        if not name:
            raise GradscopeError(f"{option} {','.join(given)}".rstrip(), "names no rule")
        try:
            find_rule(name)
        except GradscopeError as error:
            raise GradscopeError(f"{option} {name}", error.why, error.hint) from None
    return names
