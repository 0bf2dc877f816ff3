"""A check as SARIF 2.1.0 (OASIS), which code hosts show beside their own findings.

Section numbers are those of the standard, https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from gradscope import __version__
from gradscope.check_results import Check, Reading, RuleOutcome, RuleText, Severity
from gradscope.printable import printable
from gradscope.results import Source
from gradscope.views.json_view import JsonValue, plain
from gradscope.views.source_paths import uri_of

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS: dict[Severity, Literal["error", "warning"]] = {"error": "error", "warn": "warning"}
# A gradient has no line, and GitHub shows no result without one.
_REGION: JsonValue = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}

JsonObject = dict[str, JsonValue]


def sarif_text(check: Check) -> str:
    """The log: one run, a result per violation, a notification per rule that was skipped."""
    log: JsonObject = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [_run(check)]}
    return json.dumps(log, indent=2, allow_nan=False) + "\n"


def _run(check: Check) -> JsonObject:
    rules = check.catalogue or _undescribed(check.rules)
    places = {rule.rule: i for i, rule in enumerate(rules)}
    driver: JsonObject = {
        "name": "gradscope",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_descriptor(rule) for rule in rules],
    }
    # That the tool ran well, not that the gradients are: 3.20.14.
    invocation: JsonObject = {
        "executionSuccessful": True,
        "toolExecutionNotifications": list(_notifications(check, places)),
    }
    return {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "results": list(_results(check, places)),
        "columnKind": "unicodeCodePoints",
        "properties": {"status": check.status, "summary": check.tally},
    }


def _undescribed(outcomes: Sequence[RuleOutcome]) -> tuple[RuleText, ...]:
    """The rules of a check that describes none."""
    severities = {outcome.rule: outcome.severity for outcome in outcomes}
    return tuple(RuleText(rule, severity, rule, "", "", ()) for rule, severity in severities.items())


def _descriptor(rule: RuleText) -> JsonObject:
    limits = [f"{rule.rule}.{limit.name} = {limit.typed}: {limit.about}" for limit in rule.limits]
    told = {"Compared": rule.formula, "Source": rule.source, "Limits": "; ".join(limits)}
    lines = [rule.about, *(f"{label}: {text}" for label, text in told.items() if text)]
    items = "\n".join(f"- {label}: `{text.replace('`', chr(39))}`" for label, text in told.items() if text)
    return {
        "id": rule.rule,
        "shortDescription": {"text": printable(rule.about)},
        "fullDescription": {"text": printable(" ".join(_sentence(line) for line in lines[:2]))},
        "help": {"text": "\n".join(map(printable, lines)), "markdown": f"{rule.about}\n\n{items}\n"},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _results(check: Check, places: dict[str, int]) -> Iterator[JsonObject]:
    seen: Counter[str] = Counter()
    for source, outcomes in check.by_source():
        for outcome in outcomes:
            if outcome.status not in ("fail", "warn"):
                continue
            level = "error" if check.fails_for(outcome) else "warning"
            for violation in outcome.violations or (_only_reading(outcome),):
                identity = "\n".join((outcome.rule, source.path, violation.where or ""))
                seen[identity] += 1
                yield {
                    "ruleId": outcome.rule,
                    "ruleIndex": places[outcome.rule],
                    "level": level,
                    "kind": "fail",
                    "message": _message(violation.message),
                    "locations": [_location(source, violation.where)],
                    "partialFingerprints": {"primaryLocationLineHash": f"{_digest(identity)}:{seen[identity]}"},
                    "properties": {
                        "value": plain(violation.value),
                        "limit": plain(violation.limit),
                        "steps": plain(violation.steps),
                    },
                }


def _only_reading(outcome: RuleOutcome) -> Reading:
    return Reading(outcome.value, outcome.limit, outcome.where, outcome.steps, outcome.message, outcome.bound)


def _notifications(check: Check, places: dict[str, int]) -> Iterator[JsonObject]:
    """What could not be judged: not a result, which a code host would show as an alert."""
    for source, outcomes in check.by_source():
        for outcome in outcomes:
            if outcome.status == "skipped":
                yield {
                    "associatedRule": {"id": outcome.rule, "index": places[outcome.rule]},
                    "level": "error" if check.fails_for(outcome) else "note",
                    "message": _message(f"{outcome.rule} was skipped: {outcome.message}"),
                    "locations": [_location(source, None)],
                }


def _message(text: str) -> JsonObject:
    """Braces stand for placeholders unless they are doubled: 3.11.5."""
    return {"text": printable(text).replace("{", "{{").replace("}", "}}")}


def _location(source: Source, where: str | None) -> JsonObject:
    physical: JsonObject = {"artifactLocation": {"uri": uri_of(source.path)}, "region": _REGION}
    location: JsonObject = {"physicalLocation": physical}
    if where is not None:
        # A layer is part of a model as a module is of a program: 3.33.7.
        location["logicalLocations"] = [{"fullyQualifiedName": printable(where), "kind": "module"}]
    return location


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
