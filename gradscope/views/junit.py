"""A check as JUnit XML, which every CI system reads: a suite per source, a case per rule.

The form is that of Jenkins' schema (junit-10.xsd of its xUnit plugin).  Nothing is said of durations: none is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.check_results import Check, RuleOutcome, RuleText
from gradscope.printable import printable
from gradscope.results import Source

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


def junit_text(check: Check) -> str:
    """The document, in ASCII: what else there is stands in it as character references."""
    from xml.etree import ElementTree

    failures = sum(check.fails_for(outcome) for outcome in check.rules)
    root = _element("testsuites", name="gradscope check", tests=len(check.rules), failures=failures, errors=0)
    for source, outcomes in check.by_source():
        root.append(_suite(check, source, outcomes))
    ElementTree.indent(root)
    body: bytes = ElementTree.tostring(root, encoding="us-ascii", xml_declaration=False)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body.decode("ascii")}\n'


def _suite(check: Check, source: Source, outcomes: tuple[RuleOutcome, ...]) -> Element:
    suite = _element(
        "testsuite",
        name=source.path,
        tests=len(outcomes),
        failures=sum(check.fails_for(outcome) for outcome in outcomes),
        errors=0,
        skipped=sum(outcome.status == "skipped" and not check.fails_for(outcome) for outcome in outcomes),
    )
    properties = _element("properties")
    for name in ("kind", "format", "steps", "picked", "arguments"):
        if (value := getattr(source, name)) is not None:
            properties.append(_element("property", name=name, value=value))
    suite.append(properties)
    texts = {text.rule: text for text in check.catalogue}
    suite.extend(_case(check, source, outcome, texts.get(outcome.rule)) for outcome in outcomes)
    return suite


def _case(check: Check, source: Source, outcome: RuleOutcome, text: RuleText | None) -> Element:
    # What stands before the last dot of a class is its package to those who group by it.
    case = _element("testcase", name=outcome.rule, classname=f"gradscope.check.{source.path.replace('.', '_')}")
    if check.fails_for(outcome):
        skipped = outcome.status == "skipped"
        message = f"skipped: {outcome.message}" if skipped else outcome.message
        case.append(_element("failure", _details(outcome, text), message=message, type=outcome.rule))
    elif outcome.status == "skipped":
        case.append(_element("skipped", message=outcome.message))
    elif outcome.status == "warn":
        case.append(_element("system-out", f"warning: {_details(outcome, text)}"))
    return case


def _details(outcome: RuleOutcome, text: RuleText | None) -> str:
    """Every violation on a line of its own, and what the rule compares."""
    lines = [violation.message for violation in outcome.violations] or [outcome.message]
    if text is not None:
        lines += [f"{text.rule}: {text.about}", f"formula: {text.formula}", f"source: {text.source}"]
        lines += [f"{text.rule}.{limit.name} = {limit.typed}: {limit.about}" for limit in text.limits]
    return "\n".join(printable(line) for line in lines)


def _element(tag: str, text: str | None = None, **attributes: str | int) -> Element:
    from xml.etree import ElementTree

    element = ElementTree.Element(tag, {name: printable(str(value)) for name, value in attributes.items()})
    element.text = text
    return element
