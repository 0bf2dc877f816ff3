"""A check as workflow commands of GitHub Actions, which become annotations of the run.

The syntax: https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands; the escaping is that
of GitHub's own toolkit (``@actions/core``, command.ts).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.check_results import Check, RuleOutcome
from gradscope.printable import printable
from gradscope.views.check_screen import full_message, in_order
from gradscope.views.source_paths import path_in_workspace


def github_text(check: Check) -> str:
    """One command per rule that failed or warned, then the line that counts."""
    return "".join(f"{line}\n" for line in [*_commands(check), check.tally])


def command(name: str, message: str, **properties: str) -> str:
    """``::name key=value,key=value::message``."""
    listed = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name}{' ' * bool(listed)}{listed}::{_data(message)}"


def _commands(check: Check) -> Iterator[str]:
    for source, outcomes in check.by_source():
        skipped = [outcome for outcome in outcomes if outcome.status == "skipped" and check.fails_for(outcome)]
        for outcome in [*in_order(outcomes), *skipped]:
            yield _annotation(check, outcome, source.path)


def _annotation(check: Check, outcome: RuleOutcome, path: str) -> str:
    title = f"gradscope: {outcome.rule}"
    message = full_message(outcome)
    if outcome.status == "skipped":
        message = f"Skipped: {message}"
    inside = path_in_workspace(path)
    # Without a file the message alone must say which source it is about.
    where = {"file": printable(inside)} if inside is not None else {}
    told = message if inside is not None else f"{path}: {message}"
    return command("error" if check.fails_for(outcome) else "warning", printable(told), **where, title=title)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
