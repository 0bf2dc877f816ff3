"""SARIF: valid by the schema of the standard, a result per violation, and safe with any name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import jsonschema
import pytest
from check_samples import (
    HOSTILE,
    HOSTILE_PLACES,
    NONFINITE,
    check,
    every_kind,
    hostile,
    outcome,
    source,
    two_sources,
    unhealthy,
)

from gradscope import __version__
from gradscope.check_results import Check
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "sarif-schema-2.1.0.json").read_text())


def run(made: Check) -> Any:
    (only,) = json.loads(VIEWS["sarif"](made, ViewChoices()))["runs"]
    return only


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft4Validator:
    jsonschema.Draft4Validator.check_schema(SCHEMA)
    return jsonschema.Draft4Validator(SCHEMA, format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER)


@pytest.mark.parametrize("made", every_kind())
def test_every_check_is_valid_by_the_schema_of_the_standard(made: Check, schema: jsonschema.Draft4Validator) -> None:
    text = VIEWS["sarif"](made, ViewChoices())
    assert text.isascii()
    errors = [error.message for error in schema.iter_errors(json.loads(text))]
    assert errors == []


def test_the_schema_refuses_what_is_none(schema: jsonschema.Draft4Validator) -> None:
    log = json.loads(VIEWS["sarif"](unhealthy(), ViewChoices()))
    log["runs"][0]["results"][0]["level"] = "fatal"
    assert not schema.is_valid(log)


def test_every_violation_is_a_result() -> None:
    results = run(unhealthy())["results"]
    told = [(result["ruleId"], result["level"], result["message"]["text"]) for result in results]
    assert told == [
        *(("exploding", "error", v.message) for v in unhealthy().rules[0].violations),
        ("nonfinite", "error", NONFINITE.message),
        ("clip-rate", "warning", unhealthy().rules[7].message),
        ("coverage", "error", unhealthy().rules[8].message),
    ]
    first = results[0]
    assert first["properties"] == {"value": 812.0, "limit": 100.0, "steps": [40, 80]}
    (location,) = first["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "runs/ppo.gradscope"
    # GitHub shows no result without a line.
    assert location["physicalLocation"]["region"]["startLine"] == 1
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "actor.2"


def test_rules_are_described_and_found_by_their_index() -> None:
    told = run(unhealthy())
    driver = told["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("gradscope", __version__)
    rules = driver["rules"]
    assert [rule["id"] for rule in rules] == [rule.rule for rule in unhealthy().rules]
    for result in told["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    for rule in rules:
        assert rule["shortDescription"]["text"] == f"What {rule['id']} finds"
        assert "a / b <= max" in rule["fullDescription"]["text"]
        assert f"{rule['id']}.max = 0.5: largest value" in rule["help"]["text"]
        assert "A paper, 2019" in rule["help"]["text"]
    assert {rule["id"] for rule in rules if rule["defaultConfiguration"]["level"] == "warning"} == {"clip-rate"}


def test_skipped_rules_are_notifications_and_no_alerts() -> None:
    (invocation,) = run(unhealthy())["invocations"]
    assert invocation["executionSuccessful"] is True
    told = {n["associatedRule"]["id"]: n for n in invocation["toolExecutionNotifications"]}
    assert list(told) == ["depth-decay", "saturation", "noise-scale", "drift"]
    assert told["drift"]["message"]["text"] == "drift was skipped: no baseline was given"
    assert {notification["level"] for notification in told.values()} == {"note"}
    strict = next(made for made in every_kind() if made.strict)
    assert run(strict)["invocations"][0]["toolExecutionNotifications"][0]["level"] == "error"


def test_a_warning_that_fails_the_check_is_an_error() -> None:
    made = next(made for made in every_kind() if made.fail_on == "warn")
    assert [result["level"] for result in run(made)["results"]] == ["error"]


def test_fingerprints_stay_the_same_and_tell_results_apart() -> None:
    def fingerprints(made: Check) -> list[str]:
        return [result["partialFingerprints"]["primaryLocationLineHash"] for result in run(made)["results"]]

    for made in (unhealthy(), two_sources(), hostile()):
        assert len(set(fingerprints(made))) == len(fingerprints(made)) > 0
    alone = check(outcome("exploding", "fail", *unhealthy().rules[0].violations))
    assert fingerprints(alone) == fingerprints(unhealthy())[:3]


def test_paths_are_uris_relative_to_the_workspace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))

    def uri(path: str) -> str:
        made = check(outcome("nonfinite", "fail", NONFINITE, path=path), sources=(source(path),))
        told = run(made)["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert isinstance(told, str)
        return told

    assert uri(str(tmp_path / "a b" / "100%.zip")) == "a%20b/100%25.zip"
    assert uri(str(tmp_path / "x:y.pt")) == "x%3Ay.pt"
    assert uri(str(tmp_path / "caf\udce9.pt")) == "caf%E9.pt"
    assert uri("/elsewhere/run.pt") == "file:///elsewhere/run.pt"
    # A neighbour whose name begins as the workspace's does is no part of it.
    assert uri(f"{tmp_path}-2/run.pt").startswith("file:///")


def test_hostile_names_are_shown_and_obeyed_by_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    assert all(text.replace("\n", "").isprintable() for text in strings(run(hostile())))
    for result in run(hostile())["results"]:
        # A brace would begin a placeholder.
        assert "{" not in result["message"]["text"].replace("{{", "")
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9._~/%:-]+", place)
        assert unquote_to_bytes(urlsplit(place).path)
    assert any("{{0}}" in text for text in strings(run(hostile())["results"]))
    assert len(run(hostile())["results"]) == 2 * len(HOSTILE) * len(HOSTILE_PLACES)
