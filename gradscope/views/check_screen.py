"""What ``gradscope check`` shows: what failed, in the order in which it happened, what warned, what passed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradscope.check_results import STATUS_WORDS, Check, RuleOutcome
from gradscope.findings import run_words, step_word
from gradscope.notation import count, names, number, setting
from gradscope.printable import printable
from gradscope.results import Source
from gradscope.views.cells import known
from gradscope.views.choices import ViewChoices
from gradscope.views.screen import Block, Column, Row, Screen, Sentence, Table, Tone
from gradscope.views.wrapping import shortened

# What the other columns of a table take; names of layers share the rest.
_OTHER_COLUMNS = 46
_SHORTEST_NAME = 12
_LONGEST_LIMIT = 8
# Names within a sentence.
_LONGEST_NAME = 40

_HEADLINES = {"fail": "unhealthy", "warn": "healthy, with warnings", "pass": "healthy"}


def check_screen(check: Check, choices: ViewChoices) -> Screen:
    """The screen of a check: a section per source; its last line counts what became of the rules."""
    return Screen(tuple(_blocks(check, choices)))


def check_page(check: Check, choices: ViewChoices) -> Screen:
    """The page of a check, for the summary of a job: the verdict, what failed and warned, and every rule in a table."""
    return Screen(tuple(_page_blocks(check)))


def in_order(outcomes: Sequence[RuleOutcome]) -> list[RuleOutcome]:
    """Failures and warnings, what happened first before the rest, and what has no step last."""
    return sorted(
        (outcome for outcome in outcomes if outcome.status in ("fail", "warn")),
        key=lambda outcome: (outcome.status != "fail", _first_step(outcome)),
    )


def full_message(outcome: RuleOutcome) -> str:
    """The message, and in few words what else violates the rule: other places, else other steps."""
    others = outcome.violations[1:]
    if not others:
        return outcome.message
    places = dict.fromkeys(other.where for other in others if other.where not in (None, outcome.where))
    named = [shortened(printable(place), _LONGEST_NAME) for place in places if place is not None]
    steps = sorted({other.steps for other in others if other.steps is not None and other.steps != outcome.steps})
    told = named or [step_range(each) for each in steps]
    what = "" if named else "step " if len(told) == 1 else "steps "
    message = outcome.message.rstrip()
    ending = "" if message.endswith((".", "!", "?")) else "."
    return f"{message}{ending} And {count(len(told) or len(others))} more{f': {what}{names(told)}' if told else ''}."


def _first_step(outcome: RuleOutcome) -> float:
    known_steps = [outcome.steps, *(violation.steps for violation in outcome.violations)]
    return min((steps[0] for steps in known_steps if steps is not None), default=math.inf)


def _blocks(check: Check, choices: ViewChoices) -> Iterator[Block]:
    several = len(check.sources) > 1
    for source, outcomes in check.by_source():
        opening = "" if several else choices.opening
        yield Sentence(_opening(source, opening), tone="strong")
        yield from _findings(check, outcomes)
        if passed := [outcome for outcome in outcomes if outcome.status == "pass"]:
            yield _passed_table(passed, choices)
        if skipped := [outcome for outcome in outcomes if outcome.status == "skipped"]:
            yield Sentence(_skipped(skipped), tone="quiet")
    yield from (Sentence(note) for note in check.notes)
    yield from _closing(check)


def _opening(source: Source, opening: str = "") -> str:
    words = [run_words(source)]
    if source.steps:
        words.append(f"{count(source.steps)} {step_word(source)[: None if source.steps != 1 else -1]}")
    # What was picked is told with the directory that was named.
    named = opening or " ".join(filter(None, (source.picked or source.path, source.arguments)))
    return f"{named}: {' · '.join(words)}"


def _findings(check: Check, outcomes: Sequence[RuleOutcome]) -> Iterator[Sentence]:
    for outcome in in_order(outcomes):
        tone: Tone = "alarm" if check.fails_for(outcome) else "strong"
        head = f"{outcome.rule} {STATUS_WORDS[outcome.status]}"
        yield Sentence(full_message(outcome), finding=True, tone=tone, head=head)


def _closing(check: Check) -> Iterator[Sentence]:
    failed = check.status == "fail"
    if failed and not check.count("fail") and check.failed_because:
        yield Sentence(f"{check.failed_because}.", tone="alarm", head="Failed")
    yield Sentence(check.tally, tone="alarm" if failed else "strong")


def _skipped(outcomes: Sequence[RuleOutcome]) -> str:
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        reasons.setdefault(outcome.message.rstrip(".").strip(), []).append(outcome.rule)
    return f"Skipped: {'; '.join(f'{_enumerated(rules)} ({reason})' for reason, rules in reasons.items())}."


def _enumerated(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _passed_table(outcomes: Sequence[RuleOutcome], choices: ViewChoices) -> Table:
    room = max(_SHORTEST_NAME, choices.width - _OTHER_COLUMNS)
    columns = (Column("passed", "left"), Column("value"), Column("limit", spare=1), Column("where", "left", spare=2))
    rows = (
        Row(
            (
                outcome.rule,
                known(outcome.value, number),
                _limit(outcome),
                shortened(printable(outcome.where or ""), room, "…" if choices.unicode else "~"),
            )
        )
        for outcome in outcomes
    )
    return Table(columns, tuple(rows))


# --- the page --------------------------------------------------------------------------------------------------------


def _page_blocks(check: Check) -> Iterator[Block]:
    yield Sentence(f"Gradients {_HEADLINES[check.status]}: {check.tally}", tone="strong")
    if check.failed_because and not check.count("fail"):
        yield Sentence(f"{check.failed_because}.", head="Failed")
    for source, outcomes in check.by_source():
        yield Sentence(_opening(source), tone="strong" if len(check.sources) > 1 else "plain")
        yield from _findings(check, outcomes)
        if outcomes:
            yield _rules_table(outcomes)
        if skipped := [outcome for outcome in outcomes if outcome.status == "skipped"]:
            yield Sentence(_skipped(skipped))
    yield from (Sentence(note) for note in check.notes)


def _rules_table(outcomes: Sequence[RuleOutcome]) -> Table:
    """Every rule that answered, with a bar that is full where its limit is reached."""
    columns = (
        Column("rule", "left"),
        Column("outcome", "left"),
        Column("value"),
        Column("limit"),
        Column("where", "left"),
        Column("steps", "left"),
    )
    answered = [outcome for outcome in outcomes if outcome.status != "skipped"]
    rows = tuple(
        Row(
            (
                outcome.rule,
                STATUS_WORDS[outcome.status],
                known(outcome.value, number),
                _limit(outcome),
                outcome.where or "",
                known(outcome.steps, step_range),
            ),
            bar=nearness(outcome),
            tone="plain" if outcome.status == "pass" else "strong",
        )
        for outcome in answered
    )
    barred = any(row.bar is not None for row in rows)
    return Table(columns, rows, caption="The bar is full where the limit is reached." if barred else "")


def _limit(outcome: RuleOutcome) -> str:
    """As it was typed, unless it was computed, and which way it holds."""
    if outcome.limit is None:
        return ""
    typed = setting(outcome.limit)
    sign = "≤" if outcome.bound == "most" else "≥"
    return f"{sign} {typed if len(typed) <= _LONGEST_LIMIT else number(outcome.limit)}"


def step_range(steps: tuple[int, int]) -> str:
    """``7`` or ``7–12``, without thousands separators, as steps are named elsewhere."""
    first, last = steps
    return f"{first}" if first == last else f"{first}–{last}"


def nearness(outcome: RuleOutcome) -> float | None:
    """How near the limit a value is, 0 to 1 (reached), whether it bounds from above or from below.

    None where that is no matter of a ratio: without a limit, at a limit of 0, across signs.
    """
    value, limit = outcome.value, outcome.limit
    if value is None or limit is None or value != value or limit != limit:
        return None
    if outcome.status != "pass":
        return 1.0
    if value == limit:
        return 0.0 if value == 0 else 1.0
    if value * limit < 0 or not (math.isfinite(value) and math.isfinite(limit)):
        return None
    small, large = sorted((abs(value), abs(limit)))
    return small / large
