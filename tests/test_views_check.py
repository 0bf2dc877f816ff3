"""A check on the screen, as a page, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from check_samples import (
    CLIP_RATE,
    EXPLODING,
    HOSTILE,
    HOSTILE_PLACES,
    NONFINITE,
    check,
    every_kind,
    healthy,
    hostile,
    outcome,
    passed,
    skipped,
    source,
    two_sources,
    unhealthy,
)
from rich.cells import cell_len

from gradscope.check_results import Check, Reading
from gradscope.results import Inspection, Simulation
from gradscope.views import VIEWS, Format, formats_of
from gradscope.views.check_screen import nearness
from gradscope.views.choices import ViewChoices

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def table(made: Check, **choices: object) -> str:
    return VIEWS["table"](made, ViewChoices(**choices))  # type: ignore[arg-type]


def markdown(made: Check) -> str:
    return VIEWS["markdown"](made, ViewChoices())


# --- the screen ------------------------------------------------------------------------------------------------------


def test_the_whole_screen() -> None:
    assert (
        table(unhealthy())
        == """\
runs/ppo.gradscope: SB3 PPO · 100 updates

▸ nonfinite failed: Step 12 holds NaN in actor.2.weight, and it was taken.
▸ exploding failed: The norm of actor.2 grew 812-fold from step 40 to step 80;
  limit 100. And 2 more: actor.0, critic.0.
▸ coverage failed: Clipping covers half of the parameters: critic is in no clip
  group.

▸ clip-rate warned: max_norm 0.5 clips 93 % of the steps of policy.

  passed         value    limit  where
  spike           3.21     ≤ 12  actor.0
  vanishing    0.00120  ≥ 1e-07  critic.0
  dead               0    ≤ 0.5
  scaled-clip

Skipped: depth-decay (fewer than 5 layers with matrices); saturation (a
recording tells its clip rate itself); noise-scale (no captured batch was
given); drift (no baseline was given).

3 failed, 4 passed, 1 warned, 4 skipped
"""
    )


def test_the_last_line_counts_over_all_sources() -> None:
    for made in every_kind():
        assert table(made).splitlines()[-1] == made.tally
    assert healthy().tally == "2 passed"
    assert check().tally == "0 passed"
    assert two_sources().tally == "1 failed, 1 passed, 2 skipped"


def test_every_source_has_its_section() -> None:
    first, second = table(two_sources()).split("runs/b.gradscope: ")
    assert "exploding failed" in first and "exploding failed" not in second
    assert re.search(r"^  exploding +1.30 +≤ 100$", second, re.M)


def test_a_source_that_was_not_named_is_introduced() -> None:
    assert table(healthy(), opening="Using runs/ppo").startswith("Using runs/ppo: SB3 PPO · 100 updates\n")
    picked = replace(source(), picked="m.pt, newest of 3 in runs", arguments="--tag x", steps=1)
    text = table(replace(healthy(), sources=(picked,)), width=120)
    assert text.startswith("m.pt, newest of 3 in runs --tag x: SB3 PPO · 1 update\n")


def test_what_happened_first_comes_first_even_where_it_was_not_the_worst() -> None:
    late, early = Reading(9.0, 1.0, "b", (70, 90), "Late."), Reading(2.0, 1.0, "a", (3, 5), "Early.")
    made = check(
        outcome("spike", "fail", Reading(5.0, 1.0, "c", (50, 50), "Middle.")), outcome("dead", "fail", late, early)
    )
    text = table(made)
    assert text.index("dead failed: Late. And 1 more: a.") < text.index("spike failed: Middle.")


def test_what_else_violates_a_rule_is_folded() -> None:
    many = [Reading(9.0, 1.0, f"layer.{i}", (0, 1), "Large.") for i in range(6)]
    assert "And 5 more: layer.1, layer.2, layer.3 and 2 more." in table(check(outcome("x", "fail", *many)), width=200)
    # Steps of one layer have no names of their own.
    steps = [Reading(9.0, 1.0, "actor", (n, n), "Large.") for n in (7, 1500, 3, 12, 4)]
    assert "And 4 more: steps 3, 4, 12 and 1 more." in table(check(outcome("x", "fail", *steps)))
    assert "And 1 more: step 1500." in table(check(outcome("x", "fail", *steps[:2])))
    nowhere = [Reading(None, None, None, None, "Odd.")] * 3
    assert "Odd. And 2 more." in table(check(outcome("x", "fail", *nowhere)))


def test_skipped_rules_are_grouped_by_their_reasons() -> None:
    made = check(
        skipped("a", "no layers."), skipped("b", "no batch"), skipped("c", "no layers"), skipped("d", "no layers")
    )
    assert "Skipped: a, c and d (no layers); b (no batch)." in table(made)


def test_a_failure_without_a_failed_rule_says_why() -> None:
    strict = next(made for made in every_kind() if made.strict)
    assert "\nFailed: 1 skipped, which is a failure with --strict.\n" in table(strict)
    assert "Failed:" not in table(unhealthy())


def test_alarm_is_for_failures_only() -> None:
    red = re.compile(r"\x1b\[1;31m(.*?)\x1b\[0m")
    assert red.findall(table(unhealthy(), colour=True)) == [
        "nonfinite failed", "exploding failed", "coverage failed", unhealthy().tally,
    ]  # fmt: skip
    for made in every_kind():
        shown = table(made, colour=True)
        assert bool(red.search(shown)) == (made.status == "fail")
        assert [line.rstrip() for line in ANSI.sub("", shown).splitlines()] == table(made).splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 140])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    for made in every_kind():
        for line in table(made, width=width).splitlines():
            assert cell_len(line) <= width, line


def test_ascii_is_enough() -> None:
    assert table(unhealthy(), unicode=False).isascii()


def test_nothing_in_a_name_reaches_the_terminal_as_it_is() -> None:
    text = table(hostile())
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[31mred" in text


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_begins_with_the_verdict_and_lists_the_failures() -> None:
    text = markdown(unhealthy())
    assert text.startswith("**Gradients unhealthy: 3 failed, 4 passed, 1 warned, 4 skipped**\n")
    assert re.findall(r"^- \*\*(.+?)\*\*: ", text, re.M) == [
        "nonfinite failed", "exploding failed", "coverage failed", "clip-rate warned",
    ]  # fmt: skip
    assert markdown(healthy()).startswith("**Gradients healthy: 2 passed**\n")
    assert markdown(check(outcome("clip-rate", "warn", CLIP_RATE))).startswith("**Gradients healthy, with warnings: ")


def test_the_page_charts_how_near_the_limits_are() -> None:
    bars = dict(re.findall(r"^\| \**([a-z-]+)\** \|.*?\| ([^|]*) \|$", markdown(unhealthy()), re.M))
    assert bars["exploding"] == "█" * 20
    assert bars["spike"] == "█████▍"
    assert bars["scaled-clip"] == ""


def test_the_tables_of_a_page_hold_with_any_name() -> None:
    for made in every_kind():
        for part in markdown(made).split("\n\n"):
            lines = part.splitlines()
            if part.startswith("|"):
                assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
    text = markdown(hostile())
    assert "<script" not in text.replace(r"\<script", "")
    assert r"pipe\|tick\`star\*\{0\}\[link\](1)" in text


def test_nearness_is_the_same_from_either_side_of_a_limit() -> None:
    assert nearness(passed("x", 3.0, 12.0)) == nearness(passed("x", 12.0, 3.0)) == 0.25
    assert nearness(passed("x", 0.0, 0.0)) == 0.0
    assert (
        nearness(passed("x", -2.0, 1.0)) is nearness(passed("x", None, 1.0)) is nearness(passed("x", 1.0, None)) is None
    )
    assert nearness(passed("x", float("nan"), 1.0)) is nearness(passed("x", 1.0, float("inf"))) is None
    assert nearness(outcome("x", "fail", NONFINITE)) == 1.0


# --- JSON and CSV ----------------------------------------------------------------------------------------------------


def test_json_holds_the_keys_that_are_promised() -> None:
    for made in every_kind():
        told = json.loads(VIEWS["json"](made, ViewChoices()))
        assert told["schema"] == "gradscope.check/1"
        assert told["status"] == made.status
        assert sum(told["counts"].values()) == len(told["rules"]) == len(made.rules)
        for rule in told["rules"]:
            assert list(rule)[:8] == ["rule", "severity", "status", "value", "limit", "where", "steps", "message"]
    told = json.loads(VIEWS["json"](unhealthy(), ViewChoices()))
    assert told["counts"] == {"pass": 4, "warn": 1, "fail": 3, "skipped": 4}
    assert told["rules"][0]["steps"] == [40, 80]
    assert [violation["where"] for violation in told["rules"][0]["violations"]] == ["actor.2", "actor.0", "critic.0"]
    assert told["sources"][0]["path"] == "runs/ppo.gradscope"
    assert told["catalogue"][0]["formula"] == "a / b <= max"


def test_json_tells_what_is_not_finite_in_words() -> None:
    told = json.loads(VIEWS["json"](hostile(), ViewChoices()), parse_constant=pytest.fail)
    assert {rule["value"] for rule in told["rules"]} == {"nan"}


def test_csv_has_a_row_per_violation_and_per_rule_without_any() -> None:
    rows = list(csv.DictReader(io.StringIO(VIEWS["csv"](unhealthy(), ViewChoices()), newline=""), strict=True))
    assert [row["rule"] for row in rows][:5] == ["exploding", "exploding", "exploding", "nonfinite", "spike"]
    assert len(rows) == len(unhealthy().rules) + len(EXPLODING) - 1
    assert rows[1] == {
        "source": "runs/ppo.gradscope", "rule": "exploding", "severity": "error", "status": "fail", "value": "700.0",
        "limit": "100.0", "where": "actor.0", "first_step": "44", "last_step": "80", "message": EXPLODING[1].message,
    }  # fmt: skip
    assert (rows[-1]["status"], rows[-1]["value"], rows[-1]["first_step"]) == ("skipped", "", "")


def test_csv_holds_with_any_name() -> None:
    text = VIEWS["csv"](hostile(), ViewChoices())
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert len(rows) == len(HOSTILE) * (2 * len(HOSTILE_PLACES) + 2)
    assert all(value.isprintable() for row in rows for value in row.values())


# --- which formats there are -----------------------------------------------------------------------------------------


def test_every_result_has_the_formats_for_people_and_programs_and_a_check_those_for_ci() -> None:
    common: set[Format] = {"table", "json", "csv", "markdown"}
    assert set(formats_of(Inspection)) == set(formats_of(Simulation)) == common
    assert set(formats_of(Check)) == common | {"junit", "sarif", "github"} == set(VIEWS)
