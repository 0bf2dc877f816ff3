"""JUnit XML: valid by Jenkins' schema, read by another project's reader, and well-formed with any name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import xmlschema
from check_samples import EXPLODING, HOSTILE, every_kind, hostile, two_sources, unhealthy
from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from gradscope.check_results import Check
from gradscope.views import VIEWS
from gradscope.views.choices import ViewChoices


def junit(made: Check) -> str:
    return VIEWS["junit"](made, ViewChoices())


def suites(made: Check) -> list[TestSuite]:
    return list(JUnitXml.fromstring(junit(made).encode()))


def cases(made: Check) -> dict[str, TestCase]:
    return {case.name: case for suite in suites(made) for case in suite}


@pytest.fixture(scope="module")
def schema() -> xmlschema.XMLSchema:
    return xmlschema.XMLSchema(str(Path(__file__).parent / "schemas" / "junit-10.xsd"))


@pytest.mark.parametrize("made", every_kind())
def test_every_check_is_valid_by_the_schema_of_jenkins(made: Check, schema: xmlschema.XMLSchema) -> None:
    text = junit(made)
    assert text.isascii()
    assert [error.reason for error in schema.iter_errors(text)] == []


def test_the_schema_refuses_what_is_none(schema: xmlschema.XMLSchema) -> None:
    assert not schema.is_valid(junit(unhealthy()).replace('errors="0"', ""))


def test_each_rule_is_a_case_of_its_source() -> None:
    first, second = suites(two_sources())
    assert (first.name, first.tests, first.failures, first.errors, first.skipped) == ("runs/a.gradscope", 2, 1, 0, 1)
    assert (second.name, second.tests, second.failures, second.skipped) == ("runs/b.gradscope", 2, 0, 1)
    assert [case.name for case in first] == ["exploding", "drift"]
    # Cases of two sources are told apart where suites are not shown.
    classes = {case.classname for suite in (first, second) for case in suite}
    assert classes == {"gradscope.check.runs/a_gradscope", "gradscope.check.runs/b_gradscope"}
    assert {prop.name: prop.value for prop in first.properties()}["format"] == "recorded SB3 PPO run"
    total = JUnitXml.fromstring(junit(two_sources()).encode())
    assert (total.tests, total.failures, total.errors) == (4, 1, 0)


def test_a_failure_tells_every_violation_and_what_the_rule_compares() -> None:
    case = cases(unhealthy())["exploding"]
    (failure,) = case.result
    assert isinstance(failure, Failure)
    assert failure.message == EXPLODING[0].message
    assert failure.type == "exploding"
    lines = failure.text.splitlines()
    assert lines[:3] == [violation.message for violation in EXPLODING]
    assert {"formula: a / b <= max", "source: A paper, 2019", "exploding.max = 0.5: largest value"} <= set(lines)


def test_passes_warnings_and_skipped_rules() -> None:
    made = cases(unhealthy())
    assert made["spike"].is_passed and made["spike"].system_out is None
    assert made["clip-rate"].is_passed
    assert made["clip-rate"].system_out.startswith("warning: max_norm 0.5 clips 93 % of the steps of policy.")
    (skipped,) = made["drift"].result
    assert isinstance(skipped, Skipped)
    assert skipped.message == "no baseline was given"


def test_what_fails_the_check_fails_its_case() -> None:
    for made in every_kind():
        failed = [case for suite in suites(made) for case in suite if case.is_failure]
        assert bool(failed) == (made.status == "fail")
        assert sum(suite.failures for suite in suites(made)) == len(failed)
    strict = next(made for made in every_kind() if made.strict)
    (failure,) = cases(strict)["drift"].result
    assert failure.message == "skipped: no baseline"


def test_no_duration_is_invented() -> None:
    assert not re.search(r"\b(time|timestamp|hostname)=", junit(unhealthy()))


def test_hostile_names_stay_text() -> None:
    text = junit(hostile())
    assert "<script>" not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    # Character references to what XML cannot hold are as ill-formed as the characters.
    assert not re.search(r"&#x?(0*(1?[0-9]|2[0-7])|5[5-7]\d{3}|6553[45]);", text.replace("&#10;", ""))
    read = suites(hostile())
    assert len(read) == len(HOSTILE)
    assert read[2].name == HOSTILE[2]
    assert read[0].name == r"a\nb\r\n::error::c"
    assert read[5].name == r"caf\udce9/model.zip"
