"""Rules × evidence → ``Check``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from gradscope import results
from gradscope.check_results import (
    Check,
    LimitInForce,
    Reading,
    RuleOutcome,
    RuleStatus,
    RuleText,
    Severity,
)
from gradscope.gradients import GradientSource, Progress
from gradscope.health.baselines import Baseline, read_baseline
from gradscope.health.catalogue import RULES
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limits, Rule, Verdict
from gradscope.health.rules.drift import DRIFT
from gradscope.health.settings import CheckSettings

SCHEMA = "gradscope.check/1"


def check(
    sources: Iterable[GradientSource],
    settings: CheckSettings | None = None,
    *,
    steps: str | slice | None = None,
    progress: Progress | None = None,
) -> Check:
    """Read each of ``sources`` and judge it by every rule that is asked for.

    Raises GradscopeError for unusable steps, for an unreadable baseline, and for whatever a source finds wrong with its
    files.
    """
    settings = settings or CheckSettings()
    baseline = wanted_baseline(settings)
    gathered = [Evidence.gather(source, steps=steps, baseline=baseline, progress=progress) for source in sources]
    return judge(gathered, settings)


def wanted_baseline(settings: CheckSettings) -> Baseline | None:
    """The baseline to compare with; None where there is none, or no rule asks for it.

    Raises GradscopeError where it cannot be read.
    """
    if settings.baseline is None or not settings.asks_for(DRIFT.name):
        return None
    return read_baseline(settings.baseline)


def judge(gathered: Sequence[Evidence], settings: CheckSettings) -> Check:
    """Judge what was read of each source by every rule that is asked for."""
    outcomes = [
        _outcome(rule, evidence, settings)
        for evidence in gathered
        for rule in chosen_rules(settings)
        # Nobody who keeps no baseline expects to be told so.
        if rule is not DRIFT or evidence.baseline is not None or settings.select is not None
    ]
    because = _failure(outcomes, settings)
    warned = any(outcome.status == "warn" for outcome in outcomes)
    sources = [evidence.source for evidence in gathered]
    return Check(
        schema=SCHEMA,
        status="fail" if because else "warn" if warned else "pass",
        failed_because=because,
        sources=tuple(results.Source(**asdict(source.info)) for source in sources),
        rules=tuple(outcomes),
        notes=tuple(dict.fromkeys(note for source in sources for note in source.notes)),
        catalogue=rule_texts(settings),
        strict=settings.strict,
        fail_on=settings.fail_on,
    )


def chosen_rules(settings: CheckSettings) -> list[Rule]:
    """The rules that are asked for, in the order of the catalogue."""
    return [rule for rule in RULES if settings.asks_for(rule.name)]


def rule_texts(settings: CheckSettings) -> tuple[RuleText, ...]:
    """What the rules that are asked for are, with severity and limits as they are in force."""
    return tuple(_text(rule, settings) for rule in chosen_rules(settings))


def _outcome(rule: Rule, evidence: Evidence, settings: CheckSettings) -> RuleOutcome:
    severity: Severity = settings.severities.get(rule.name, rule.severity)
    verdict = rule.judge(evidence, Limits({**rule.defaults(), **settings.limits.get(rule.name, {})}))
    shown = _shown(verdict)
    return RuleOutcome(
        rule=rule.name,
        severity=severity,
        status=_status(verdict, severity),
        value=shown.value,
        limit=shown.limit,
        where=shown.where,
        steps=shown.steps,
        message=shown.message,
        violations=verdict.violations,
        path=evidence.source.info.path,
        bound=shown.bound,
    )


def _text(rule: Rule, settings: CheckSettings) -> RuleText:
    given = settings.limits.get(rule.name, {})
    limits = tuple(LimitInForce(limit.name, given.get(limit.name, limit.default), limit.about) for limit in rule.limits)
    severity = settings.severities.get(rule.name, rule.severity)
    return RuleText(rule.name, severity, rule.about, rule.formula, rule.source, limits)


def _status(verdict: Verdict, severity: Severity) -> RuleStatus:
    if verdict.skipped is not None:
        return "skipped"
    if not verdict.violations:
        return "pass"
    return "fail" if severity == "error" else "warn"


def _shown(verdict: Verdict) -> Reading:
    if verdict.skipped is not None:
        return Reading(None, None, None, None, verdict.skipped)
    if verdict.violations:
        return verdict.violations[0]
    assert verdict.nearest is not None
    return verdict.nearest


def _failure(outcomes: Sequence[RuleOutcome], settings: CheckSettings) -> str | None:
    """Why the check as a whole fails, if it does."""
    reached = [outcome.status for outcome in outcomes]
    if "fail" in reached:
        return f"{reached.count('fail')} failed"
    if settings.fail_on == "warn" and "warn" in reached:
        return f"{reached.count('warn')} warned, which is a failure here"
    if settings.strict and "skipped" in reached:
        return f"{reached.count('skipped')} skipped, which is a failure with --strict"
    return None
