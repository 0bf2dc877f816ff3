"""Workflow commands of GitHub Actions: read as its runner reads them, one line each whatever a name holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from check_samples import HOSTILE, NONFINITE, check, every_kind, hostile, outcome, source, two_sources, unhealthy
from hypothesis import given
from hypothesis import strategies as st

from gradscope.check_results import Check
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices
from gradscope.views.github import command


@dataclass
class Command:
    name: str
    properties: dict[str, str]
    message: str


def read(line: str) -> Command | None:
    """As the runner does: the command, its properties by comma, and what it unescapes, the percent sign last."""
    line = line.lstrip()
    if not line.startswith("::") or "::" not in line[2:]:
        return None
    head, _, message = line[2:].partition("::")
    name, _, listed = head.partition(" ")
    properties = {}
    for pair in filter(None, listed.split(",")):
        key, _, value = pair.partition("=")
        properties[key] = unescaped(value, {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ",", "%25": "%"})
    return Command(name, properties, unescaped(message, {"%0D": "\r", "%0A": "\n", "%25": "%"}))


def unescaped(text: str, escapes: dict[str, str]) -> str:
    for escape, character in escapes.items():
        text = text.replace(escape, character)
    return text


def github(made: Check) -> tuple[list[Command], str]:
    *lines, last = VIEWS["github"](made, ViewChoices()).splitlines()
    commands = [read(line) for line in lines]
    assert None not in commands
    return [command for command in commands if command is not None], last


def test_failures_are_errors_in_the_order_in_which_they_happened_and_warnings_come_after() -> None:
    commands, last = github(unhealthy())
    assert [(c.name, c.properties["title"]) for c in commands] == [
        ("error", "gradscope: nonfinite"),
        ("error", "gradscope: exploding"),
        ("error", "gradscope: coverage"),
        ("warning", "gradscope: clip-rate"),
    ]
    assert commands[0].message == NONFINITE.message
    assert commands[1].message.endswith("And 2 more: actor.0, critic.0.")
    assert "93 % of" in commands[3].message
    assert last == "3 failed, 4 passed, 1 warned, 4 skipped"


def test_what_fails_the_check_is_an_error() -> None:
    for made in every_kind():
        commands, last = github(made)
        assert any(command.name == "error" for command in commands) == (made.status == "fail")
        assert last == made.tally
    strict = next(made for made in every_kind() if made.strict)
    assert github(strict)[0][0].message == "Skipped: no baseline"


def test_a_source_in_the_workspace_is_named_as_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))

    def annotated(path: str) -> Command:
        made = check(outcome("nonfinite", "fail", NONFINITE, path=path), sources=(source(path),))
        return github(made)[0][0]

    inside = annotated(str(tmp_path / "runs" / "a,b:c%.zip"))
    assert inside.properties["file"] == "runs/a,b:c%.zip"
    assert inside.message == NONFINITE.message
    outside = annotated("/elsewhere/run.zip")
    assert "file" not in outside.properties
    assert outside.message == f"/elsewhere/run.zip: {NONFINITE.message}"


def test_every_source_has_its_annotations() -> None:
    commands, _ = github(two_sources())
    assert [command.properties["file"] for command in commands] == ["runs/a.gradscope"]


def test_hostile_names_make_no_command_of_their_own() -> None:
    text = VIEWS["github"](hostile(), ViewChoices())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff\u202e]", text)
    commands, _ = github(hostile())
    assert len(commands) == 2 * len(HOSTILE)
    for each in commands:
        assert each.name in ("error", "warning")
        assert set(each.properties) == {"file", "title"}


@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_what_the_runner_reads_is_what_was_written(message: str, title: str, file: str) -> None:
    line = command("error", message, file=file, title=title)
    assert "\n" not in line and "\r" not in line
    assert read(line) == Command("error", {"file": file, "title": title}, message)
