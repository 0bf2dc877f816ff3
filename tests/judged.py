"""One rule's verdict on one source, as a check returns it."""

from __future__ import annotations

from pathlib import Path

from gradscope.check_results import RuleOutcome
from gradscope.gradients import GradientSource
from gradscope.health.checking import check
from gradscope.health.rule import LimitValue
from gradscope.health.settings import CheckSettings
from gradscope.sources.opening import open_source

SAMPLES = Path(__file__).parents[1] / "sample_ckpts"


def judged(rule: str, source: GradientSource | Path, **limits: LimitValue) -> RuleOutcome:
    """What ``rule`` says with these limits in place of its defaults, written with _ for -."""
    opened = open_source(source) if isinstance(source, Path) else source
    settings = CheckSettings(select=(rule,))
    for name, value in limits.items():
        settings = settings.with_rule(f"{rule}.{name.replace('_', '-')}", value)
    (outcome,) = check([opened], settings).rules
    return outcome


def skipped(outcome: RuleOutcome) -> str | None:
    """Why a rule was skipped; None where it was not."""
    return outcome.message if outcome.status == "skipped" else None
